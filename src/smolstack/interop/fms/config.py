"""Converts configs between the Foundation Model Stack's form and smolstack's, in both
directions.
"""

# No postponed annotations: FMS's ModelConfig.load finds nested configs by their classes.
from dataclasses import dataclass, field
from typing import Any

from fms.models.llama import LLaMAConfig
from fms.models.siglip_vision import SiglipVisionConfig
from fms.utils.config import ModelConfig as FMSConfig

from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.errors import ConfigError
from smolstack.family import PRESETS


@dataclass
class Idefics3Config(FMSConfig):  # type: ignore[misc]
    """FMS configs of both towers, and of the connector.

    Attributes:
        vision_config, text_config: sizes of FMS's SigLIP and LLaMA.
        scale: s, edge of the block of patches that becomes one visual token.
        image_token_id: the id at the positions of visual tokens.
        embedding_dim: width of a retrieval head that replaces the language head (ColSmol).
        model_type: "idefics3" or "smolvlm", the name in Hugging Face files.
        bos_token_id, eos_token_ids, pad_token_id: as in the checkpoint's config.
        fused_weights: one matrix for query, key and value, and one for gate and up.
    """

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text_config: LLaMAConfig = field(default_factory=LLaMAConfig)
    scale: int = 4
    image_token_id: int = 0
    embedding_dim: int | None = None
    model_type: str = "idefics3"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fused_weights: bool = True

    def __post_init__(self) -> None:
        # JSON files, and keyword arguments read from them, contain lists.
        self.eos_token_ids = tuple(self.eos_token_ids)


# FMS's names of activations with another name here.
_ACTIVATIONS = {"gelu-tanh": "gelu_pytorch_tanh", "swish": "silu"}


def to_fms_config(config: ModelConfig) -> Idefics3Config:
    """Convert a smolstack config to an FMS config.

    Raises:
        ConfigError: FMS's modules do not support one of the values.
    """
    vision, text = config.vision, config.text
    if text.head_dim * text.num_heads != text.hidden_size:
        raise ConfigError(
            f"text_config.head_dim is {text.head_dim}; the Foundation Model Stack's LLaMA has "
            f"heads of hidden_size / num_attention_heads = {text.hidden_size // text.num_heads}"
        )
    if int(vision.intermediate_size / vision.hidden_size * vision.hidden_size) != (
        vision.intermediate_size
    ):
        raise ConfigError(
            f"vision_config.intermediate_size {vision.intermediate_size} cannot be expressed "
            f"as a factor of hidden_size {vision.hidden_size}, as the Foundation Model Stack's "
            "SigLIP requires"
        )
    return Idefics3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            nlayers=vision.num_layers,
            nheads=vision.num_heads,
            num_channels=vision.num_channels,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text_config=LLaMAConfig(
            src_vocab_size=text.vocab_size,
            emb_dim=text.hidden_size,
            norm_eps=text.rms_norm_eps,
            nheads=text.num_heads,
            kvheads=text.num_kv_heads,
            nlayers=text.num_layers,
            hidden_grow_factor=_growth(text.intermediate_size, text.hidden_size),
            multiple_of=1,
            activation_fn=text.hidden_act,
            max_expected_seq_len=text.max_positions,
            attn_bias=text.attention_bias,
            mlp_bias=text.mlp_bias,
            tie_heads=config.tied,
            rope_theta=text.rope.theta,
            rope_scaling=_rope_scaling(text.rope),
        ),
        scale=config.scale,
        image_token_id=config.image_token_id,
        embedding_dim=config.embedding_dim,
        model_type=config.model_type,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        pad_token_id=text.pad_token_id,
    )


def to_smolstack_config(config: Idefics3Config) -> ModelConfig:
    """Convert an FMS config to a smolstack config; the inverse of :func:`to_fms_config`."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    scaling = dict(text.rope_scaling)
    rope = RopeConfig(
        theta=text.rope_theta,
        type=scaling.pop("rope_type", "default"),
        original_max_positions=scaling.pop(
            "original_max_position_embeddings", RopeConfig.original_max_positions
        ),
        **scaling,
    )
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.nlayers,
            num_heads=vision.nheads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.num_channels,
            hidden_act=_activation(vision.hidden_act),
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text=TextConfig(
            rope=rope,
            vocab_size=text.src_vocab_size,
            hidden_size=text.emb_dim,
            intermediate_size=int(text.hidden_grow_factor * text.emb_dim),
            num_layers=text.nlayers,
            num_heads=text.nheads,
            num_kv_heads=text.kvheads or text.nheads,
            head_dim=text.emb_dim // text.nheads,
            max_positions=text.max_expected_seq_len,
            hidden_act=_activation(text.activation_fn),
            rms_norm_eps=text.norm_eps,
            attention_bias=text.attn_bias,
            mlp_bias=text.mlp_bias,
            bos_token_id=config.bos_token_id,
            eos_token_ids=tuple(config.eos_token_ids),
            pad_token_id=config.pad_token_id,
        ),
        scale=config.scale,
        image_token_id=config.image_token_id,
        tied=text.tie_heads,
        embedding_dim=config.embedding_dim,
        model_type=config.model_type,
    )


def variants() -> dict[str, Idefics3Config]:
    """Return an FMS config per published checkpoint, by preset name."""
    return {name: to_fms_config(preset.config) for name, preset in PRESETS.items()}


def _activation(name: str) -> str:
    """Return the Hugging Face name of an FMS activation."""
    return _ACTIVATIONS.get(name.lower(), name.lower())


def _growth(inner: int, width: int) -> float:
    """Return the factor from which FMS computes ``inner`` as int(factor · width)."""
    factor = inner / width
    return factor if int(factor * width) == inner else (inner + 0.5) / width


def _rope_scaling(rope: RopeConfig) -> dict[str, Any]:
    if rope.type == "default":
        return {}
    if rope.type != "llama3":
        raise ConfigError(
            f"text_config rope_type is {rope.type!r}; the Foundation Model Stack's LLaMA has "
            "'default' and 'llama3'"
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
