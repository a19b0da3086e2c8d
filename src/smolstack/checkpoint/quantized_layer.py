"""One layer of integers in a checkpoint's files, and its form in memory.

Its tensors are weight_packed (or weight, of bytes), weight_scale, weight_zero_point and
weight_shape, as compressed-tensors names them. If a :class:`Format` can hold the layer, the result
is the tensors of a QuantizedLinear, otherwise a float weight.

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smolstack.checkpoint.schemes import Scheme
from smolstack.checkpoint.weights import Entry
from smolstack.config.quantization import Format
from smolstack.errors import CheckpointError
from smolstack.model.quantized import pack_words, unpack_words

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


@dataclass(frozen=True)
class StoredLayer:
    """The integers of one layer.

    Attributes:
        name: name in the files, without the tensors' suffixes.
        outputs, inputs: O and I.
        scheme: how it is stored.
        format: how it is computed; None: as floats.
        tensors: its tensors in the files by suffix, e.g. "weight_packed".
        decoded: why it is dequantized; empty if it is not, or if the caller requested it.
    """

    name: str
    outputs: int
    inputs: int
    scheme: Scheme
    format: Format | None
    tensors: Mapping[str, Entry]
    decoded: str = ""

    @property
    def label(self) -> str:
        """Name of the number format for messages."""
        return f"int{self.scheme.bits}"

    def entries(self) -> dict[str, Entry]:
        """Return the entries of the layer in memory."""
        file, size = self.tensors[SCALE].file, self.outputs * self.inputs
        form = self.format
        if form is None:
            whole = (self.outputs, self.inputs)
            kept = Entry(file, whole, self.tensors[SCALE].dtype, self.label)
            return {f"{self.name}.weight": kept}
        words, groups = -(-self.inputs * form.bits // 32), form.groups(self.inputs)
        found = {
            PACKED: Entry(file, (self.outputs, words), "I32", self.label, form, size),
            SCALE: Entry(file, (self.outputs, groups), "BF16", self.label, parameters=0),
        }
        if form.has_zero_points:
            rows = -(-self.outputs // 8)
            found[ZERO] = Entry(file, (rows, groups), "I32", self.label, parameters=0)
        return {f"{self.name}.{end}": entry for end, entry in found.items()}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of the files, by suffix, to the tensors of :meth:`entries`.

        Raises:
            CheckpointError: weight_shape does not match the layer, or integers are out of range.
        """
        shape = [self.outputs, self.inputs]
        if SHAPE in tensors and tensors[SHAPE].tolist() != shape:
            raise CheckpointError(
                f"{self.name}.{SHAPE} is {tensors[SHAPE].tolist()}, expected {shape}"
            )
        if PACKED not in tensors:
            self._check_range(tensors["weight"])
        if self.format is None:
            floats = self.floats(tensors).to(tensors[SCALE].dtype)
            return {f"{self.name}.weight": floats}
        packed = tensors.get(PACKED)
        if packed is None:
            packed = pack_words(tensors["weight"].short() + self._middle, self.scheme.bits)
        scale = tensors[SCALE].reshape(self._rows(tensors[SCALE]))
        found = {PACKED: packed, SCALE: self._regrouped(scale).to(torch.bfloat16)}
        if self.format.has_zero_points:
            found[ZERO] = self._zero_points(tensors.get(ZERO))
        return {f"{self.name}.{end}": tensor for end, tensor in found.items()}

    def floats(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the dequantized weight, (O, I), float32."""
        if PACKED in tensors:
            words = unpack_words(tensors[PACKED], self.scheme.bits, self.inputs)
            numbers = words.float() - self._middle
        else:
            numbers = tensors["weight"].float()
        scale = tensors[SCALE].reshape(self._rows(tensors[SCALE])).float()
        zero = tensors.get(ZERO)
        if zero is not None:
            if zero.dtype == torch.int32:
                words = unpack_words(zero.t(), self.scheme.bits, self.outputs).t()
                zero = words.float() - self._middle
            numbers = numbers - self._spread(zero.reshape(self._rows(zero)).float())
        return numbers * self._spread(scale)

    @property
    def _middle(self) -> int:
        return 1 << (self.scheme.bits - 1)

    def _rows(self, of_groups: Tensor) -> tuple[int, int]:
        """(O, G), or (1, 1) for a tensor with a single scale."""
        return (1, 1) if self.scheme.whole else (self.outputs, of_groups.numel() // self.outputs)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """(O, G) → (O, I), or a shape that broadcasts to it."""
        group = self.scheme.group
        if group is None:
            return of_groups
        return of_groups.repeat_interleave(group, dim=1)[:, : self.inputs]

    def _regrouped(self, stored: Tensor) -> Tensor:
        """Convert columns per stored group to columns per computed group; one group size divides
        the other.
        """
        assert self.format is not None
        ours, theirs = self.format.group, self.scheme.group or self.inputs
        if stored.shape[0] == 1 and self.scheme.whole:
            stored = stored.expand(self.outputs, 1)
        if ours == theirs:
            return stored
        found = stored[:, torch.arange(self.format.groups(self.inputs)) * ours // theirs]
        if ours > theirs and stored.shape[1] > 1:
            again = found[:, torch.arange(stored.shape[1]) * theirs // ours]
            if not torch.equal(again, stored):
                raise CheckpointError(
                    f"{self.name} has scales or zero points that differ within groups of {ours} "
                    "input channels, expected the same in each, as config.json says"
                )
        return found.contiguous()

    def _check_range(self, numbers: Tensor) -> None:
        low, high = int(numbers.min()), int(numbers.max())
        if low < -self._middle or high >= self._middle:
            raise CheckpointError(
                f"{self.name}.weight has values from {low} to {high}, expected {-self._middle} to "
                f"{self._middle - 1}"
            )

    def _zero_points(self, stored: Tensor | None) -> Tensor:
        """(O/8 rounded up, G), packed."""
        assert self.format is not None
        if stored is not None and stored.dtype == torch.int32:
            return self._regrouped(stored)
        if stored is None:
            zeros = torch.full((self.outputs, self.format.groups(self.inputs)), 8)
        else:
            zeros = self._regrouped(stored.reshape(self._rows(stored)).short() + 8)
        return pack_words(zeros.t(), 4).t().contiguous()
