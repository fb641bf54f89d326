"""The rules of the house: what may import what, and that every link of the pages holds."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "cs324dist"
FLOORS = (  # a folder or module imports from those before it, and from those beside it never
    {"__init__"},
    {"errors"},
    {"config"},
    {"data", "metrics"},
    {"runs"},
    {"distributed", "pictures"},
    {"tasks"},
    {"trackers"},
    {"base_run"},
    {"run", "trainer"},
    {"command_line"},
    {"loop"},
    {"audit"},
    {"testing"},
    {"report"},
)
NOT_OF_THE_PAGE = {"trackers", "base_run", "run", "trainer", "loop", "audit"}  # it reads what run folders say
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("slurm/*.md")])


def imports(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("cs324dist.")}
    return found


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(module: Path) -> None:
    folder = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if folder == "__init__":  # which names what users import
        return
    floor = next(number for number, folders in enumerate(FLOORS) if folder in folders)
    allowed = {folder}.union(*FLOORS[:floor])
    if folder == "report":
        allowed -= NOT_OF_THE_PAGE
    assert imports(module) <= allowed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_relative_link_of_a_page_holds(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
