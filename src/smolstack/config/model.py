"""The whole model's config: both towers and the connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smolstack.config.quantization import Quantization
from smolstack.config.reading import Reader
from smolstack.config.text import TextConfig
from smolstack.config.vision import VisionConfig
from smolstack.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and the connector.

    ``tied``: lm_head shares the token embedding. ``embedding_dim``: the model ends in a
    Linear(text hidden → embedding_dim) for retrieval (ColSmol) and has no lm_head.
    ``quantization``: which layers are quantized, and in which format; None if none are. All three
    are determined by the checkpoint's weights, not by its config file.
    """

    vision: VisionConfig
    text: TextConfig
    scale: int
    image_token_id: int
    tied: bool = False
    embedding_dim: int | None = None
    model_type: str = "idefics3"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ConfigError(f"scale_factor is {self.scale}, expected a positive integer")
        if self.vision.side % self.scale:
            raise ConfigError(
                f"scale_factor {self.scale} does not divide the patch grid "
                f"{self.vision.side}×{self.vision.side} (image_size {self.vision.image_size} // "
                f"patch_size {self.vision.patch_size})"
            )
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                f"image_token_id is {self.image_token_id}, outside the vocabulary of "
                f"{self.text.vocab_size} tokens"
            )

    @property
    def tokens_per_tile(self) -> int:
        """S: visual tokens of one full tile, (side / scale)²."""
        return (self.vision.side // self.scale) ** 2

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from a whole config.json. Raises ConfigError naming the invalid key."""
        where = "config.json"
        model_type = data.get("model_type", "idefics3")
        if not isinstance(model_type, str):
            raise ConfigError(f"{where} model_type is {model_type!r}, expected a string")
        for part in ("vision_config", "text_config"):
            if not isinstance(data.get(part), Mapping):
                raise ConfigError(
                    f"{where} of model_type {model_type!r} has no {part} object; expected a "
                    "checkpoint of the Idefics3 / SmolVLM family"
                )
        get = Reader(where, data, {})
        return cls(
            vision=VisionConfig.from_hf(data["vision_config"]),
            text=TextConfig.from_hf(data["text_config"]),
            scale=get.integer("scale_factor"),
            image_token_id=get.integer("image_token_id"),
            tied=bool(data.get("tie_word_embeddings", False)),
            model_type=model_type,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a complete config.json, readable by transformers 4 and 5 and by other engines."""
        head = "ForConditionalGeneration" if self.embedding_dim is None else "Model"
        family = "SmolVLM" if self.model_type.startswith("smol") else "Idefics3"
        return {
            "architectures": [family + head],
            "model_type": self.model_type,
            "image_token_id": self.image_token_id,
            "scale_factor": self.scale,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "vocab_size": self.text.vocab_size,
            "pad_token_id": self.text.pad_token_id,
            "vision_config": self.vision.to_hf(self.model_type),
            "text_config": {**self.text.to_hf(), "tie_word_embeddings": self.tied},
        }

    def with_layers(self, vision: int | None = None, text: int | None = None) -> ModelConfig:
        """Return the same widths with other numbers of layers; None keeps a tower's own."""
        return replace(
            self,
            vision=replace(self.vision, num_layers=vision or self.vision.num_layers),
            text=replace(self.text, num_layers=text or self.text.num_layers),
        )
