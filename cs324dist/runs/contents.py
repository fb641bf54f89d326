"""What an attribute holds, as JSON and tensors: numbers, words, arrays, and containers of them.

What cannot be made again from that has a content with `$lost`, which only tells values apart.
"""

import json
import math
import sys
import zlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from enum import Enum
from itertools import count
from numbers import Number
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cs324dist.errors import is_of_a_library

OF_MODULES = vars(nn.Module()).keys() - {"training"}  # attributes that torch gives each module
SAMPLE = 1 << 20  # values of a tensor that are compared
CONTAINERS = {kind.__name__: kind for kind in (tuple, set, frozenset, deque, OrderedDict, Counter)}
CONTAINER = (list, tuple, dict, set, frozenset, deque)
SHOWN: tuple[type, ...] = (str, Number, np.generic, bytes, bytearray, Enum, PurePath, range, slice)
SHOWN += (date, timedelta, torch.dtype, torch.device)
FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, type)
MOST = 10_000  # parts of a container that are compared
PLACES = count()  # of iterators, each another
KEPT = {torch.complex64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
KEPT |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Contents:
    """Gives the content of a value."""

    def __init__(self, names: Mapping[int, str], saved: Mapping[int, str]) -> None:
        """`names` of objects by their id, and of tensors that are saved anyway by where their values are."""
        self._names, self._saved = names, saved
        self._inside: list[int] = []

    def of(self, value: Any) -> Any:
        """The content."""
        if isinstance(value, CONTAINER) and id(value) in self._inside:
            return {"$lost": "itself"}
        self._inside.append(id(value))
        try:
            return self._of(value)
        except (RuntimeError, ReferenceError):  # it is a tensor of a rare kind, or a thread changes it
            return {"$lost": id(value)}
        finally:
            self._inside.pop()

    def _of(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"$float": "nan"} if math.isnan(value) else value
        if isinstance(value, np.generic) and has_numbers(value):
            return {"$scalar": [value.dtype.str, self.of(value.item())]}
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (list, *CONTAINERS.values(), dict):
            return self._container(value)
        if isinstance(value, CONTAINER):
            return {"$lost": [type(value).__name__, self._container(value)]}
        if isinstance(value, SHOWN):
            return {"$lost": f"{value!r:.1000}"}
        if isinstance(value, FUNCTIONS):
            line = getattr(getattr(value, "__code__", None), "co_firstlineno", 0)
            return {"$lost": [value.__qualname__, line]}
        if isinstance(value, Iterator) and not is_own(value) and not hasattr(value, "readline"):
            return {"$lost": next(PLACES)}  # where it is cannot be seen
        return {"$lost": [self._names.get(id(value), ""), type(value).__qualname__]}

    def _array(self, value: Any) -> Any:
        if type(value) is np.ndarray and value.flags.writeable and has_numbers(value):
            return {"$array": torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))}
        return {"$lost": [id(value), 0 if value.dtype.hasobject else zlib.crc32(value.tobytes())]}

    def _tensor(self, value: Tensor) -> Any:
        if is_lazy(value):
            return {"$lost": "lazy"}
        if not has_values(value) or value.dtype not in KEPT or 0 in value.stride():
            return {"$lost": [id(value), 0 if value.is_inference() else value._version]}
        if value.numel() and (name := self._saved.get(value.untyped_storage().data_ptr())):
            return {"$lost": name}
        strides = None if value.is_contiguous() else list(value.stride())
        return {
            "$on": value.device.type,
            "of": value.detach(),
            "grad": value.requires_grad,
            "strides": strides,
        }

    def _container(self, value: Any) -> Any:
        if len(value) > MOST:  # data, which is compared as one
            return {"$lost": [id(value), len(value), _checksum_of_numbers(value)]}
        if isinstance(value, dict):
            if all(type(key) is str for key in value):
                inner: Any = {key: self.of(part) for key, part in value.items()}
            else:
                keys = ({"$lost": "tensor"} if isinstance(k, Tensor) else self.of(k) for k in value)
                inner = {"$items": [[k, self.of(part)] for k, part in zip(keys, value.values(), strict=True)]}
        else:
            inner = [self.of(part) for part in value]
            if isinstance(value, set | frozenset):
                inner.sort(key=text_of)
        kind = type(value).__name__
        if isinstance(value, deque):
            return {"$deque": inner, "most": value.maxlen}
        return {f"${kind}": inner} if kind in CONTAINERS else inner


def has_numbers(value: np.ndarray | np.generic) -> bool:
    """Whether a tensor can hold what this does."""
    return value.dtype.char in "?bBhHiIlLqQefd" and value.dtype.isnative


def has_values(tensor: Tensor) -> bool:
    """Whether its values stand in memory as those of most tensors do."""
    is_rare = tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.is_mkldnn
    return tensor.layout is torch.strided and not is_rare and not is_lazy(tensor)


def _checksum_of_numbers(container: Any) -> int:
    try:
        return zlib.crc32(array("d", container.values() if isinstance(container, dict) else container))
    except (TypeError, OverflowError):  # other things than numbers
        return 0


def is_own(value: Any) -> bool:
    """Whether its class is the user's own, and of no library."""
    module = type(value).__module__
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] not in sys.stdlib_module_names and not is_of_a_library(file)


def text_of(content: Any) -> str:
    """A text that tells contents apart, with a checksum in the place of each tensor."""
    return json.dumps(content, default=_checksum)


def _checksum(tensor: Tensor) -> list[Any]:
    flat = tensor.reshape(-1)
    some = flat[:: 1 + len(flat) // SAMPLE].resolve_conj().resolve_neg().contiguous().cpu().view(torch.uint8)
    version = tensor._version if len(flat) > SAMPLE and not tensor.is_inference() else 0
    return [str(tensor.dtype), *tensor.shape, version, zlib.crc32(some.numpy().data)]


def refilled(was: Any, value: Any) -> bool:
    """Whether a value has been put into what was there, which others may hold as well."""
    if type(was) is type(value) and isinstance(was, list | deque | dict | set):
        was.clear()
        was.update(value) if isinstance(was, dict | set) else was.extend(value)
        return True
    fits = isinstance(was, Tensor | np.ndarray) and isinstance(value, Tensor | np.ndarray)
    if fits and (was.shape, was.dtype) == (value.shape, value.dtype):
        was[...] = value
        return True
    return False


def value_of(content: Any) -> Any:
    """The value that had this content."""
    if isinstance(content, list):
        return [value_of(part) for part in content]
    if not isinstance(content, dict):
        return content
    match content:
        case {"$same": inner}:
            return value_of(inner)
        case {"$on": device, "of": tensor, **layout}:  # nothing more in checkpoints of before 2026-12-01
            if strides := layout.get("strides"):
                tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
            is_there = device == "cpu" or torch.get_device_module(device).is_available()
            return (tensor.to(device) if is_there else tensor).requires_grad_(layout.get("grad", False))
        case {"$array": tensor}:
            return tensor.numpy()
        case {"$scalar": [kind, number]}:
            return np.dtype(kind).type(number)
        case {"$items": items}:
            return {value_of(key): value_of(part) for key, part in items}
        case {"$deque": inner, "most": most}:
            return deque(value_of(inner), most)
    for kind, inner in content.items():
        if kind[1:] in CONTAINERS and kind[0] == "$":
            return CONTAINERS[kind[1:]](value_of(inner))
    return {key: value_of(part) for key, part in content.items()}
