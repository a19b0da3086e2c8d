"""Intermediate results of a model, stage by stage, in smolstack and in transformers.

They are recorded by hooks on the running modules, so that the actual forward pass of each
implementation is compared. Shapes: B sequences, T tokens, N tiles, H·W patches, C and D the hidden
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.batch import Batch
from smolstack.interop.reference import RetrievalReference, model_inputs
from smolstack.model.tile_passes import distinct_tiles
from smolstack.model.vlm import VisionLanguageModel

ROWS_AT_ONCE = 64  # positions compared at a time: limits the memory of logits over 128k tokens


@dataclass(frozen=True)
class Trace:
    """The intermediate results of one forward pass.

    Attributes:
        positions: ids into the position table, (N, H·W); tower: (N, H·W, C); connector: (N, S, D).
            All three are None without images.
        merged: embeddings with visual tokens merged in, (B, T, D).
        states: the decoder's output, (B, T, D).
        head: weight and bias of the projection from states to logits or embeddings.
    """

    positions: Tensor | None
    tower: Tensor | None
    connector: Tensor | None
    merged: Tensor
    states: Tensor
    head: tuple[Tensor, Tensor | None]

    def outputs(self, rows: Tensor) -> Tensor:
        """Return logits (or embeddings before normalization) of some states: (R, D) → (R, V)."""
        return functional.linear(rows, *self.head)


@torch.inference_mode()
def trace_ours(model: VisionLanguageModel, batch: Batch) -> Trace:
    """Trace smolstack's forward pass."""
    with _record(
        positions=(model.vision.position_embedding, _first_input),
        tower=(model.vision, _output),
        connector=(model.connector, _output),
        merged=(model.decoder, _first_input),
        states=(model.decoder, _output),
    ) as seen:
        model.decoder(model.merge(batch), padding=_padding(batch))
    head: Any = model.head
    weight = model.decoder.embedding.weight if head is None else head.weight
    bias = None if head is None else head.bias
    if not seen["tower"]:
        return _trace(seen, None, (weight, bias))
    # Equal tiles are encoded once, and full tiles share one row of positions: expanded here.
    _, copies = distinct_tiles(batch.tiles, batch.tile_grids)
    for name in ("tower", "connector"):
        seen[name] = [torch.cat(seen[name])[copies]]
    positions = torch.cat([ids.reshape(-1, ids.shape[-1]) for ids in seen["positions"]])
    constant = batch.tile_grids is None
    positions = positions[[0] * len(copies)] if constant else positions[copies]
    return _trace(seen, positions, (weight, bias))


@torch.inference_mode()
def trace_theirs(theirs: Any, batch: Batch, **inputs: Tensor) -> Trace:
    """Trace transformers' forward pass over the same batch; ``inputs`` extends or overrides its
    inputs.
    """
    retrieval = isinstance(theirs, RetrievalReference)
    base = theirs.model
    vision = base.vision_model
    with _record(
        positions=(vision.embeddings.position_embedding, _first_input),
        tower=(vision, lambda _i, _k, output: output.last_hidden_state),
        connector=(base.connector, _output),
        merged=(base.text_model, lambda _i, keywords, _o: keywords["inputs_embeds"]),
        states=(base.text_model, lambda _i, _k, output: output.last_hidden_state),
    ) as seen:
        base(**{**model_inputs(batch), **inputs}, use_cache=False)
    head = theirs.linear if retrieval else theirs.lm_head
    positions = torch.cat(seen["positions"]) if seen["positions"] else None
    return _trace(seen, positions, (head.weight, head.bias))


def difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Return the largest absolute difference; infinite if shapes differ, 0 if both are None."""
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else float("inf")
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.numel() == 0:
        return 0.0
    return float((ours.double() - theirs.double()).abs().max())


@torch.inference_mode()
def output_difference(ours: Trace, theirs: Trace, real: Tensor, *, unit: bool = False) -> float:
    """Return the largest difference of logits at the positions ``real`` (B, T), a few rows at a
    time.

    With ``unit``, embeddings of unit length are compared instead.
    """
    mine, others = ours.states[real], theirs.states[real]
    largest = 0.0
    for start in range(0, len(mine), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        pair = ours.outputs(mine[rows]), theirs.outputs(others[rows])
        if unit:
            pair = functional.normalize(pair[0], dim=-1), functional.normalize(pair[1], dim=-1)
        largest = max(largest, float((pair[0] - pair[1]).abs().max()))
    return largest


@torch.inference_mode()
def spread(trace: Trace, real: Tensor) -> float:
    """Return the standard deviation of the final outputs: comparing nearly constant ones proves
    little.
    """
    return float(trace.outputs(trace.states[real][-1:]).std())


_Pick = Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]


def _first_input(inputs: tuple[Any, ...], _keywords: dict[str, Any], _output: Any) -> Tensor:
    found: Tensor = inputs[0]
    return found


def _output(_inputs: tuple[Any, ...], _keywords: dict[str, Any], output: Any) -> Tensor:
    found: Tensor = output
    return found


@contextmanager
def _record(**wanted: tuple[nn.Module, _Pick]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect a tensor of each named module every time it runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def hook(name: str, pick: _Pick) -> Callable[..., None]:
        def keep(
            _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            seen[name].append(pick(inputs, keywords, output))

        return keep

    handles = [
        module.register_forward_hook(hook(name, pick), with_kwargs=True)
        for name, (module, pick) in wanted.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _trace(
    seen: dict[str, list[Tensor]], positions: Tensor | None, head: tuple[Tensor, Tensor | None]
) -> Trace:
    return Trace(
        positions=positions,
        tower=torch.cat(seen["tower"]) if seen["tower"] else None,
        connector=torch.cat(seen["connector"]) if seen["connector"] else None,
        merged=seen["merged"][0],
        states=seen["states"][0],
        head=head,
    )


def _padding(batch: Batch) -> Tensor | None:
    padding = (~batch.attention_mask).sum(dim=1)
    return padding if bool(padding.any()) else None
