"""The whole model: images and text in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.batch import Batch
from smolstack.config import ModelConfig
from smolstack.errors import AlignmentError, ConfigError
from smolstack.model import packer
from smolstack.model.backend import TORCH, Backend
from smolstack.model.connector import Idefics3Connector
from smolstack.model.decoder import Decoder
from smolstack.model.kv_cache import KVCache, RaggedKVCache
from smolstack.model.quantized import QuantizedLinear, replace_linears
from smolstack.model.tile_passes import in_passes
from smolstack.model.vision import VisionTower

# KV cache dtype of quantized models: half the bytes of float32, eight times finer than bfloat16.
CACHE_DTYPE = torch.float16


class VisionLanguageModel(nn.Module):
    """Vision tower → connector → packer → decoder → head.

    The head is a separate linear layer, the tied token embedding (``config.tied``), or a
    projection to ``config.embedding_dim`` for retrieval.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.connector = Idefics3Connector.from_config(config)
        self.decoder = Decoder(config.text)
        width = config.text.hidden_size
        self.head: nn.Linear | QuantizedLinear | None = None
        self.backend: Backend = TORCH
        self._tower_is_compiled = False
        if config.embedding_dim is not None:
            self.head = nn.Linear(width, config.embedding_dim)
        elif not config.tied:
            self.head = nn.Linear(width, config.text.vocab_size, bias=False)
        if config.quantization is not None:
            replace_linears(self, config.quantization)
            self.decoder.embedding.output_dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionLanguageModel:
        """Implements ``to``, ``half`` and the like; a quantized model's float layers stay float32.

        Raises:
            ConfigError: another dtype for a quantized model.
        """
        if self.scheme is not None and (dtype := fn(torch.empty(0)).dtype) != torch.float32:
            raise ConfigError(
                f"the weights are {self.scheme} and compute in float32, found {dtype}; load float "
                "weights for another dtype"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def scheme(self) -> str | None:
        """ "int8", "int4" or "mixed" for a quantized model; None if all weights are floating-
        point.
        """
        quantization = self.config.quantization
        return None if quantization is None else quantization.name

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of keys and values: float16 for a quantized model, else that of the weights."""
        return self.dtype if self.scheme is None else CACHE_DTYPE

    @property
    def dtype(self) -> torch.dtype:
        embedding = self.decoder.embedding
        # A layer that replaced the embedding has its weight only.
        wanted: torch.dtype | None = getattr(embedding, "output_dtype", None)
        return embedding.weight.dtype if wanted is None else wanted

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.weight.device

    @property
    def precision(self) -> str:
        """Human-readable number format and backend: "bfloat16, torch"."""
        name = self.scheme or str(self.dtype).removeprefix("torch.")
        quantized = self.scheme is not None
        return f"{name}, {self.backend.describe(self.device, self.dtype, quantized=quantized)}"

    def use(self, backend: Backend) -> VisionLanguageModel:
        """Set the backend that computes this model."""
        for module in self.modules():
            if isinstance(module, (VisionLanguageModel, VisionTower, QuantizedLinear)):
                module.backend = backend
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Logits at every position: (B, T, V). Rows at padding positions are meaningless."""
        states = self.decoder(self.merge(batch), padding=_padding(batch))
        return self.logits(states)

    def encode_tiles(
        self,
        tiles: Tensor,
        filled: Sequence[tuple[int, int]] | None = None,
        *,
        distinct: bool = False,
    ) -> Tensor:
        """Compute the visual tokens of tiles: (N, 3, P, P) → (N, S, D).

        Tiles pass through the tower a few at a time, and bitwise identical tiles (such as the blank
        parts of a page) only once. ``distinct=True`` skips the search for identical tiles.
        """
        grid = self.vision.grid_of(tiles)

        def encode(some: Tensor, parts: Sequence[tuple[int, int]] | None) -> Tensor:
            pixels = some.to(device=self.device, dtype=self.dtype)
            if self._tower_is_compiled:
                torch._dynamo.maybe_mark_dynamic(pixels, 0)
            visual: Tensor = self.connector(self.vision(pixels, parts), grid)
            return visual

        encoded, copies = in_passes(tiles, encode, filled, distinct=distinct)
        if not encoded:
            tokens = (grid[0] // self.config.scale) * (grid[1] // self.config.scale)
            empty = (0, tokens, self.config.text.hidden_size)
            return torch.empty(empty, dtype=self.dtype, device=self.device)
        visual = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        return visual if visual.shape[0] == tiles.shape[0] else visual[copies]

    def compile_tower(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the vision tower and the connector with torch.compile, as one graph each.

        Compilation happens on first use: once for a single tile and once for any other number of
        tiles, whatever the image sizes. Prompt and token processing are not compiled.

        Raises:
            ConfigError: the weights are integers, which only smolstack's kernels multiply quickly.
        """
        if self.scheme is not None:
            raise ConfigError(f"compiling needs float weights, found {self.scheme}")
        self.vision.compile(fullgraph=True, backend=backend)
        self.connector.compile(fullgraph=True, backend=backend)
        self._tower_is_compiled = True

    def merge(self, batch: Batch) -> Tensor:
        """Return text embeddings with the visual tokens merged in: (B, T, D).

        Raises:
            AlignmentError: the numbers of image tokens and visual tokens differ; raised before
                any computation.
        """
        batch = batch.to(self.device)
        _check_counts(batch)
        positions = packer.locate(
            batch.token_ids,
            self.config.image_token_id,
            batch.tiles_per_sequence,
            self._tokens_per_tile(batch),
        )
        embeddings: Tensor = self.decoder.embedding(batch.token_ids)
        if positions.numel() == 0:
            return embeddings
        visual = batch.visual_tokens
        if visual is None:
            visual = self.encode_tiles(batch.tiles, batch.tile_grids)
        return packer.splice(embeddings, positions, visual)

    def _tokens_per_tile(self, batch: Batch) -> int:
        """S, from the visual tokens or the tiles of the batch."""
        if batch.visual_tokens is not None:
            return batch.visual_tokens.shape[1]
        rows, columns = self.vision.grid_of(batch.tiles)
        return (rows // self.config.scale) * (columns // self.config.scale)

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the next token: (B, T, D) → (B, T, V)."""
        if self.config.embedding_dim is not None:
            raise ConfigError(
                "this checkpoint has an embedding head and cannot generate text; use embed_pages "
                "and embed_queries (smolstack map --embed retrieval, smolstack search)"
            )
        if self.head is not None:
            scores: Tensor = self.head(states)
            return scores
        return functional.linear(states, self.decoder.embedding.weight)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        text = self.config.text
        width = 2 * text.num_layers * text.num_kv_heads * text.head_dim
        return width * self.cache_dtype.itemsize

    def new_sequence_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for one sequence, with room for ``capacity`` tokens."""
        return self._new_cache(1, capacity, None)

    def new_cache(self, batch: Batch, capacity: int) -> KVCache:
        """Return an empty cache for ``batch``, with room for ``capacity`` tokens per sequence."""
        return self._new_cache(len(batch), capacity, _padding(batch))

    def _new_cache(self, rows: int, capacity: int, padding: Tensor | None) -> KVCache:
        return self.backend.new_cache(
            self.config.text,
            rows,
            capacity,
            padding=padding,
            dtype=self.cache_dtype,
            device=self.device,
        )

    def prefill(self, batch: Batch, cache: KVCache) -> Tensor:
        """Read the prompts into ``cache`` and return the logits of each next token: (B, V).

        Tokens that are already in the cache (a shared prefix) are not processed again.
        """
        return self.prefill_embeddings(self.merge(batch)[:, cache.length :], cache)

    def prefill_embeddings(
        self, embeddings: Tensor, cache: KVCache | RaggedKVCache, *, every: bool = False
    ) -> Tensor:
        """Append tokens to ``cache``: (B, T, D), or (1, ΣT, D) for a ragged cache.

        Returns:
            Logits of the next token, (B, V), or (R, V) for a ragged cache, one row per sequence.
            With ``every``, logits after each token: (B, T, V) or (1, ΣT, V).
        """
        if self._asks_backend:
            made = self.backend.prefill(self.decoder, self._head, embeddings, cache, every=every)
            if made is not None:
                return made
        states = self.decoder(embeddings, cache=cache)
        if every:
            return self.logits(states)
        if isinstance(cache, RaggedKVCache):
            ends = torch.tensor(cache.counts, device=states.device).cumsum(0) - 1
            return self.logits(states[0, ends])
        return self.logits(states[:, -1])

    def decode_one_token(self, token_ids: Tensor, cache: KVCache | RaggedKVCache) -> Tensor:
        """Append one token per sequence, (B,), to ``cache`` and return the next logits: (B, V)."""
        embeddings: Tensor = self.decoder.embedding(token_ids)
        if self._asks_backend:
            made = self.backend.decode(self.decoder, self._head, embeddings, cache)
            if made is not None:
                return made
        if isinstance(cache, RaggedKVCache):
            return self.logits(self.decoder(embeddings[None], cache=cache)[0])
        states = self.decoder(embeddings[:, None], cache=cache)
        return self.logits(states[:, -1])

    @property
    def _head(self) -> nn.Module:
        return self.decoder.embedding if self.head is None else self.head

    @property
    def _asks_backend(self) -> bool:
        """Whether a backend may take over: the head gives logits, and nothing is being traced."""
        return self.config.embedding_dim is None and not torch.compiler.is_compiling()

    def embed(self, batch: Batch) -> Tensor:
        """Late-interaction embeddings (ColSmol), unit length, zero on padding: (B, T, E).

        ColPali's head (Faysse et al. 2024): a linear layer, then L2 normalization per token.
        """
        if self.head is None or self.config.embedding_dim is None:
            raise ConfigError("this checkpoint has no embedding head")
        states = self.head(self.decoder(self.merge(batch), padding=_padding(batch)))
        real = batch.attention_mask.to(states.device)[..., None]
        return functional.normalize(states, dim=-1) * real


def _padding(batch: Batch) -> Tensor | None:
    """Left-padding tokens per row, (B,), or None if no row has any."""
    padding = (~batch.attention_mask).sum(dim=1)
    return padding if bool(padding.any()) else None


def _check_counts(batch: Batch) -> None:
    """Check that a batch's counts are consistent before its tokens are read."""
    tiles = batch.tiles.shape[0] if batch.visual_tokens is None else batch.visual_tokens.shape[0]
    if sum(batch.tiles_per_image) != tiles:
        raise AlignmentError(
            f"tiles_per_image {list(batch.tiles_per_image)} counts {sum(batch.tiles_per_image)} "
            f"tiles, the batch holds {tiles}"
        )
    if sum(batch.images_per_sequence) != len(batch.tiles_per_image):
        raise AlignmentError(
            f"images_per_sequence {list(batch.images_per_sequence)} counts "
            f"{sum(batch.images_per_sequence)} images, the batch holds "
            f"{len(batch.tiles_per_image)}"
        )
