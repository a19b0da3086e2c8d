"""Number formats of GGUF files, and the dequantization of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smolstack.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Float formats, by their names in safetensors.
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True)
class Kind:
    """A number format: ``block`` numbers are stored together in ``bytes`` bytes.

    Attributes:
        name: llama.cpp's name, e.g. "Q4_1".
        code: the number that identifies it in files.
    """

    name: str
    code: int
    block: int
    bytes: int

    @property
    def dtype(self) -> str:
        """The dtype of :func:`to_floats`' result, as named in safetensors."""
        return FLOATS.get(self.name, "F32")


def gguf_package() -> Any:
    """Import the package gguf.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "GGUF files need the package gguf (pip install 'smolstack[gguf]')"
        ) from None
    return gguf


@cache
def _kind(code: int) -> Kind | None:
    package = gguf_package()
    try:
        found = package.GGMLQuantizationType(code)
        block, size = package.GGML_QUANT_SIZES[found]
        if found.name not in FLOATS:
            package.quants.dequantize(np.zeros((1, size), np.uint8), found)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return Kind(found.name, code, block, size)


def kind_of(code: int, who: str) -> Kind:
    """Return the number format of a code.

    Raises:
        CheckpointError: the code is unknown, or the format cannot be dequantized.
    """
    kind = _kind(code)
    if kind is None:
        raise CheckpointError(f"{who} in number format {code}, which is not supported")
    return kind


def to_floats(rows: npt.NDArray[np.uint8], kind: Kind) -> Tensor:
    """Convert rows of blocks to floats: (rows, bytes per row) → (rows, values per row).

    Float formats stay memory-mapped and keep their dtype; quantized blocks become float32.
    """
    import torch

    if kind.name == "F32":
        return torch.from_numpy(rows.view(np.float32))
    if kind.name == "F16":
        return torch.from_numpy(rows.view(np.float16))
    if kind.name == "BF16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    package = gguf_package()
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be NaN
        floats = package.quants.dequantize(
            np.ascontiguousarray(rows), package.GGMLQuantizationType(kind.code)
        )
    return torch.from_numpy(np.ascontiguousarray(floats, dtype=np.float32))
