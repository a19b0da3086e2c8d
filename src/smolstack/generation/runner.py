"""The model runner: the only part of generation that calls the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, TypeVar

import torch
from torch import Tensor

from smolstack.generation.choices import Scoring
from smolstack.generation.prefix_cache import PrefixCache
from smolstack.generation.prepared_image import PendingTile
from smolstack.generation.request import Request
from smolstack.generation.step_plan import PrefillChunk, StepPlan
from smolstack.model.kv_cache import KVCache, RaggedKVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import normalize

T = TypeVar("T")


@dataclass
class Outcome(Generic[T]):
    """The result of one part of a step: a value or an error, and its duration in seconds."""

    value: T | None = None
    error: Exception | None = None
    seconds: float = 0.0


@dataclass
class StepOutputs:
    """The outputs of a step.

    Attributes:
        tiles: (N, S, D), visual tokens of the micro-batch.
        prefill: logits (V,) after the last token of each chunk.
        score: summed log-probabilities by choice.
        embed: vectors (R, T, E).
        decode: logits (R, V) after each request's last token.
    """

    tiles: Outcome[Tensor] = field(default_factory=Outcome)
    prefill: list[Outcome[Tensor]] = field(default_factory=list)
    score: Outcome[dict[int, float]] = field(default_factory=Outcome)
    embed: Outcome[Tensor] = field(default_factory=Outcome)
    decode: Outcome[Tensor] = field(default_factory=Outcome)


class ModelRunner:
    """Executes plans on a model.

    Args:
        prefix_cache: where known beginnings of prompts are found, and prompts registered.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, prefix_cache: PrefixCache
    ) -> None:
        self.model, self.processor, self.prefix_cache = model, processor, prefix_cache

    def execute(self, plan: StepPlan) -> StepOutputs:
        """Execute a plan; an error affects only its part."""
        outputs = StepOutputs()
        if plan.tiles:
            outputs.tiles = _outcome(lambda: self._encode(plan.tiles))
        if plan.prefill:
            outputs.prefill = self._chunks(plan.prefill)
        if plan.score is not None:
            request = plan.score
            outputs.score = _outcome(lambda: self._score(request))
        if plan.embed:
            outputs.embed = _outcome(lambda: self._embed(plan.embed))
        if plan.decode:
            outputs.decode = _outcome(lambda: self._decode(plan.decode))
        return outputs

    def _encode(self, tiles: list[PendingTile]) -> Tensor:
        pixels = torch.stack([tile.pixels for tile in tiles])
        return self.model.encode_tiles(normalize(pixels, self.processor.settings), distinct=True)

    def _chunks(self, chunks: list[PrefillChunk]) -> list[Outcome[Tensor]]:
        """Run all chunks in one pass; if that fails, each separately, to find the request that
        causes the error.
        """
        made = _outcome(lambda: self._prefill(chunks))
        if made.error is not None and len(chunks) > 1:
            return [found for chunk in chunks for found in self._chunks([chunk])]
        if made.value is None:
            return [Outcome(error=made.error, seconds=made.seconds)]
        return [Outcome(row, seconds=made.seconds) for row in made.value]

    def _prefill(self, chunks: list[PrefillChunk]) -> Tensor:
        for chunk in chunks:
            if chunk.request.cache is None:
                self._begin(chunk)
        parts, caches = [], []
        for chunk in chunks:
            embeddings, cache = chunk.request.embeddings, chunk.request.cache
            assert embeddings is not None
            assert cache is not None
            parts.append(embeddings[:, chunk.start : chunk.start + chunk.tokens])
            caches.append(cache)
        if len(chunks) == 1:
            return self.model.prefill_embeddings(parts[0], caches[0])
        packed = torch.cat(parts, dim=1)
        counts = [chunk.tokens for chunk in chunks]
        return self.model.prefill_embeddings(packed, RaggedKVCache(caches, counts))

    def _begin(self, chunk: PrefillChunk) -> None:
        """Compute a prompt's embeddings, and take its KV cache with the known prefix."""
        request, prefix = chunk.request, chunk.prefix
        request.embeddings = self.model.merge(self.processor.batch([request.encoded_prompt]))
        capacity = request.kv_tokens
        if prefix is None:
            request.cache = self.model.new_sequence_cache(capacity)
        else:
            request.cache = self.prefix_cache.take(prefix, capacity)
        self.prefix_cache.begin(request.number, request.keys, request.cache)

    def _score(self, request: Request) -> dict[int, float]:
        """Return summed log-probabilities of the tokens of one pass over some choices."""
        scoring, cache = request.scoring, request.cache
        assert scoring is not None
        assert cache is not None
        rows = [row for row in scoring.next_pass.rows if scoring.fed(row)]
        if scoring.next_pass.start == 0:
            scoring.copies = {row: _beside(scoring, row, cache) for row in rows}
        fed = torch.tensor([token for row in rows for token in scoring.fed(row)])
        wanted = torch.tensor([token for row in rows for token in scoring.wanted(row)])
        counts = [len(scoring.fed(row)) for row in rows]
        copies = RaggedKVCache([scoring.copies[row] for row in rows], counts)
        embeddings = self.model.decoder.embedding(fed.to(self.model.device))[None]
        logits = self.model.prefill_embeddings(embeddings, copies, every=True)[0]
        scores = logits.float().log_softmax(dim=-1)
        taken = scores.gather(1, wanted.to(scores.device)[:, None])[:, 0].cpu()
        sums = [float(part.sum()) for part in torch.split(taken, counts)]
        return dict(zip(rows, sums, strict=True))

    def _embed(self, requests: list[Request]) -> Tensor:
        batch = self.processor.batch([request.encoded_prompt for request in requests])
        return self.model.embed(batch.to(self.model.device)).float()

    def _decode(self, requests: list[Request]) -> Tensor:
        caches, tokens = [], []
        for request in requests:
            assert request.cache is not None
            assert request.output is not None
            caches.append(request.cache)
            tokens.append(request.output.token_ids[-1])
        new = torch.tensor(tokens, device=self.model.device)
        return self.model.decode_one_token(new, RaggedKVCache(caches))


def _beside(scoring: Scoring, row: int, cache: KVCache) -> KVCache:
    """Return a copy of the prompt's cache with room for a choice, except its last token, which is
    not read.
    """
    return cache.copied(cache.length + len(scoring.choices[row]) - 1)


def _outcome(work: Callable[[], T]) -> Outcome[T]:
    """Run ``work`` in inference mode and return its outcome."""
    began = perf_counter()
    try:
        with torch.inference_mode():
            value = work()
    except Exception as error:
        return Outcome(error=error, seconds=perf_counter() - began)
    return Outcome(value, seconds=perf_counter() - began)
