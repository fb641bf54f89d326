"""Nested states as JSON, and the tensors in them by their place."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cs324dist.errors import UserError, printable


def split(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested state as JSON, and the tensors in it by their place, such as `history.3`.

    Raises:
        UserError: something in it is neither.
    """
    if isinstance(tree, Tensor):
        return {"$tensor": prefix}, {prefix: tree}
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = {key: split(part, f"{prefix}.{key}" if prefix else str(key)) for key, part in items}
        tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
        if len(tensors) < sum(len(found) for _, found in parts.values()):
            raise UserError(f"two tensors of the task's state are both {prefix}…: give keys without dots")
        if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
            return {key: plain for key, (plain, _) in parts.items()}, tensors
        if not isinstance(tree, dict):
            return [plain for plain, _ in parts.values()], tensors
        if all(type(key) is int for key in tree):  # such as the milestones of a MultiStepLR
            return {"$numbered": [[key, plain] for key, (plain, _) in parts.items()]}, tensors
    elif type(tree) is float and math.isinf(tree):  # such as the best loss before the first
        return {"$float": str(tree)}, {}
    elif tree is None or type(tree) in (bool, int, str) or (type(tree) is float and math.isfinite(tree)):
        return tree, {}
    raise UserError(
        f"the task's state holds {prefix} = {printable(repr(tree)):.99}: give tensors, numbers and words"
    )


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` was given."""
    if isinstance(plain, dict):
        if set(plain) == {"$tensor"}:
            return tensors[plain["$tensor"]]
        if set(plain) == {"$float"}:
            return float(plain["$float"])
        if set(plain) == {"$numbered"}:
            return {key: join(part, tensors) for key, part in plain["$numbered"]}
        return {key: join(part, tensors) for key, part in plain.items()}
    return [join(part, tensors) for part in plain] if isinstance(plain, list) else plain
