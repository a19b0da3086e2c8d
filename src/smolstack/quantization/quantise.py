"""A float model to integers, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.config.quantization import Format, Quantization, format_of, name_of
from smolstack.errors import ConfigError
from smolstack.model.quantised import QuantisedLinear
from smolstack.model.vlm import VisionLanguageModel
from smolstack.native import library as native
from smolstack.quantization import smoothing
from smolstack.quantization.calibration import Inputs, drawn_tile, drawn_tokens, observed
from smolstack.quantization.rounding import rounded_words

Progress = Callable[[str, int, int], None]  # what is done, of how many
_ROWS_AT_ONCE = 4096


def formats_of(model: VisionLanguageModel, scheme: str) -> dict[str, Format]:
    """The format of every layer that a scheme quantises, by name."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "head" and model.config.embedding_dim is not None:
            continue  # a head for retrieval is small, and what it puts out is compared by angle
        form = format_of(name, module.in_features, scheme)
        if form is not None:
            found[name] = form
    return found


@torch.no_grad()
def quantise(
    model: VisionLanguageModel,
    scheme: str | Mapping[str, Format],
    *,
    tiles: Sequence[Tensor] = (),
    embeddings: Sequence[Tensor] = (),
    progress: Progress | None = None,
) -> VisionLanguageModel:
    """Quantise a float model in place, and return it.

    A tied head becomes a layer of its own (the table that it shared stays as it is), a head for
    retrieval keeps its floats. What is not quantised computes in float32.

    Args:
        model: its float weights are let go layer by layer.
        scheme: "int8", "int4", or the format of every layer.
        tiles: to calibrate the vision tower on, each (N, 3, P, P); none: a drawn one.
        embeddings: to calibrate the decoder on, each (1, T, D), text and visual tokens merged;
            none: tokens at random.
        progress: is told of every layer.

    Raises:
        ConfigError: the model is quantised already, or the scheme is unknown.
    """
    if model.scheme is not None:
        raise ConfigError(f"the model is {model.scheme} already, quantising it again loses more")
    if model.head is None:
        weight = model.decoder.embedding.weight
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        model.head.weight = nn.Parameter(weight, requires_grad=False)
    formats = formats_of(model, scheme) if isinstance(scheme, str) else dict(scheme)
    widths = {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    work = _Work(model, formats, progress)
    if formats:
        work.vision(tiles or [drawn_tile(model.config.vision.patch_size, model.config.vision.side)])
        work.decoder(embeddings or [_drawn_embeddings(model)])
    name = scheme if isinstance(scheme, str) else name_of(formats, widths)
    tied = model.config.tied and model.head is None
    model.config = replace(model.config, tied=tied, quantization=Quantization(name, formats))
    return model.float().eval()


def _drawn_embeddings(model: VisionLanguageModel) -> Tensor:
    config = model.config
    tokens = drawn_tokens(config.text.vocab_size, [config.image_token_id], config.text.bos_token_id)
    found: Tensor = model.decoder.embedding(tokens.to(model.device)).float()
    return found


class _Work:
    """One model on its way to integers."""

    def __init__(
        self, model: VisionLanguageModel, formats: Mapping[str, Format], progress: Progress | None
    ) -> None:
        self.model, self.formats, self.progress = model, formats, progress
        self.kernels = native.library()
        self.done = 0
        self.count = len(model.vision.layers) + len(model.decoder.layers) + 2

    def vision(self, tiles: Sequence[Tensor]) -> None:
        """The tower, and the connector, which reads what its last norm puts out."""
        tower, connector = self.model.vision, self.model.connector
        dtype = tower.patch_embedding.weight.dtype
        states = [tower.embed(some.to(self.model.device, dtype)).float() for some in tiles]
        for i, layer in enumerate(tower.layers):
            prefix, parts = f"vision.layers.{i}.", _parts(layer)
            layer.float()
            with observed(parts) as inputs:
                states = [layer(x, None) for x in states]
            self._smooth_layer(layer, parts, inputs, prefix, self.model.config.vision.num_heads)
            self._round(prefix, parts, inputs)
        tower.norm.float()
        proj = connector.proj
        inputs = {"proj": Inputs.nothing(proj.in_features)}
        scale, width = connector.scale, self.model.config.vision.hidden_size
        for x in states:
            # Every patch of a block reads the same channels of the norm.
            inputs["proj"].add(tower.norm(x).repeat(1, 1, scale**2))
        if "connector.proj" in self.formats:
            blocks = proj.weight.view(-1, width)
            own = Inputs(
                inputs["proj"].largest[:width], inputs["proj"].square[:width], inputs["proj"].rows
            )
            s = smoothing.factors(own, [blocks], self.formats["connector.proj"].bits)
            smoothing.divide_norm(tower.norm, s)
            self._divided(inputs["proj"], s.repeat(scale**2))
            smoothing.multiply_inputs(proj, s.repeat(scale**2))
        self._round("connector.", {"proj": proj}, inputs)

    def decoder(self, embeddings: Sequence[Tensor]) -> None:
        """The decoder's layers, then its head."""
        decoder, head = self.model.decoder, self.model.head
        states = [some.float() for some in embeddings]
        config = self.model.config.text
        for i, layer in enumerate(decoder.layers):
            prefix, parts = f"decoder.layers.{i}.", _parts(layer)
            layer.float()
            with observed(parts) as inputs:
                states = [
                    layer(x, *decoder.angles(0, x.shape[1], None, x), None, None) for x in states
                ]
            self._smooth_layer(layer, parts, inputs, prefix, config.num_heads, config.num_kv_heads)
            self._round(prefix, parts, inputs)
        decoder.norm.float()
        if not isinstance(head, nn.Linear) or "head" not in self.formats:
            self._told("head")
            return
        read = Inputs.nothing(config.hidden_size)
        for x in states:
            read.add(decoder.norm(x))
        s = smoothing.factors(read, [head.weight], self.formats["head"].bits)
        smoothing.divide_norm(decoder.norm, s)
        self._divided(read, s)
        self._round("", {"head": head}, {"head": read}, times=s)

    def _smooth_layer(  # noqa: PLR0917
        self,
        layer: Any,
        parts: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        prefix: str,
        heads: int,
        kv_heads: int | None = None,
    ) -> None:
        """Between norms and what reads them, values and the output projection, up and down."""
        for norm, names in ((layer.attention_norm, _QKV), (layer.mlp_norm, ("gate", "up"))):
            readers = [name for name in names if name in parts]
            if any(prefix + name not in self.formats for name in readers):
                continue
            bits = min(self.formats[prefix + name].bits for name in readers)
            s = smoothing.factors(inputs[readers[0]], [parts[n].weight for n in readers], bits)
            smoothing.divide_norm(norm, s)
            for name in readers:
                smoothing.multiply_inputs(parts[name], s)
                self._divided(inputs[name], s)
        kv_heads = kv_heads or heads
        value, out = parts["attention.value"], parts["attention.out"]
        if {prefix + "attention.value", prefix + "attention.out"} <= set(self.formats):
            read, head_dim = inputs["attention.out"], value.out_features // kv_heads
            s = smoothing.factors(read, [out.weight], self.formats[prefix + "attention.out"].bits)
            shared = smoothing.of_value_heads(s, kv_heads, head_dim)
            s = smoothing.for_query_heads(shared, heads, kv_heads, head_dim)
            smoothing.divide_outputs(value, shared)
            smoothing.multiply_inputs(out, s)
            self._divided(read, s)
        # down(act(gate) · up): what up puts out can be divided, since nothing bends it.
        if "gate" in parts and {prefix + "up", prefix + "down"} <= set(self.formats):
            bits = self.formats[prefix + "down"].bits
            s = smoothing.factors(inputs["down"], [parts["down"].weight], bits)
            smoothing.divide_outputs(parts["up"], s)
            smoothing.multiply_inputs(parts["down"], s)
            self._divided(inputs["down"], s)

    @staticmethod
    def _divided(inputs: Inputs, by: Tensor) -> None:
        inputs.largest, inputs.square = inputs.largest / by, inputs.square / by.square()

    def _round(
        self,
        prefix: str,
        parts: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        times: Tensor | None = None,
    ) -> None:
        """Put integers into the places of float layers; ``times`` multiplies their inputs."""
        for name, layer in parts.items():
            form = self.formats.get(prefix + name)
            if form is not None:
                made = self._rounded(layer, form, inputs[name].rms.square(), times)
                _replace(self.model, prefix + name, made)
        self._told(prefix.rstrip(".") or "head")

    def _rounded(
        self, layer: nn.Linear, form: Format, importance: Tensor, times: Tensor | None
    ) -> QuantisedLinear:
        weight = layer.weight.detach()
        importance = importance + importance.mean() * 1e-3  # no channel counts for nothing
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for rows in torch.split(weight, _ROWS_AT_ONCE):  # so that a head is never held as floats
            some = rows.float() if times is None else rows.float() * times
            parts.append(rounded_words(some, form, importance))
        words, scale = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        points = [p[2] for p in parts if p[2] is not None]
        rounded = (words, scale, torch.cat(points) if points else None)
        if self.kernels is not None and weight.device.type == "cpu":
            self.kernels.put_aside(weight.data_ptr(), weight.nbytes)  # a mapped file's pages
        bias = None if layer.bias is None else layer.bias.detach()
        return QuantisedLinear.of_words(form, layer.in_features, rounded, bias)

    def _told(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(what, self.done, self.count)


_QKV = ("attention.query", "attention.key", "attention.value")


def _parts(layer: nn.Module) -> dict[str, nn.Linear]:
    """A layer's linear parts by name."""
    return {name: part for name, part in layer.named_modules() if isinstance(part, nn.Linear)}


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
