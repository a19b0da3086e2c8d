"""The vision tower's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolstack.config.reading import ACTIVATIONS, Reader, activation_name, divides, one_of, positive
from smolstack.errors import ConfigError

# Class defaults of transformers 5.24's Idefics3VisionConfig and SiglipVisionConfig.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SIGLIP_DEFAULTS: dict[str, Any] = {
    **_VISION_DEFAULTS,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "patch_size": 16,
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a SigLIP encoder over one tile of ``image_size``² pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 512
    patch_size: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "vision_config", "hidden_size", "intermediate_size", "num_layers")
        positive(self, "vision_config", "num_heads", "image_size", "patch_size", "num_channels")
        if self.num_channels != 3:
            raise ConfigError(
                f"vision_config.num_channels is {self.num_channels}, expected 3: images are "
                "converted to RGB"
            )
        divides("vision_config", "hidden_size", self.hidden_size, self.num_heads)
        one_of("vision_config.hidden_act", self.hidden_act, ACTIVATIONS)
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"vision_config.patch_size is {self.patch_size}, larger than "
                f"vision_config.image_size, {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches along one edge of a full tile; pixels beyond side · patch_size are ignored."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(
        cls,
        data: Mapping[str, Any],
        where: str = "config.json vision_config",
        defaults: Mapping[str, Any] | None = None,
    ) -> VisionConfig:
        """Build from the ``vision_config`` object of a config.json, or from a SigLIP's.

        Args:
            where: name of the object in error messages.
            defaults: values of omitted keys; None: Idefics3VisionConfig's.
        """
        get = Reader(where, data, _VISION_DEFAULTS if defaults is None else defaults)
        return cls(
            hidden_size=get.integer("hidden_size"),
            intermediate_size=get.integer("intermediate_size"),
            num_layers=get.integer("num_hidden_layers"),
            num_heads=get.integer("num_attention_heads"),
            image_size=get.square("image_size"),
            patch_size=get.square("patch_size"),
            num_channels=get.integer("num_channels"),
            hidden_act=activation_name(get.string("hidden_act")),
            layer_norm_eps=get.number("layer_norm_eps"),
        )

    def to_hf(self, model_type: str) -> dict[str, Any]:
        """The ``vision_config`` object for a config.json of ``model_type``."""
        return {
            "model_type": f"{model_type}_vision",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_channels": self.num_channels,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        }
