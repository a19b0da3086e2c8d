"""Quantize a float model layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from smolstack.backends.cpu.linear import pack
from smolstack.backends.cpu.packed_weights import Arena, packed_size
from smolstack.config.quantization import Format, Quantization, format_of, name_of
from smolstack.errors import ConfigError
from smolstack.model.quantized import QuantizedLinear, compute_in_float32, pack_words
from smolstack.model.vlm import VisionLanguageModel
from smolstack.native import library as native
from smolstack.quantization import smoothing
from smolstack.quantization.calibration import (
    Inputs,
    drawn_tile,
    drawn_tokens,
    multiplied_where_stored,
    observed,
)
from smolstack.quantization.gptq import round_fitted
from smolstack.quantization.rounding import (
    Factors,
    Rounding,
    kernels_for,
    rounded_and_packed,
    rounded_words,
)

Progress = Callable[[str, int, int], None]  # step, steps done, total
_ROWS_AT_ONCE = 4096
_COMPARED = 512  # rows used to measure a layer's error
# Parts that share the inputs of another part.
_SHARED = {"attention.key": "attention.query", "attention.value": "attention.query", "up": "gate"}


class BlockStore(Protocol):
    """Stores each finished block, so that an interruption loses at most one.

    The blocks are every layer of both towers, "connector" and "head", each with the norms that
    change with it.
    """

    def get(self, block: str) -> Mapping[str, Tensor] | None:
        """Return the tensors that an earlier run stored for a block, by their names in the
        model.
        """

    def put(self, block: str, tensors: Mapping[str, Tensor], error: float) -> None:
        """Store a block with the error of its output.

        The error is relative to what a layer adds to the states (for the connector and the head, to
        the whole output).
        """


def formats_of(model: VisionLanguageModel, scheme: str) -> dict[str, Format]:
    """The format of every layer that a scheme quantizes, by name."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "head" and model.config.embedding_dim is not None:
            continue  # a retrieval head is small, and its outputs are compared by angle
        form = format_of(name, module.in_features, scheme)
        if form is not None:
            found[name] = form
    return found


