"""Idefics3 / SmolVLM built from the Foundation Model Stack's modules.

FMS's SigLIP tower and LLaMA decoder with smolstack's connector and packer.

Shapes (docs/shapes.md): B sequences, T tokens, N tiles, H×W patches of a tile, C the vision hidden
size, S visual tokens per tile, D the text hidden size.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from fms.distributed.strategy import NoOpStrategy, TensorParallelStrategy
from fms.models.llama import LLaMA
from torch import Tensor, nn
from torch.nn import functional

from smolstack.errors import CheckpointError, ConfigError, ContextLengthError
from smolstack.interop.fms.config import Idefics3Config
from smolstack.interop.fms.inputs import Tiles, causal_again, read_tiles, split_images
from smolstack.interop.fms.tower import VisionTower
from smolstack.interop.fms.tracing import merge_traced
from smolstack.interop.fms.weights import weight_layout
from smolstack.model import packer
from smolstack.model.connector import Idefics3Connector
from smolstack.model.tile_passes import in_passes


class TokenEmbedding(nn.Embedding):
    """An embedding that passes embedded inputs through, as FMS's generation hook produces them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) ids, or (B, T, D) embeddings → (B, T, D)."""
        return x if x.is_floating_point() else super().forward(x)


class Idefics3(nn.Module):
    """Vision tower → connector → packer → decoder, in FMS's form.

    Args:
        config: sizes; keyword arguments override single values, dictionaries those of nested
            configs.
        distributed_strategy: FMS's. Tensor parallelism splits the decoder's layers, and the tower's
            if the number of processes divides them; connector, embedding and head are not split.
        vision_only: build no decoder, only what :meth:`prepare_inputs_for_generation` needs.
    """

    # Weights of a Hugging Face folder that FMS reads without a decoder.
    VISION_ONLY_HF_PREFIXES = (
        "model.vision_model.",
        "model.connector.",
        "model.text_model.embed_tokens.",
    )

    def __init__(
        self,
        config: Idefics3Config | None = None,
        distributed_strategy: Any = NoOpStrategy,
        vision_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config: Any = (config or Idefics3Config()).updated(**kwargs)
        vision, text = self.config.vision_config, self.config.text_config
        fused = self.config.fused_weights and vision.fused_weights and text.fused_weights
        self.config.fused_weights = vision.fused_weights = text.fused_weights = fused
        self.register_load_state_dict_pre_hook(_settle_fusion)  # type: ignore[no-untyped-call]
        self.distributed_strategy = distributed_strategy
        self._vision_only = vision_only
        self.vision_tower = VisionTower(vision)
        if isinstance(distributed_strategy, TensorParallelStrategy):
            self._divide(distributed_strategy)
        self.connector = Idefics3Connector(vision.hidden_size, text.emb_dim, self.config.scale)
        embedding = TokenEmbedding(text.src_vocab_size, text.emb_dim)
        if vision_only:
            self.text_embedding = embedding
            return
        self.language_model = LLaMA(text, distributed_strategy)
        self.language_model.base_model.embedding = embedding
        if self.config.embedding_dim is not None:
            self.language_model.head = nn.Linear(text.emb_dim, self.config.embedding_dim)

    @classmethod
    def from_config(cls, config: Idefics3Config) -> Idefics3:
        """Return a model of these sizes with uninitialized weights."""
        return cls(config)

    def get_config(self) -> Idefics3Config:
        """Return the config, with overridden values."""
        found: Idefics3Config = self.config
        return found

    @property
    def embedding(self) -> TokenEmbedding:
        """The token embedding."""
        found: TokenEmbedding = (
            self.text_embedding if self._vision_only else self.language_model.base_model.embedding
        )
        return found

    def reset_parameters(self) -> None:
        """Initialize with random weights, as FMS does for each module."""
        self.vision_tower.reset_parameters()
        self.connector.proj.reset_parameters()
        if self._vision_only:
            self.text_embedding.reset_parameters()
            return
        self.language_model.reset_parameters()
        if self.language_model.head.bias is not None:
            nn.init.zeros_(self.language_model.head.bias)

    def post_init(self) -> None:
        """Set ties and RoPE tables; called by FMS when the weights are loaded.

        Raises:
            CheckpointError: the checkpoint lacks some of the weights.
        """
        self.vision_tower.post_init()
        if not self._vision_only:
            self.language_model.post_init()
        missing = [name for name, tensor in self.named_parameters() if tensor.is_meta]
        if missing and len(missing) < len(list(self.parameters())):
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} weights of the model (named as the "
                f"Foundation Model Stack does): {', '.join(missing[:8])}"
                f"{' …' if len(missing) > 8 else ''}"
            )

    def forward(
        self,
        input_ids_or_embeds: Tensor,
        position_ids: Tensor | None = None,
        past_key_value_states: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return logits (B, T, V), or with ``use_cache`` (logits, keys and values of each layer).

        Args:
            input_ids_or_embeds: (B, T) ids, or (B, T, D) as
                :meth:`prepare_inputs_for_generation` returns them.
            position_ids: (B, T); default: counted from the cache's length.
            past_key_value_states: returned by an earlier call.
            use_cache: return keys and values.
            **kwargs: ``mask``, ``last_n_tokens`` and other arguments of FMS's attention; with ids
                and no cache also the images, as for :meth:`merge`.

        A retrieval model (ColSmol) returns embeddings of unit length (B, T, E) instead of logits.
        """
        if self._vision_only:
            raise ConfigError(
                "a vision_only model has no decoder; it only computes embeddings for a "
                "complete model, with prepare_inputs_for_generation"
            )
        images, attention = split_images(kwargs)
        attention.pop("prompt_length", None)
        x = input_ids_or_embeds
        if images and not x.is_floating_point() and not past_key_value_states:
            if torch.compiler.is_compiling():
                x = merge_traced(self, x, **images)
            else:
                x = self.merge(x, **images)
        outputs = self.language_model(
            x,
            position_ids=position_ids,
            past_key_value_states=past_key_value_states,
            use_cache=use_cache,
            **attention,
        )
        if self.config.embedding_dim is None:
            return outputs
        if use_cache:
            return functional.normalize(outputs[0], dim=-1), outputs[1]
        return functional.normalize(outputs, dim=-1)

    def prepare_inputs_for_generation(
        self, iteration: int, input_ids: Tensor, kwargs: MutableMapping[str, Any]
    ) -> tuple[Tensor, MutableMapping[str, Any]]:
        """The ``prepare_model_inputs_hook`` for FMS's ``generate``.

        Images are encoded once, with the prompt, and merged into their rows. Image tokens generated
        by the model are ordinary tokens.

        Raises:
            AlignmentError: image tokens and tiles of a row differ, before anything is encoded.
            ContextLengthError: ``max_seq_len`` has truncated the prompt.
        """
        if self.config.embedding_dim is not None:
            raise ConfigError("this checkpoint has an embedding head and cannot generate text")
        cached = bool(kwargs.get("use_cache"))
        mask = kwargs.get("mask")
        if iteration > 0 and not cached and mask is not None:
            kwargs = {**kwargs, "mask": causal_again(mask)}
        images, rest = split_images(kwargs)
        if not images or (iteration > 0 and cached):
            return self.embedding(input_ids), kwargs
        length = int(rest.pop("prompt_length", input_ids.shape[1]))
        if iteration > 0 and input_ids.shape[1] != length + iteration:
            raise ContextLengthError(
                f"max_seq_len {input_ids.shape[1]} cuts off the beginning of a prompt of {length} "
                "tokens that contains images"
            )
        prompt = input_ids[:, :length]
        visual, counts = self._visual_tokens(prompt, images)
        merged = self._splice(prompt, visual, counts)
        merged = torch.cat((merged, self.embedding(input_ids[:, length:])), dim=1)
        if not cached:  # the text is read again, its images are not
            rest |= {
                "visual_tokens": visual,
                "tiles_per_sequence": counts,
                "prompt_length": length,
            }
        return merged, rest

    def merge(self, input_ids: Tensor, **images: Any) -> Tensor:
        """Return text embeddings with visual tokens merged in: (B, T) → (B, T, D).

        Args:
            input_ids: (B, T).
            **images: ``pixel_values``, (N, 3, P, P) or (B, most, 3, P, P), and, for partly filled
                tiles, ``pixel_attention_mask`` or ``tile_grids``; or ``visual_tokens`` (N, S, D).
                ``tiles_per_sequence`` is only needed if image tokens do not determine it.

        Raises:
            AlignmentError, GridError: names the row, what was found and what was expected.
        """
        return self._splice(input_ids, *self._visual_tokens(input_ids, images))

    def encode_tiles(
        self, tiles: Tensor, filled: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Return visual tokens of tiles, a few at a time, equal ones once: (N, 3, P, P) → (N, S,
        D).
        """
        grid = self.vision_tower.grid_of(tiles)
        weight = self.connector.proj.weight
        tokens = (grid[0] // self.config.scale) * (grid[1] // self.config.scale)

        def encode(some: Tensor, parts: Sequence[tuple[int, int]] | None) -> Tensor:
            visual: Tensor = self.connector(self.vision_tower(some, parts), grid)
            return visual

        encoded, copies = in_passes(tiles, encode, filled)
        return torch.cat([weight.new_empty(0, tokens, weight.shape[0]), *encoded])[copies]

    def _visual_tokens(
        self, input_ids: Tensor, images: dict[str, Any]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return visual tokens (N, S, D) and tiles per row, after checking the counts."""
        found = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
        visual: Tensor | None = images.get("visual_tokens")
        if visual is not None:
            given = images.get("tiles_per_sequence")
            counts = [n // visual.shape[1] for n in found] if given is None else given
            return visual, tuple(int(n) for n in counts)
        rows, columns = self.vision_tower.grid_of(images["pixel_values"])
        per_tile = (rows // self.config.scale) * (columns // self.config.scale)
        tiles: Tiles = read_tiles(
            image_tokens=found,
            tokens_per_tile=per_tile,
            patch=self.config.vision_config.patch_size,
            **images,
        )
        packer.locate(input_ids, self.config.image_token_id, tiles.per_sequence, per_tile)
        return self.encode_tiles(tiles.pixels, tiles.filled), tiles.per_sequence

    def _splice(self, input_ids: Tensor, visual: Tensor, counts: Sequence[int]) -> Tensor:
        image = self.config.image_token_id
        positions = packer.locate(input_ids, image, counts, visual.shape[1])
        return packer.splice(self.embedding(input_ids), positions, visual.to(input_ids.device))

    def _divide(self, strategy: Any) -> None:
        """Check that tensor parallelism can split the decoder, and split the tower if possible."""
        processes = strategy.group.size()
        text, vision = self.config.text_config, self.config.vision_config
        heads, groups = text.nheads, text.kvheads or text.nheads
        inner = int(text.hidden_grow_factor * text.emb_dim)
        shared = groups % processes == 0 or processes % groups == 0
        if not self._vision_only and (heads % processes or inner % processes or not shared):
            raise ConfigError(
                f"tensor parallelism over {processes} processes, which must divide the decoder's "
                f"{heads} attention heads and {inner} inner channels, and divide or be a multiple "
                f"of its {groups} key/value heads"
            )
        if vision.nheads % processes or vision.intermediate_size % processes:
            return
        layers = self.vision_tower.encoder.layers
        for index, layer in enumerate(layers):
            layers[index] = strategy.distribute_layer(layer, index)


def _settle_fusion(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Allow loading a state dict with a different fusion of matrices."""
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    weights = {name.removeprefix(prefix): state.pop(name) for name in own}
    settled = weight_layout(weights, model_config=module.config)
    state.update({prefix + name: tensor for name, tensor in settled.items()})
