"""Configurations as frozen dataclasses, read strictly from Hugging Face files and written back.

Two kinds of missing keys exist. Sizes that old files leave out when they equal the default of the
library's config class (files written by transformers 4 omit such keys) are filled from those
class defaults, listed below. Keys that change results without changing any weight's shape
(``rope_theta``, ``rms_norm_eps``, ``scale_factor``, ``image_token_id``) have no default: a file
without them raises :class:`ConfigError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smolstack.errors import ConfigError

# Class defaults of transformers 5.24's Idefics3VisionConfig and LlamaConfig.
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
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a SigLIP encoder over one tile of ``image_size`` × ``image_size`` pixels."""

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
        _positive(self, "vision_config", "hidden_size", "intermediate_size", "num_layers")
        _positive(self, "vision_config", "num_heads", "image_size", "patch_size", "num_channels")
        _divides("vision_config", "hidden_size", self.hidden_size, self.num_heads)
        _one_of("vision_config.hidden_act", self.hidden_act, ACTIVATIONS)
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"vision_config.patch_size is {self.patch_size}, larger than "
                f"vision_config.image_size, {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches along one edge of a full tile; pixels past side · patch_size are never seen."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Build from the ``vision_config`` object of a config.json."""
        get = _Reader("config.json vision_config", data, _VISION_DEFAULTS)
        return cls(
            hidden_size=get.integer("hidden_size"),
            intermediate_size=get.integer("intermediate_size"),
            num_layers=get.integer("num_hidden_layers"),
            num_heads=get.integer("num_attention_heads"),
            image_size=get.square("image_size"),
            patch_size=get.square("patch_size"),
            num_channels=get.integer("num_channels"),
            hidden_act=_activation_name(get.string("hidden_act")),
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


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and, for longer contexts, its rescaling.

    ``type`` is "default", "linear" (all frequencies divided by ``factor``) or "llama3" (Llama 3.1:
    low frequencies divided by ``factor``, high ones kept, those between interpolated).
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _one_of("text_config rope_type", self.type, ROPE_TYPES)
        if self.theta <= 0:
            raise ConfigError(f"text_config.rope_theta is {self.theta}, expected a positive number")

    @classmethod
    def from_hf(cls, text: Mapping[str, Any]) -> RopeConfig:
        """Read from a ``text_config``: old files keep rope_theta beside, new ones inside."""
        where = "config.json text_config"
        inner = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{where}.rope_parameters is {inner!r}, expected an object")
        theta = inner.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise ConfigError(
                f"{where} has no rope_theta (looked at rope_theta, rope_parameters.rope_theta and "
                "rope_scaling.rope_theta); it changes every answer, so there is no default"
            )
        get = _Reader(f"{where}.rope_parameters", {**inner, "rope_theta": theta}, {})
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind == "default":
            return cls(theta=get.number("rope_theta"))
        if kind == "linear":
            return cls(theta=get.number("rope_theta"), type=kind, factor=get.number("factor"))
        if kind != "llama3":
            raise ConfigError(f"{where} rope_type is {kind!r}, expected one of {list(ROPE_TYPES)}")
        return cls(
            theta=get.number("rope_theta"),
            type=kind,
            factor=get.number("factor"),
            low_freq_factor=get.number("low_freq_factor"),
            high_freq_factor=get.number("high_freq_factor"),
            original_max_positions=get.integer("original_max_position_embeddings"),
        )

    def to_hf(self) -> dict[str, Any]:
        """``rope_theta``, ``rope_scaling`` (old readers) and ``rope_parameters`` (new readers)."""
        scaling: dict[str, Any] | None = None
        if self.type != "default":
            scaling = {"rope_type": self.type, "factor": self.factor}
        if scaling is not None and self.type == "llama3":
            scaling["low_freq_factor"] = self.low_freq_factor
            scaling["high_freq_factor"] = self.high_freq_factor
            scaling["original_max_position_embeddings"] = self.original_max_positions
        parameters = {"rope_type": self.type, "rope_theta": self.theta, **(scaling or {})}
        out: dict[str, Any] = {"rope_theta": self.theta, "rope_parameters": parameters}
        if scaling is not None:
            out["rope_scaling"] = {**scaling, "rope_theta": self.theta}
        return out


@dataclass(frozen=True)
class TextConfig:
    """The decoder: a Llama model with grouped-query attention."""

    rope: RopeConfig
    vocab_size: int = 49280
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    max_positions: int = 8192
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "text_config", "vocab_size", "hidden_size", "intermediate_size")
        _positive(self, "text_config", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _divides("text_config", "num_attention_heads", self.num_heads, self.num_kv_heads)
        _one_of("text_config.hidden_act", self.hidden_act, ACTIVATIONS)
        if self.head_dim % 2:
            raise ConfigError(
                f"text_config.head_dim is {self.head_dim}; rotary positions turn pairs of "
                "channels, so it must be even"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> TextConfig:
        """Build from the ``text_config`` object of a config.json."""
        where = "config.json text_config"
        if data.get("model_type", "llama") != "llama":
            raise ConfigError(f"{where}.model_type is {data['model_type']!r}, expected 'llama'")
        get = _Reader(where, data, _TEXT_DEFAULTS)
        hidden, heads = get.integer("hidden_size"), get.integer("num_attention_heads")
        if data.get("head_dim") is None:
            _divides("text_config", "hidden_size", hidden, heads)
        kv_heads = data.get("num_key_value_heads")
        eos = data.get("eos_token_id")
        return cls(
            rope=RopeConfig.from_hf(data),
            vocab_size=get.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_layers=get.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else get.integer("num_key_value_heads"),
            head_dim=hidden // heads if data.get("head_dim") is None else get.integer("head_dim"),
            max_positions=get.integer("max_position_embeddings"),
            hidden_act=_activation_name(get.string("hidden_act")),
            rms_norm_eps=get.number("rms_norm_eps"),
            attention_bias=bool(get.value("attention_bias")),
            mlp_bias=bool(get.value("mlp_bias")),
            bos_token_id=data.get("bos_token_id"),
            eos_token_ids=as_ids(eos),
            pad_token_id=data.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` object for a config.json."""
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        if eos is not None and len(eos) == 1:
            eos = eos[0]
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "hidden_act": self.hidden_act,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            **self.rope.to_hf(),
        }


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and the bridge between them.

    ``tied`` says that lm_head shares the token embedding; ``embedding_dim`` says that the model
    ends in a Linear(text hidden → embedding_dim) for retrieval (ColSmol) and has no lm_head.
    Both are decided by the checkpoint's weights, not by its config file.
    """

    vision: VisionConfig
    text: TextConfig
    scale: int
    image_token_id: int
    tied: bool = False
    embedding_dim: int | None = None
    model_type: str = "idefics3"

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
        """S: visual tokens that one full tile becomes, (side / scale)²."""
        return (self.vision.side // self.scale) ** 2

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from a whole config.json. Raises ConfigError naming the key at fault."""
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
        get = _Reader(where, data, {})
        return cls(
            vision=VisionConfig.from_hf(data["vision_config"]),
            text=TextConfig.from_hf(data["text_config"]),
            scale=get.integer("scale_factor"),
            image_token_id=get.integer("image_token_id"),
            tied=bool(data.get("tie_word_embeddings", False)),
            model_type=model_type,
        )

    def to_hf(self) -> dict[str, Any]:
        """A complete config.json, readable by transformers 4 and 5 and by other engines."""
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
        """The same widths with fewer (or more) layers; None keeps a tower's own."""
        return replace(
            self,
            vision=replace(self.vision, num_layers=vision or self.vision.num_layers),
            text=replace(self.text, num_layers=text or self.text.num_layers),
        )


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from a config value that may be null, one id or a list of ids."""
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    return tuple(int(item) for item in value)


class _Reader:
    """Typed access to one JSON object; every refusal names the file, the key and the value."""

    def __init__(self, where: str, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where, self.data, self.defaults = where, data, defaults

    def value(self, key: str) -> Any:
        if self.data.get(key) is not None:
            return self.data[key]
        if key in self.defaults:
            return self.defaults[key]
        raise ConfigError(f"{self.where} has no {key}; it changes results, so there is no default")

    def integer(self, key: str) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected an integer")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected a number")
        return float(value)

    def string(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected a string")
        return value

    def square(self, key: str) -> int:
        """An edge length that may be written as one integer or as two equal ones."""
        value = self.value(key)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected one integer (square)")
        return value


def _activation_name(name: str) -> str:
    return "silu" if name == "swish" else name


def _positive(config: object, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{where}.{name} is {value}, expected a positive integer")


def _divides(where: str, name: str, total: int, parts: int) -> None:
    if parts < 1 or total % parts:
        kind = "key/value heads" if name == "num_attention_heads" else "attention heads"
        raise ConfigError(f"{where}.{name} {total} is not divisible by its {parts} {kind}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, expected one of {list(allowed)}")
