"""Layers that a checkpoint stores as integers: checked from headers alone, then read.

A layer's tensors are weight_packed (or weight, of bytes), weight_scale, weight_zero_point and
weight_shape, as compressed-tensors names them. What a :class:`Format` can hold comes out as the
tensors of a QuantisedLinear; the rest comes out as float weights, and the notes say why. After
that nobody has to know in which of the forms it was stored.

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint import keys
from smolstack.checkpoint.schemes import PACKED_FORM, Scheme, Schemes, read_schemes
from smolstack.checkpoint.stored import Stored
from smolstack.checkpoint.weights import FLOAT_TYPES, Entry
from smolstack.config import ModelConfig
from smolstack.config.quantization import Format, Quantization, format_of, name_of
from smolstack.errors import CheckpointError
from smolstack.model.quantised import pack_words, unpack_words
from smolstack.model.vlm import VisionLanguageModel

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
ORDER = "weight_g_idx"
_GROUPS = range(256, 0, -16)  # that are computed of others' layers, largest first
_OWN_GROUPS = range(16, 1025, 16)


@dataclass(frozen=True)
class StoredLayer:
    """One layer's integers.

    Attributes:
        name: in the files, without the tensors' own ends.
        outputs, inputs: O and I.
        scheme: how it is stored.
        format: how it is computed; None: as floats.
        tensors: its tensors in the files by their ends, e.g. "weight_packed".
        decoded: why it becomes floats; empty where it does not, or where that was asked for.
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
        """What people call its numbers."""
        return f"int{self.scheme.bits}"

    def entries(self) -> dict[str, Entry]:
        """What it is read as."""
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
        """The tensors of :meth:`entries`, of those in the files by their ends.

        Raises:
            CheckpointError: a weight_shape that is not the layer's, or integers out of range.
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
        """The weight that the integers stand for, (O, I), float32."""
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
        """(O, G), or (1, 1) of a tensor with one scale."""
        return (1, 1) if self.scheme.whole else (self.outputs, of_groups.numel() // self.outputs)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """(O, G) → (O, I), or what broadcasts to it."""
        group = self.scheme.group
        if group is None:
            return of_groups
        return of_groups.repeat_interleave(group, dim=1)[:, : self.inputs]

    def _regrouped(self, stored: Tensor) -> Tensor:
        """Columns of the stored groups → columns of the groups that are computed, which divide
        them, or which they divide."""
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
                f"{self.name}.weight holds {low} to {high}, expected {-self._middle} to "
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


def open_compressed(
    weights: Stored, raw: Mapping[str, Any], config: ModelConfig | None, *, floats: bool = False
) -> Stored:
    """The same weights, layers of integers as quantised layers or as floats.

    Args:
        weights: as they are in the files.
        raw: config.json.
        config: what it says of the model; None: it is read from ``raw``.
        floats: make floats of all of them.

    Raises:
        ConfigError: config.json says something that cannot be computed.
        CheckpointError: tensors of a layer that do not belong together.
    """
    schemes = read_schemes(raw)
    names = _names(weights.entries, schemes)
    if not names:
        return weights
    layers = _layers(names, weights.entries, schemes, config or ModelConfig.from_hf(raw))
    if floats:
        layers = {n: replace(one, format=None, decoded="") for n, one in layers.items()}
    held = {f"{name}.{end}" for name, layer in layers.items() for end in layer.tensors}
    entries = {name: entry for name, entry in weights.entries.items() if name not in held}
    plain = list(entries)
    made: dict[str, str] = {}
    for name, layer in layers.items():
        entries.update(layer.entries())
        made.update(dict.fromkeys(layer.entries(), name))

    def read(chosen: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        wanted = entries if chosen is None else chosen
        yield from weights.read([n for n in wanted if n not in made] if chosen else plain)
        for name in dict.fromkeys(made[n] for n in wanted if n in made):
            stored = weights.read([f"{name}.{end}" for end in layers[name].tensors])
            tensors = {full.rpartition(".")[2]: tensor for full, tensor in stored}
            for full, tensor in layers[name].read(tensors).items():
                if full in wanted:
                    yield full, tensor

    return Stored(weights.folder, entries, read, weights.notes, tuple(_losses(layers)))


def with_quantization(config: ModelConfig, entries: Mapping[str, Entry]) -> ModelConfig:
    """The config with the formats of the layers that ``entries`` hold as integers."""
    formats, widths = {}, {}
    for name, entry in entries.items():
        if entry.form is not None:
            ours = keys.from_hf(name).removesuffix(f".{PACKED}")
            formats[ours] = entry.form
            widths[ours] = entry.weights // entry.shape[0]
    found = Quantization(name_of(formats, widths), formats) if formats else None
    return replace(config, quantization=found)


def _names(entries: Mapping[str, Entry], schemes: Schemes) -> set[str]:
    """The layers that hold integers, or some of what stands beside them."""
    ends = tuple(f".{end}" for end in (PACKED, SCALE, ZERO, SHAPE, ORDER))
    return {
        name.rpartition(".")[0]
        for name, entry in entries.items()
        if name.endswith(ends)
        or (schemes.groups and name.endswith(".weight") and entry.dtype not in FLOAT_TYPES)
    }


def _layers(
    names: Collection[str], entries: Mapping[str, Entry], schemes: Schemes, config: ModelConfig
) -> dict[str, StoredLayer]:
    own_head = entries.get(f"{keys.EMBEDDING_HEAD}.{SCALE}")
    embedding = own_head.shape[0] if own_head is not None and own_head.shape else None
    plain = replace(config, quantization=None, tied=False, embedding_dim=embedding)
    with torch.device("meta"):
        modules = dict(VisionLanguageModel(plain).named_modules())
    layers: dict[str, StoredLayer] = {}
    problems: list[str] = []
    for name in sorted(names):
        try:
            layers[name] = _layer(name, entries, schemes, modules)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more layers)" if problems[1:] else ""
        raise CheckpointError(problems[0] + more)
    return layers


def _layer(
    name: str, entries: Mapping[str, Entry], schemes: Schemes, modules: Mapping[str, nn.Module]
) -> StoredLayer:
    ours = keys.from_hf(f"{name}.weight").removesuffix(".weight")
    module = modules.get(ours)
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise CheckpointError(f"{name} holds integers, expected those of a linear layer")
    scheme = schemes.of(name, "Linear" if isinstance(module, nn.Linear) else "Embedding")
    if scheme is None:
        raise CheckpointError(
            f"{name} holds integers, expected a config group of config.json's quantization_config "
            "that targets it"
        )
    outputs, inputs = module.weight.shape
    expected = _expected(scheme, outputs, inputs)
    _check(name, entries, expected)
    form, why = _format(scheme, ours, module)
    held = {end: entries[f"{name}.{end}"] for end in expected if f"{name}.{end}" in entries}
    return StoredLayer(name, outputs, inputs, scheme, form, held, why)


_Expected = tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]  # shapes and dtypes to choose from


def _expected(scheme: Scheme, outputs: int, inputs: int) -> dict[str, _Expected]:
    """The tensors of a layer by their ends."""
    groups = 1 if scheme.group is None else -(-inputs // scheme.group)
    rows = ((1,), (), (1, 1)) if scheme.whole else ((outputs, groups),)
    if groups == 1 and not scheme.whole:
        rows = (*rows, (outputs,))
    if scheme.form != PACKED_FORM:
        found: dict[str, _Expected] = {"weight": (((outputs, inputs),), ("I8",))}
        zeros: _Expected = (rows, ("I8",))
    else:
        words = -(-inputs * scheme.bits // 32)
        found = {PACKED: (((outputs, words),), ("I32",)), SHAPE: (((2,),), ("I64", "I32"))}
        zeros = (((-(-outputs * scheme.bits // 32), groups),), ("I32",))
        if scheme.whole:
            zeros = (rows, ("I8",))
    found[SCALE] = (rows, FLOAT_TYPES)
    if not scheme.symmetric:
        found[ZERO] = zeros
    return found


def _check(name: str, entries: Mapping[str, Entry], tensors: Mapping[str, _Expected]) -> None:
    for end, (shapes, dtypes) in tensors.items():
        entry = entries.get(f"{name}.{end}")
        if entry is None:
            if end == SHAPE:  # it says again what config.json says
                continue
            raise CheckpointError(f"{name} lacks {end}, expected {list(shapes[0])}")
        if entry.shape not in shapes:
            raise CheckpointError(
                f"{name}.{end} is {list(entry.shape)}, expected {list(shapes[0])}"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{name}.{end} is stored as {entry.dtype}, expected {' or '.join(dtypes)}"
            )
    others = {f"{name}.{end}" for end in ("weight", PACKED, SCALE, ZERO, SHAPE, ORDER)}
    extra = sorted((others & set(entries)) - {f"{name}.{end}" for end in tensors})
    if extra:
        raise CheckpointError(
            f"{extra[0]} stands beside the layer's integers, expected {', '.join(tensors)} alone"
        )


def _format(scheme: Scheme, ours: str, module: nn.Module) -> tuple[Format | None, str]:
    """The format that computes a layer as it is stored, or why none does."""
    bits, group = scheme.bits, scheme.group
    if not isinstance(module, nn.Linear) or (why := _unfit(scheme, module.in_features)):
        return None, why if isinstance(module, nn.Linear) else "a table of embeddings"
    # 4-bit weights are multiplied with activations of 8 bits, which lose little in small groups.
    most, activation_bits = (32, 8) if bits == 4 else (256, scheme.activation_bits)
    meant = scheme.computed or group
    if scheme.own and meant is not None and meant in _OWN_GROUPS:
        return Format(bits, meant, scheme.activation_bits), ""
    if group is None:
        known = format_of(ours, module.in_features, "int8")
        if activation_bits == 8 and bits == 8 and known is not None:
            most = known.group
        return Format(bits, most, activation_bits), ""
    size = next((size for size in _GROUPS if size <= most and group % size == 0), None)
    if size is None:
        return None, f"groups of {group} input channels, expected a multiple of 16"
    return Format(bits, size, activation_bits), ""


def _unfit(scheme: Scheme, inputs: int) -> str:
    """Why no format holds a layer's integers, whatever their groups; empty where one does."""
    if scheme.bits == 8 and not scheme.symmetric:
        return "8 bits with zero points"
    if scheme.bits == 4 and inputs % 8:
        return f"4 bits of {inputs} input channels, which 8 does not divide"
    if scheme.bits == 4 and scheme.whole and not scheme.symmetric:
        return "one zero point for the whole tensor"
    return ""


def _losses(layers: Mapping[str, StoredLayer]) -> Iterator[str]:
    """What does not stay as it is stored."""
    decoded: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.decoded:
            decoded.setdefault(layer.decoded, []).append(name)
    for why, names in decoded.items():
        yield f"{_layer_count(names)} held as float weights: {why}"
    rounded = [
        name
        for name, layer in layers.items()
        if layer.format is not None and layer.tensors[SCALE].dtype != "BF16"
    ]
    if rounded:
        yield f"{_layer_count(rounded)} held with scales rounded to bfloat16, by 0.2 % at most"


def _layer_count(names: list[str]) -> str:
    """ "3 layers (a, …) are"."""
    if len(names) == 1:
        return f"one layer ({names[0]}) is"
    return f"{len(names)} layers ({names[0]}, …) are"
