"""Reads GGUF files: metadata and tensors by name. Every count and offset is checked before use.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here
because the reader of the package ``gguf`` trusts the counts in a file. The package provides the
list of number formats and dequantizes their blocks (gguf_blocks.py).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolstack.checkpoint.gguf_blocks import Kind, kind_of
from smolstack.errors import CheckpointError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MAX_DIMENSIONS, MAX_NESTING = 4, 4
# struct format characters by type code.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` with the slowest axis first; ``offset`` in bytes from the start of the
    file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file; tensors are memory-mapped on demand."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def rows(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, memory-mapped: (rows, bytes per row)."""
        data = np.memmap(self.path, np.uint8, "c", offset=0)
        count = 1
        for length in tensor.shape[:-1]:
            count *= length
        return data[tensor.offset : tensor.offset + tensor.bytes].reshape(count, -1)

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Return a metadata value, after checking its type.

        Raises:
            CheckpointError: the key is missing and there is no default, or the value has another
                type.
        """
        found = self.metadata.get(key, default)
        if found is ...:
            raise CheckpointError(f"{self.path} has no {key}")
        if key in self.metadata and (
            not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool)
        ):
            raise CheckpointError(
                f"{self.path} has {key} {found!r:.60}, which is not a valid value"
            )
        return found


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header.

    Raises:
        CheckpointError: the package gguf is not installed; the file is not a GGUF file, is
            truncated, or its header is inconsistent.
    """
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF file")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        return _Cursor(path, mapped).file()


class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def file(self) -> GgufFile:
        magic = self.take(4, "its first bytes")
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} begins with {magic!r}, expected {MAGIC!r}")
        version = self.number("I", "version")
        if version not in VERSIONS:
            swapped = version in [int.from_bytes(v.to_bytes(4, "big"), "little") for v in VERSIONS]
            found = "big-endian" if swapped else f"of version {version}"
            raise CheckpointError(
                f"{self.path} is {found}, expected a little-endian GGUF file of version 2 or 3"
            )
        tensors = self.count(self.number("Q", "tensor count"), 24, "tensors")
        pairs = self.count(self.number("Q", "metadata count"), 13, "metadata values")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{self.path} has {key} twice")
            metadata[key] = self.read(self.number("I", key), key, 0)
        infos = [self.info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path} has general.alignment {alignment!r:.40}, expected a power of two of "
                "at least 8"
            )
        start = -(-self.at // alignment) * alignment
        held: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in held:
                raise CheckpointError(f"{self.path} has the tensor {name} twice")
            held[name] = self.tensor(name, shape, kind, start + offset, alignment)
        return GgufFile(self.path, metadata, held)

    def tensor(
        self, name: str, shape: tuple[int, ...], kind: Kind, offset: int, alignment: int
    ) -> GgufTensor:
        """Return a tensor, after checking that its bytes lie within the file."""
        count = 1
        for length in shape:
            count *= length
        if count < 1 or shape[-1] % kind.block:
            raise CheckpointError(
                f"{self.path} has the tensor {name} as {list(shape)} in {kind.name}, expected "
                f"lengths of at least 1 and rows of whole blocks of {kind.block}"
            )
        size = count // kind.block * kind.bytes
        if offset % alignment or offset + size > self.end:
            raise CheckpointError(
                f"{self.path} has the tensor {name} at {offset} with {size} bytes, the file ends "
                f"at {self.end} and tensors begin at multiples of {alignment}"
            )
        return GgufTensor(name, shape, kind, offset, size)

    def info(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """Read the name, shape, number format and offset of a tensor."""
        name = self.string("a tensor's name")
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path} has the tensor {name} with {dimensions} dimensions, expected 1 to "
                f"{MAX_DIMENSIONS}"
            )
        lengths = [self.number("Q", name) for _ in range(dimensions)]
        kind = kind_of(self.number("I", name), f"{self.path} has the tensor {name}")
        return name, tuple(reversed(lengths)), kind, self.number("Q", name)

    def read(self, code: int, key: str, depth: int) -> Any:
        """Read a metadata value of the given type code."""
        if code in _NUMBERS:
            return self.number(_NUMBERS[code], key)
        if code == _BOOL:
            return self.take(1, key) != b"\0"
        if code == _STRING:
            return self.string(key)
        if code != _ARRAY or depth == MAX_NESTING:
            raise CheckpointError(f"{self.path} has {key} of type {code}, which is not a GGUF type")
        inner, length = self.number("I", key), self.number("Q", key)
        if inner in _NUMBERS:
            letter = _NUMBERS[inner]
            size = struct.calcsize(f"<{letter}")
            taken = self.take(self.count(length, size, key) * size, key)
            return list(struct.unpack(f"<{length}{letter}", taken))
        self.count(length, 8 if inner == _STRING else 1, key)
        return [self.read(inner, key, depth + 1) for _ in range(length)]

    def count(self, count: int, size: int, what: str) -> int:
        """Check that ``count`` items of at least ``size`` bytes fit into the rest of the file."""
        if count > (self.end - self.at) // size:
            raise CheckpointError(
                f"{self.path} declares {count} {what}, more than its {self.end} bytes can contain"
            )
        return count

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8: {error}") from error

    def take(self, length: int, what: str) -> bytes:
        if length > self.end - self.at:
            raise CheckpointError(
                f"{self.path} ends at {self.end}, within {what}, which has {length} bytes from "
                f"{self.at} on"
            )
        self.at += length
        return self.data[self.at - length : self.at]
