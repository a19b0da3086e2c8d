"""The decoder's sizes and rotary position settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolstack.config.reading import (
    ACTIVATIONS,
    Reader,
    activation_name,
    as_ids,
    divides,
    one_of,
    positive,
    refuse_other_values,
)
from smolstack.errors import ConfigError

# Class defaults of transformers 5.24's LlamaConfig.
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
ROPE_TYPES = ("default", "linear", "llama3")
# Variants that the library supports but no checkpoint of this family uses; a file that requests one
# would be computed wrongly without any weight missing.
_UNSUPPORTED = {"qk_layer_norms": False, "use_resampler": False, "partial_rotary_factor": 1.0}


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
        one_of("text_config rope_type", self.type, ROPE_TYPES)
        if self.theta <= 0:
            raise ConfigError(f"text_config.rope_theta is {self.theta}, expected a positive number")

    @classmethod
    def from_hf(cls, text: Mapping[str, Any], where: str = "config.json text_config") -> RopeConfig:
        """Read from a ``text_config``: old files have a top-level rope_theta, new ones nest it."""
        inner = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{where}.rope_parameters is {inner!r}, expected an object")
        refuse_other_values(f"{where}.rope_parameters", inner, _UNSUPPORTED)
        theta = inner.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise ConfigError(
                f"{where} has no rope_theta (looked at rope_theta, rope_parameters.rope_theta and "
                "rope_scaling.rope_theta); it changes every answer, so there is no default"
            )
        get = Reader(f"{where}.rope_parameters", {**inner, "rope_theta": theta}, {})
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
        positive(self, "text_config", "vocab_size", "hidden_size", "intermediate_size")
        positive(self, "text_config", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        divides("text_config", "num_attention_heads", self.num_heads, self.num_kv_heads)
        one_of("text_config.hidden_act", self.hidden_act, ACTIVATIONS)
        if self.head_dim % 2:
            raise ConfigError(
                f"text_config.head_dim is {self.head_dim}; rotary positions turn pairs of "
                "channels, so it must be even"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str = "config.json text_config") -> TextConfig:
        """Build from the ``text_config`` object of a config.json, or from a LlamaForCausalLM's.

        Args:
            where: name of the object in error messages.
        """
        if data.get("model_type", "llama") != "llama":
            raise ConfigError(f"{where}.model_type is {data['model_type']!r}, expected 'llama'")
        refuse_other_values(where, data, _UNSUPPORTED)
        get = Reader(where, data, _TEXT_DEFAULTS)
        hidden, heads = get.integer("hidden_size"), get.integer("num_attention_heads")
        if data.get("head_dim") is None:
            divides("text_config", "hidden_size", hidden, heads)
        kv_heads = data.get("num_key_value_heads")
        eos = data.get("eos_token_id")
        return cls(
            rope=RopeConfig.from_hf(data, where),
            vocab_size=get.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_layers=get.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else get.integer("num_key_value_heads"),
            head_dim=hidden // heads if data.get("head_dim") is None else get.integer("head_dim"),
            max_positions=get.integer("max_position_embeddings"),
            hidden_act=activation_name(get.string("hidden_act")),
            rms_norm_eps=get.number("rms_norm_eps"),
            attention_bias=bool(get.value("attention_bias")),
            mlp_bias=bool(get.value("mlp_bias")),
            bos_token_id=data.get("bos_token_id"),
            eos_token_ids=as_ids(eos),
            pad_token_id=data.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` object for a config.json."""
        ids = list(self.eos_token_ids)
        eos = ids if len(ids) > 1 else next(iter(ids), None)
        return {
            # llama.cpp's converter reads the decoder's class only from here.
            "architectures": ["LlamaForCausalLM"],
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
