"""Writes docs/api.md: what a task of your own may import, with signatures and docstrings from the source.

python docs/api.py
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
PACKAGE = Path(__file__).parents[1] / "cs324dist"
HEAD = """# The public API

<!-- not run on this page: signatures, no programs -->

`python docs/api.py` makes this page from the docstrings; [your_own_task.md](your_own_task.md) shows it at
work. `Float[Tensor, "batch classes"]` is a tensor of floats of two dimensions, `Float[Tensor, ""]` of none.

Other types that appear below: `Interval` bounds a number, `Seed` is an integer from 0, and `ScheduleName`
is `constant`, `linear`, `cosine` or `wsd`. `Weights` is `averaged` or `raw`; `Model` is the class that you
give.
"""
PARTS = {  # by module
    "From `cs324dist`": {
        "__init__": ["main"],
        "tasks.base": ["Task", "Evaluation"],
        "config": ["Config", "MUTABLE", "Count", "Positive", "Fraction", "BatchSize"],
        "distributed.exact": ["ExactGradients"],
        "run": ["Run"],
        "distributed.sum_over": ["SumOver"],
        "data.loader": ["loader"],
        "data.streams": ["MicroBatch", "ShuffledEpochs", "Stream", "seeded"],
        "metrics": ["accuracy", "count_correct"],
        "runs.models": ["load_model"],
        "runs.trained": ["load_network"],
        "tasks.gan.sampling": ["load_generator"],
        "errors": ["UserError"],
    },
    "From `cs324dist.testing`": {
        "testing": ["assert_same_on", "assert_same_when_killed", "Command"],
    },
    "What these take and give": {
        "tasks.base": ["Mean", "Metrics", "Loss", "Picture", "Updater"],
        "distributed.sum_over": ["SumOver", "Measure", "Sums"],
        "data.loader": ["Loader", "Collate"],
        "data.streams": ["Indices"],
    },
}


def page() -> str:
    """All of it."""
    lines = [HEAD]
    for title, modules in PARTS.items():
        lines.append(f"## {title}\n")
        for module, names in modules.items():
            found = dict(members(parsed(module)))
            if module == "run":  # with what it inherits
                (base,) = (node for name, (node, _) in members(parsed("base_run")) if name == "BaseRun")
                found["Run"][0].body += base.body[1:]
            for name in names:
                lines += [f"### `{name}`\n", *entry(name, *found[name])]
    text = re.sub(r"\[Tensor, ' ?(.*?)'\]", r'[Tensor, "\1"]', "\n".join(lines)).replace(" ** ", "**")
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def parsed(module: str) -> ast.Module:
    """A module of the package."""
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def members(body: ast.Module | ast.ClassDef) -> Iterator[tuple[str, tuple[ast.stmt, str]]]:
    """What a module or class defines, and its docstring."""
    for node, below in zip_longest(body.body, body.body[1:]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, (node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            is_docstring = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield ast.unparse(target), (node, inspect.cleandoc(below.value.value) if is_docstring else "")


def entry(name: str, node: ast.stmt, docstring: str) -> Iterator[str]:
    """The signature, the docstring, and of a class its public members."""
    yield f"```python\n{signature(name, node)}\n```\n"
    yield from paragraphs(docstring)
    if not isinstance(node, ast.ClassDef):
        return
    methods = []
    for of_class, (member, text) in members(node):
        if isinstance(member, ast.FunctionDef):
            shown = not of_class.startswith("_") or (of_class in ("__init__", "__call__") and text)
            if shown and (name, of_class) != ("SumOver", "__init__"):  # the trainer makes it
                methods += [f"**`{signature(f'{name}.{of_class}', member)}`**\n", *paragraphs(text)]
        elif not of_class.startswith("_"):
            text = f": {' '.join(text.split())}" if text else ""
            yield f"- `{signature(of_class, member)}`{text}"
    yield from ["", *methods]


def signature(name: str, node: ast.stmt) -> str:
    """How it is written down, or called."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    if not isinstance(node, ast.FunctionDef):
        written = ast.unparse(node)
        return written if len(written) < 120 else written.partition(" = ")[0]
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = ast.unparse(node.returns).strip("'") if node.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{name}: {returns}"
    name = name.removesuffix(".__init__")
    call = f"{name}({re.sub('^(self|cls)(, )?', '', ast.unparse(node.args))})"
    return f"with {call}: ..." if "contextmanager" in decorators else f"{call} -> {returns}"


def paragraphs(docstring: str) -> Iterator[str]:
    """A docstring as Markdown."""
    for paragraph in filter(None, docstring.split("\n\n")):
        head, _, rest = paragraph.partition("\n")
        rest = textwrap.dedent(rest)
        if head in ("Args:", "Raises:"):
            parts = (" ".join(part.split()).partition(": ") for part in re.split(r"\n(?=\S)", rest))
            raises = "raises " * (head == "Raises:")
            yield "\n".join(f"- {raises}`{name}`: {text}" for name, _, text in parts) + "\n"
        elif head == "Returns:":
            yield f"Returns: {' '.join(rest.split())}\n"
        else:
            yield paragraph + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
