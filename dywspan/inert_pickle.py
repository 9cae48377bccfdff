"""Pickles read as data: tensors and plain containers are made, everything else stays inert.

A pickle is a program, so the one thing done with a name it mentions is to compare it with those listed here.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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


class _Reader(pickle.Unpickler):
    """Unpickler that makes tensors and plain containers. No name in the file is ever imported or called.

    Args:
        storage: the bytes of a tensor storage, by its key, where the file keeps them beside the pickle.
        strict: refuse objects instead of standing inert ones in for them.
    """

    def __init__(self, file: io.BytesIO, storage: Callable[[str], bytes] | None = None, strict: bool = False) -> None:
        start = file.tell()
        # The memo is as long as its largest index says: no honest pickle has one past its own length.
        length = len(file.getbuffer()) - start
        for code, index, _ in pickletools.genops(file):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(index or 0) > length:
                raise pickle.UnpicklingError(f"it remembers {index} things in {length} bytes")
        file.seek(start)
        super().__init__(file)
        self.storage, self.strict = storage, strict

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        if self.strict and not (module in ("torch", "collections") and name in {*_DTYPES, "OrderedDict"}):
            raise pickle.UnpicklingError(f"it holds an object, {module}.{name}, where numbers are expected")
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: ("storage", type, key, device, number of elements, ...)."""
        _, kind, key, _, size, *_ = pid
        dtype = _DTYPES[kind.__name__]
        return _values(self.storage(key), dtype, size) if self.storage else _Pending(dtype, size)  # type: ignore[return-value]


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


def _values(raw: bytes, dtype: torch.dtype, size: int) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype, count=size) if size else torch.zeros(0, dtype=dtype)


def _storage(content: bytes) -> Tensor:
    """A storage saved inside a pickle: magic number, version, platform, storage, keys, size (8 bytes), values."""
    file = io.BytesIO(content)
    parts = [_Reader(file, strict=True).load() for _ in range(5)]
    pending = parts[3]
    if not isinstance(pending, _Pending):
        raise pickle.UnpicklingError("a tensor storage holds something else")
    return _values(file.read()[8:], pending.dtype, pending.size)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Tensor) or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {size} does not fit its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _bytes(text: str, *_: Any) -> bytes:
    """Pickle protocols before 3 write bytes as latin-1 text."""
    return text.encode("latin1")


class _Rebuilder:
    """One of the functions above; a pickle can call it, but not write to it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a function")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives a function a state")


_REBUILT = {
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuilder(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Rebuilder(_parameter),
    ("torch.storage", "_load_from_bytes"): _Rebuilder(_storage),
    ("_codecs", "encode"): _Rebuilder(_bytes),
}


def read_pickle(content: bytes) -> Any:
    """A ``torch.save`` archive (plain values and tensors only) or a bare pickle (objects become inert)."""
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        return _Reader(io.BytesIO(content)).load()
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(content):
            raise pickle.UnpicklingError("it would be larger unpacked, and torch.save does not compress")
        (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        folder = name.removesuffix("data.pkl") + "data/"
        return _Reader(io.BytesIO(archive.read(name)), lambda key: archive.read(folder + key), strict=True).load()
