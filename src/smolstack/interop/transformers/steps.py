"""A forward pass of smolstack's decoder, by torch or by the compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from smolstack.backends.cpu.decoder import NativeDecoder, native_decoder, suits
from smolstack.interop.transformers.cache import BorrowedCache, ReservedCache, grows
from smolstack.model.hooks import is_hooked
from smolstack.model.vlm import VisionLanguageModel


@dataclass
class Task:
    """The inputs of a decoder call.

    Attributes:
        engine: smolstack's model on the model's parameters.
        embeddings: (B, T, D), with visual tokens merged in.
        padding: (B,) left-padding tokens per row, or None.
        cache: transformers' cache, extended in place, or None.
        images: outputs of tower and connector, as transformers returns them.
    """

    engine: VisionLanguageModel
    embeddings: Tensor
    padding: Tensor | None
    cache: Cache | None
    images: Any

    def states(self) -> Tensor:
        """Return normalized states of every new token: (B, T, D)."""
        borrowed = None if self.cache is None else BorrowedCache(self.cache, self.padding)
        states: Tensor = self.engine.decoder(self.embeddings, padding=self.padding, cache=borrowed)
        return states


class Steps:
    """The compiled decoder of a model, made on first use and when weights change."""

    def __init__(self) -> None:
        self._native: NativeDecoder | None = None
        self._made_for: tuple[int, int, torch.dtype] | None = None

    def next_logits(self, task: Task, head: Any) -> Tensor:
        """Return logits of the token after the new ones: (B, 1, V), in the model's dtype."""
        native = self._kernels(task, head)
        if native is not None and task.cache is not None:
            embeddings, text = task.embeddings, task.engine.config.text
            rows, new = embeddings.shape[:2]
            like = embeddings.new_empty(rows, text.num_kv_heads, 0, text.head_dim)
            cache = ReservedCache(task.cache, like, new, task.padding)
            if suits(embeddings, cache, like.dtype):
                if new == 1:
                    return native(embeddings[:, 0], cache)[:, None].to(like.dtype)
                return native.prefill(embeddings, cache)[:, None].to(like.dtype)
        logits: Tensor = head(task.states()[:, -1:])
        return logits

    def _kernels(self, task: Task, head: Any) -> NativeDecoder | None:
        """Return the compiled decoder if it supports this task, otherwise None."""
        engine, cache = task.engine, task.cache
        if torch.compiler.is_compiling() or type(head) is not nn.Linear or head.bias is not None:
            return None
        if is_hooked(head):
            return None
        if not grows(cache, engine.config.text.num_layers):
            return None
        made_for = (id(engine), id(head.weight), engine.dtype)
        if self._made_for != made_for or (self._native is not None and not self._native.current()):
            self._native = native_decoder(engine.decoder, head, engine.dtype)
            self._made_for = made_for
        return self._native

    def __deepcopy__(self, _memo: dict[int, Any]) -> Steps:
        return Steps()  # a copy of the model has its own weights

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        return Steps, ()
