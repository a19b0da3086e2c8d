"""Quantized weights in the layout of the compiled kernels, and the memory that holds them.

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smolstack.config.quantization import Format
from smolstack.native import library as native

LINE = 64  # bytes; layers are aligned to it
_PANEL = 16  # output channels per panel


class Arena:
    """One block of memory for the weights of many layers, allocated in order.

    Decoding reads all of a decoder's weights once per token. In one block, in the order in which
    they are read, the system can back them with large pages.

    Args:
        size: bytes, for layers whose sizes are whole lines.
        file: created with the arena's size and mapped. None: anonymous memory.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """

    def __init__(self, kernels: native.Library, size: int, file: Path | None = None) -> None:
        if file is None:
            memory = torch.empty(size + LINE, dtype=torch.uint8)
            kernels.want_large_pages(memory.data_ptr(), size)
            first = -memory.data_ptr() % LINE
            self.memory = memory[first : first + size]
        else:
            reserve = getattr(os, "posix_fallocate", None)
            if reserve is None:
                raise OSError("this system cannot preallocate files")
            with file.open(
                "wb"
            ) as made:  # reserves the space: otherwise a full disk would cause SIGBUS
                reserve(made.fileno(), 0, max(size, 1))
            self.memory = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        self._used = 0

    @property
    def left(self) -> int:
        """Unallocated bytes."""
        return self.memory.shape[0] - self._used

    def take(self, size: int) -> Tensor:
        """Allocate the next ``size`` bytes, a whole number of lines."""
        assert size % LINE == 0, size
        assert size <= self.left, (size, self.left)
        self._used += size
        return self.memory[self._used - size : self._used]


def whole_lines(size: int) -> int:
    """Round bytes up to whole lines."""
    return -(-size // LINE) * LINE


def kind_of(form: Format) -> int:
    """The kernels' identifier of a weight format."""
    return native.INT8 if form.bits == 8 else native.INT4


def packed_size(kernels: native.Library, form: Format, inputs: int, outputs: int) -> int:
    """Bytes of a packed layer: panels, scales and zero points, rounded up to whole lines."""
    size = int(kernels.panel_bytes(kind_of(form), inputs, outputs))
    channels, groups = -(-outputs // _PANEL) * _PANEL, form.groups(inputs)
    size += channels * groups * 2
    if form.has_zero_points:
        size += channels * groups // 2
    return whole_lines(size)


@dataclass
class PackedWeights:
    """A weight in panels of 16 output channels, followed by its scales and zero points.

    Attributes:
        memory: :func:`packed_size` bytes, uint8.
    """

    kernels: native.Library
    format: Format
    inputs: int
    outputs: int
    memory: Tensor

    @classmethod
    def of_words(
        cls,
        kernels: native.Library,
        form: Format,
        inputs: int,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        memory: Tensor,
    ) -> PackedWeights:
        """Pack a layer's words (O, words), scales (O, G) and packed zero points."""
        words, scale, zeros = tensors[0].contiguous(), tensors[1].contiguous(), tensors[2]
        made = cls(kernels, form, inputs, words.shape[0], memory)
        into = made.linear(None)
        sizes = kind_of(form), words.data_ptr(), words.shape[1] * 4, inputs, made.outputs
        kernels.pack_panels(*sizes, into.weight, torch.get_num_threads())
        groups = form.groups(inputs)
        kernels.pack_scales(scale.data_ptr(), groups, made.outputs, into.scale)
        if zeros is not None:
            zeros = zeros.contiguous()
            kernels.pack_zeros(zeros.data_ptr(), groups, made.outputs, into.zeros)
        return made

    def words(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unpack to the arguments of :meth:`of_words`."""
        form, groups = self.format, self.format.groups(self.inputs)
        words = torch.empty(self.outputs, -(-self.inputs * form.bits // 32), dtype=torch.int32)
        sizes = self.inputs, self.outputs
        size = int(self.kernels.panel_bytes(kind_of(form), *sizes))
        at = kind_of(form), self.memory.data_ptr(), *sizes
        row_bytes = words.shape[1] * 4
        self.kernels.unpack_panels(*at, words.data_ptr(), row_bytes, torch.get_num_threads())
        count = -(-self.outputs // _PANEL) * groups
        scales = self.memory[size : size + count * _PANEL * 2].view(torch.bfloat16)
        scale = scales.view(-1, groups, _PANEL).transpose(1, 2).reshape(-1, groups)
        scale = scale[: self.outputs].contiguous()
        if not form.has_zero_points:
            return words, scale, None
        halves = self.memory[size + count * _PANEL * 2 :][: count * 8].view(-1, groups, 8)
        zeros = torch.cat((halves & 15, halves >> 4), dim=2)  # (O / 16, G, 16)
        bytes_of = zeros.view(-1, groups, 8, 2)
        packed = (bytes_of[..., 0] | bytes_of[..., 1] << 4).reshape(-1, groups, 2, 4)
        zero_words = packed.contiguous().view(torch.int32).squeeze(-1)  # (O / 16, G, 2)
        zero_words = zero_words.transpose(1, 2).reshape(-1, groups)
        return words, scale, zero_words[: -(-self.outputs // 8)].contiguous()

    def linear(self, bias: int | None) -> native.Linear:
        """The layer in the form the kernels read, with its bias at an address."""
        made = native.Linear(kind_of(self.format), self.inputs, self.outputs)
        made.group, made.fine = self.format.group, int(self.format.activation_bits == 16)
        made.weight = self.memory.data_ptr()
        made.scale = made.weight + int(
            self.kernels.panel_bytes(made.kind, self.inputs, self.outputs)
        )
        if self.format.has_zero_points:
            channels = -(-self.outputs // _PANEL) * _PANEL
            made.zeros = made.scale + channels * self.format.groups(self.inputs) * 2
        made.bias = bias
        return made
