"""Pickles read as data: tensors and plain containers are made, everything else stays inert.

A pickle is a program, so the one thing done with a name it mentions is to compare it with those listed here, and what
it makes is counted: time and memory stay within a multiple of its size.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .core.check import shown, whole


class Inert(dict):
    """Stands for any object of a pickle: keeps what it was made of and does nothing."""

    args: tuple[Any, ...]
    state: list[Any]
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key of a dictionary

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state = (args, kwargs), []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The arguments are not items."""

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)

    def extend(self, values: Sequence[Any]) -> None:
        self.state.extend(values)

    def append(self, value: Any) -> None:
        self.state.append(value)

    add = append


class _Budget:
    """What one file may make: each use of a thing named before costs it few bytes, and could cost the reader many."""

    def __init__(self, content: bytes) -> None:
        self.left = 16 * len(content) + 10**6

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError("it makes far more than its own size")


class _Reader(pickle._Unpickler):
    """Unpickler that makes tensors and plain containers. No name in the file is ever imported or called.

    The one in Python, each of whose instructions can be looked at before it runs; its memo is no longer than its file.

    Args:
        budget: of the whole file.
        storage: the bytes of a tensor storage, by its key, where the file keeps them beside the pickle.
        strict: refuse objects instead of standing inert ones in for them.
    """

    stack: list[Any]  # since the last mark
    metastack: list[list[Any]]  # below it

    def __init__(
        self, file: io.BytesIO, budget: _Budget, storage: Callable[[str], bytes] | None = None, strict: bool = False
    ) -> None:
        super().__init__(file)
        self.budget, self.storage, self.strict = budget, storage, strict
        self.storages: dict[str, Tensor] = {}
        self.classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILT:
            return _Rebuilder(_REBUILT[module, name], self.budget)
        if self.strict and not (module in ("torch", "collections") and name in {*_DTYPES, "OrderedDict"}):
            raise pickle.UnpicklingError(f"it holds an object, {module}.{name}, where numbers are expected")
        if (module, name) not in self.classes:
            self.budget.spend(1000)  # the memory of a class
            self.classes[module, name] = type(name, (Inert,), {})
        return self.classes[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: ("storage", type, key, device, number of elements, ...), however often it is referred to."""
        _, kind, key, _, size, *_ = pid
        dtype = _DTYPES[kind.__name__]
        if not self.storage:
            return _Pending(dtype, size)  # type: ignore[return-value]
        if not isinstance(key, str):
            raise pickle.UnpicklingError("the name of a storage is no text")
        if key not in self.storages:
            self.storages[key] = _values(self.storage(key), dtype, size, self.budget)
        return self.storages[key]


def _keys(items: list[Any]) -> None:
    """Hashing a tuple walks all of it, a thing as often as it is in it: a chain of pairs takes 2^n steps."""
    for key in items:
        todo = [key]
        for seen, node in enumerate(todo):
            if isinstance(node, (tuple, frozenset)):
                todo += islice(node, _LARGEST_KEY)
            if seen >= _LARGEST_KEY or (type(node) is int and node.bit_length() > 64):
                raise pickle.UnpicklingError("a key is larger than that of any table")


def _only(target: Any, *kinds: type) -> None:
    if not isinstance(target, kinds):
        raise pickle.UnpicklingError(f"it gives a {type(target).__name__} items or a state")


_LARGEST_KEY = 100

# What is looked at before an instruction.
_GUARDS: dict[bytes, Callable[[_Reader], Any]] = {
    pickle.SETITEM: lambda r: (_only(r.stack[-3], dict), _keys(r.stack[-2:-1])),
    pickle.SETITEMS: lambda r: (_only(r.metastack[-1][-1], dict), _keys(r.stack[::2])),
    pickle.DICT: lambda r: _keys(r.stack[::2]),
    pickle.ADDITEMS: lambda r: (_only(r.metastack[-1][-1], set, Inert), _keys(r.stack)),
    pickle.FROZENSET: lambda r: _keys(r.stack),
    pickle.APPEND: lambda r: _only(r.stack[-2], list, Inert),
    pickle.APPENDS: lambda r: _only(r.metastack[-1][-1], list, Inert),
    pickle.BUILD: lambda r: _only(r.stack[-2], Inert),
    pickle.REDUCE: lambda r: r.budget.spend(8 * len(r.stack[-1])),
    pickle.NEWOBJ: lambda r: r.budget.spend(8 * len(r.stack[-1])),
    pickle.NEWOBJ_EX: lambda r: r.budget.spend(8 * len(r.stack[-2]) + 100 * len(r.stack[-1])),
}
_REFUSED = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)


def _refuse(reader: Any) -> None:
    raise pickle.UnpicklingError("it uses an instruction that no table needs")


def _guarded(code: bytes) -> Callable[[Any], None]:
    plain = pickle._Unpickler.dispatch[code[0]]

    def run(reader: Any) -> None:
        _GUARDS[code](reader)
        plain(reader)

    return run


_Reader.dispatch = {
    **pickle._Unpickler.dispatch,
    **{code[0]: _guarded(code) for code in _GUARDS},
    **{code[0]: _refuse for code in _REFUSED},
}


class _Pending:
    """A storage whose values come later in the file."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.dtype, self.size = dtype, size


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _values(raw: bytes, dtype: torch.dtype, size: int, budget: _Budget) -> Tensor:
    whole("storage size", size, 0, len(raw) // dtype.itemsize)
    budget.spend(len(raw))
    return torch.frombuffer(bytearray(raw), dtype=dtype, count=size) if size else torch.zeros(0, dtype=dtype)


def _storage(budget: _Budget, content: bytes) -> Tensor:
    """A storage saved inside a pickle: magic number, version, platform, storage, keys, size (8 bytes), values."""
    budget.spend(len(content))
    file = io.BytesIO(content)
    parts = [_Reader(file, budget, strict=True).load() for _ in range(5)]
    pending = parts[3]
    if not isinstance(pending, _Pending):
        raise pickle.UnpicklingError("a tensor storage holds something else")
    return _values(file.read()[8:], pending.dtype, pending.size, budget)


def _tensor(
    _: _Budget, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *__: Any
) -> Tensor:
    numbers = (offset, *size, *stride)
    if len(numbers) > 20 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shown(size)} and strides {shown(stride)}")
    if not isinstance(storage, Tensor) or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {shown(size)} does not fit its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(_: _Budget, data: Tensor, *__: Any) -> Tensor:
    return data


def _bytes(budget: _Budget, text: str, *_: Any) -> bytes:
    """Pickle protocols before 3 write bytes as latin-1 text."""
    budget.spend(len(text))
    return text.encode("latin1")


class _Rebuilder:
    """One of the functions above; a pickle can call it, but not write to it."""

    __slots__ = ("_budget", "_function")

    def __init__(self, function: Callable[..., Any], budget: _Budget) -> None:
        self._function, self._budget = function, budget

    def __call__(self, *args: Any) -> Any:
        return self._function(self._budget, *args)


_REBUILT: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("_codecs", "encode"): _bytes,
}


def read_pickle(content: bytes) -> Any:
    """A ``torch.save`` archive (plain values and tensors only) or a bare pickle (objects become inert)."""
    file, budget = io.BytesIO(content), _Budget(content)
    if not zipfile.is_zipfile(file):
        return _Reader(io.BytesIO(content), budget).load()
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(content):
            raise pickle.UnpicklingError("it would be larger unpacked, and torch.save does not compress")
        (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        folder = name.removesuffix("data.pkl") + "data/"
        pickled = io.BytesIO(archive.read(name))
        return _Reader(pickled, budget, lambda key: archive.read(folder + key), strict=True).load()