@torch.no_grad()
def quantize_model(
    model: VisionLanguageModel,
    scheme: str | Mapping[str, Format],
    *,
    tiles: Sequence[Tensor] = (),
    embeddings: Sequence[Tensor] = (),
    fitted: bool = False,
    keeper: BlockStore | None = None,
    progress: Progress | None = None,
) -> VisionLanguageModel:
    """Quantize a float model in place, and return it.

    A tied head becomes a separate layer (the embedding table that it shared is unchanged); a
    retrieval head is not quantized. Layers that are not quantized compute in float32.

    Args:
        model: its float weights are released layer by layer.
        scheme: "int8", "int4", or the format of every layer.
        tiles: calibration tiles for the vision tower, each (N, 3, P, P); none: a synthetic one.
        embeddings: calibration input of the decoder, each (1, T, D), text and visual tokens merged;
            none: random tokens.
        fitted: choose the 4-bit weights by GPTQ, fitted to the embeddings; worthwhile for a few
            thousand tokens or more.
        keeper: stores every block; blocks that it already has are reused.
        progress: called for every layer.

    Raises:
        ConfigError: the model is quantized already, or the scheme is unknown.
    """
    if model.scheme is not None:
        raise ConfigError(
            f"the model is already quantized ({model.scheme}), expected float weights"
        )
    if model.head is None and (isinstance(scheme, str) or "head" in scheme):
        weight = model.decoder.embedding.weight
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        model.head.weight = nn.Parameter(weight, requires_grad=False)
    formats = formats_of(model, scheme) if isinstance(scheme, str) else dict(scheme)
    widths = {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    work = _Work(model, formats, progress, keeper, fitted=fitted)
    if formats:
        work.vision(tiles or [drawn_tile(model.config.vision.patch_size, model.config.vision.side)])
    if any(not name.startswith(("vision.", "connector.")) for name in formats):
        work.decoder(embeddings or [_drawn_embeddings(model)])
    name = scheme if isinstance(scheme, str) else name_of(formats, widths)
    tied = model.config.tied and model.head is None
    model.config = replace(model.config, tied=tied, quantization=Quantization(name, formats))
    compute_in_float32(model)
    return model.eval()


def _drawn_embeddings(model: VisionLanguageModel) -> Tensor:
    config = model.config
    tokens = drawn_tokens(config.text.vocab_size, [config.image_token_id], config.text.bos_token_id)
    found: Tensor = model.decoder.embedding(tokens.to(model.device)).float()
    return found


class _Work:
    """State of one model's quantization."""

    def __init__(
        self,
        model: VisionLanguageModel,
        formats: Mapping[str, Format],
        progress: Progress | None,
        keeper: BlockStore | None = None,
        *,
        fitted: bool = False,
    ) -> None:
        self.model, self.formats, self.progress = model, formats, progress
        self.keeper, self.fitted = keeper, fitted
        self.kernels = native.library() if model.device.type == "cpu" else None
        self.done = 0
        self.count = len(model.vision.layers) + len(model.decoder.layers) + 2
        self._arenas: dict[str, Arena] = {}

    def _arena(self, kernels: native.Library, layer: str) -> Arena:
        """The memory of a tower's quantized layers, one block per tower."""
        part = layer.partition(".")[0]
        towers = {"connector": "connector", "vision": "vision"}
        tower = towers.get(part, "decoder")
        if tower not in self._arenas:
            size = 0
            for name, form in self.formats.items():
                if towers.get(name.partition(".")[0], "decoder") == tower:
                    one = self.model.get_submodule(name)
                    assert isinstance(one, (nn.Linear, QuantizedLinear))
                    size += packed_size(kernels, form, one.in_features, one.out_features)
            self._arenas[tower] = Arena(kernels, size)
        return self._arenas[tower]

    def vision(self, tiles: Sequence[Tensor]) -> None:
        """Quantize the tower, and the connector, which reads its last norm's output."""
        tower, config = self.model.vision, self.model.config.vision
        dtype = tower.patch_embedding.weight.dtype
        states = [tower.embed(some.to(self.model.device, dtype)).float() for some in tiles]
        for i, layer in enumerate(tower.layers):
            prefix = f"vision.layers.{i}"
            parts = {n: p for n, p in layer.named_modules() if isinstance(p, nn.Linear)}
            _norms_to_float(layer)
            first = states[0][:1]
            with multiplied_where_stored(parts, _rows(states)), observed(parts) as inputs:
                states = [layer(x, None) for x in states]
            if not self._restored(prefix):
                heads = config.num_heads, config.num_heads
                factors = smoothing.smooth_layer(layer, inputs, self._of(prefix, parts), *heads)
                self._round(prefix, parts, inputs, factors)
                added = states[0][:1] - first
                self._keep(prefix, lambda: layer(first, None) - first, added)  # noqa: B023
            self._told(prefix)
        self._connector(states, tower.grid_of(tiles[0]))

    def _connector(self, states: Sequence[Tensor], grid: tuple[int, int]) -> None:
        tower, connector = self.model.vision, self.model.connector
        form = self.formats.get("connector.proj")
        tower.norm.float()
        if form is not None and not self._restored("connector"):
            proj, scale = connector.proj, connector.scale
            width = self.model.config.vision.hidden_size
            own = Inputs.nothing(width)  # every patch of a block reads the norm's channels
            for x in states:
                own.add(tower.norm(x))
            with multiplied_where_stored({"proj": proj}, _rows(states)):
                before = connector(tower.norm(states[0][:1]), grid)
            s = smoothing.factors(own, [proj.weight.view(-1, width)], form.bits)
            smoothing.divide_norm(tower.norm, s)
            own.divide(s)
            factors = Factors(inputs=s.repeat(scale**2))
            own.largest, own.square = own.largest.repeat(scale**2), own.square.repeat(scale**2)
            self._round("connector", {"proj": proj}, {"proj": own}, {"proj": factors})
            after = lambda: connector(tower.norm(states[0][:1]), grid)  # noqa: E731
            self._keep("connector", after, before, "vision.norm")
        self._told("connector")

    def decoder(self, embeddings: Sequence[Tensor]) -> None:
        """Quantize the decoder's layers, then its head."""
        decoder, config = self.model.decoder, self.model.config.text
        states = [some.float() for some in embeddings]

        def run(layer: nn.Module, x: Tensor) -> Tensor:
            found: Tensor = layer(x, *decoder.angles(0, x.shape[1], None, x), None, None)
            return found

        for i, layer in enumerate(decoder.layers):
            prefix = f"decoder.layers.{i}"
            parts = {n: p for n, p in layer.named_modules() if isinstance(p, nn.Linear)}
            _norms_to_float(layer)
            fitted = self._of(prefix, parts).items() if self.fitted else ()
            products = [_SHARED.get(name, name) for name, form in fitted if form.bits == 4]
            first = states[0][:, :_COMPARED]
            stored = multiplied_where_stored(parts, _rows(states))
            with stored, observed(parts, products) as inputs:
                states = [run(layer, x) for x in states]
            if not self._restored(prefix):
                heads = config.num_heads, config.num_kv_heads
                factors = smoothing.smooth_layer(layer, inputs, self._of(prefix, parts), *heads)
                self._round(prefix, parts, inputs, factors)
                added = states[0][:, :_COMPARED] - first
                self._keep(prefix, lambda: run(layer, first) - first, added)  # noqa: B023
            self._told(prefix)
        decoder.norm.float()
        self._head(states)
        self._told("head")

    def _head(self, states: Sequence[Tensor]) -> None:
        norm, head = self.model.decoder.norm, self.model.head
        form = self.formats.get("head")
        if form is None or not isinstance(head, nn.Linear) or self._restored("head"):
            return
        products = self.fitted and form.bits == 4
        read = Inputs.nothing(self.model.config.text.hidden_size, products=products)
        for x in states:
            read.add(norm(x))
        some = norm(states[0][:, :_COMPARED])
        before = None if self.keeper is None else head(some.to(head.weight.dtype)).float()
        s = smoothing.factors(read, [head.weight], form.bits)
        smoothing.divide_norm(norm, s)
        read.divide(s)
        self._round("head", {"": head}, {"": read}, {"": Factors(inputs=s)})
        if before is not None:
            self._keep("head", lambda: self.model.logits(some / s), before, "decoder.norm")

    def _of(self, prefix: str, parts: Mapping[str, nn.Module]) -> dict[str, Format]:
        """The formats of a block's parts, by their names in the block."""
        names = {name: f"{prefix}.{name}" if name else prefix for name in parts}
        return {n: self.formats[full] for n, full in names.items() if full in self.formats}

    def _round(
        self,
        prefix: str,
        parts: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        factors: Mapping[str, Factors],
    ) -> None:
        """Replace float layers by quantized ones."""
        for name, form in self._of(prefix, parts).items():
            full = f"{prefix}.{name}" if name else prefix
            shared = inputs.get(_SHARED.get(name, name), inputs[name])
            products = shared.products if form.bits == 4 else None
            importance = inputs[name].rms.square()
            importance = importance + importance.mean() * 1e-3  # gives every channel some weight
            args = full, parts[name], form, factors[name]
            if products is None:
                made = self._to_nearest(*args, importance)
            else:
                made = self._to_fit(*args, products)
            _replace(self.model, full, made)

    def _to_nearest(
        self, name: str, layer: nn.Linear, form: Format, factors: Factors, importance: Tensor
    ) -> QuantizedLinear:
        weight, kernels = layer.weight.detach(), kernels_for(layer.weight)
        bias = None if layer.bias is None else factors.bias(layer.bias.detach())
        if kernels is None:
            rounded = rounded_words(weight, form, importance, factors)
            return QuantizedLinear.of_words(form, layer.in_features, rounded, bias)
        work = Rounding(weight, form, importance, factors)
        packed = rounded_and_packed(kernels, work, self._arena(kernels, name))
        kernels.release_pages(weight.data_ptr(), weight.nbytes)  # pages of a mapped file
        return QuantizedLinear.of_packed(packed, bias)

    def _to_fit(
        self, name: str, layer: nn.Linear, form: Format, factors: Factors, products: Tensor
    ) -> QuantizedLinear:
        weight, parts = layer.weight.detach(), []
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE):  # avoids holding the head as floats
            end = min(start + _ROWS_AT_ONCE, weight.shape[0])
            some = factors.rows(start, end).of(weight[start:end])
            numbers, scale, zeros = round_fitted(some, form, products)
            parts.append((pack_words(numbers, form.bits), scale, zeros))
        words, scale, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        bias = None if layer.bias is None else factors.bias(layer.bias.detach())
        made = QuantizedLinear.of_words(form, layer.in_features, (words, scale, zeros), bias)
        if self.kernels is not None:
            pack(self.kernels, made, self._arena(self.kernels, name))
        return made

    def _restored(self, block: str) -> bool:
        """Whether a block of an earlier run was restored."""
        found = None if self.keeper is None else self.keeper.get(block)
        if found is None:
            return False
        for name, form in self.formats.items():
            if f"{name}.".startswith(f"{block}."):
                layer = self.model.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                sizes = layer.in_features, layer.out_features
                with torch.device("meta"):
                    made = QuantizedLinear(*sizes, form, bias=layer.bias is not None)
                _replace(self.model, name, made)
        placed = {name: tensor.to(self.model.device) for name, tensor in found.items()}
        self.model.load_state_dict(placed, strict=False, assign=True)
        return True

    def _keep(self, block: str, after: Callable[[], Tensor], before: Tensor, *more: str) -> None:
        if self.keeper is None:
            return
        error = float((after() - before).norm() / before.norm().clamp(min=1e-30))
        starts = tuple(f"{prefix}." for prefix in (block, *more))
        state = self.model.state_dict().items()
        self.keeper.put(block, {n: t for n, t in state if n.startswith(starts)}, error)

    def _told(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(what, self.done, self.count)


def _rows(states: Sequence[Tensor]) -> int:
    """Maximum number of rows that a layer is given."""
    return sum(x.shape[0] * x.shape[1] for x in states)


def _norms_to_float(layer: nn.Module) -> None:
    """Convert everything but the linear parts of a layer to float32."""
    for part in layer.modules():
        if not isinstance(part, (nn.Linear, QuantizedLinear)):
            for name, parameter in part.named_parameters(recurse=False):
                made = nn.Parameter(parameter.detach().float(), requires_grad=False)
                setattr(part, name, made)


def _replace(model: VisionLanguageModel, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    if isinstance(layer, QuantizedLinear):
        layer.backend = model.backend
    setattr(model.get_submodule(parent), own, layer)
