"""The published checkpoints of the family, as data.

Not used when loading: a checkpoint is read from its own files. Presets are used for randomly
initialized models of published shapes (``smolstack new``), tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.errors import ConfigError
from smolstack.processor.settings import ImageSettings

_SIGLIP_BASE_512 = VisionConfig(768, 3072, 12, 12, image_size=512, patch_size=16)
_SIGLIP_SO400M_384 = VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14)
_SIGLIP_SO400M_364 = VisionConfig(1152, 4304, 27, 16, image_size=364, patch_size=14)

_LLAMA3_ROPE = RopeConfig(
    theta=500000.0,
    type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens that prompts need; other ids are ordinary text.

    Attributes:
        ids: token text → id.
        bos, eos, pad: which of them begin a prompt, end an answer, pad a batch.
        add_bos: whether the tokenizer itself puts ``bos`` before every text.
        ends: further tokens that end an answer, from generation_config.json.
        start: generation_config.json's ``bos_token_id``, if it is another than ``bos``.
    """

    ids: dict[str, int]
    bos: str
    eos: str
    pad: str
    add_bos: bool = False
    ends: tuple[str, ...] = ()
    start: str | None = None


# Chat templates as published; SmolVLM's and Idefics3's drop contents that are plain strings.
_TURNS = (
    "{{% for message in messages %}}{{{{message['role']{upper}}}}}"
    "{{% if message['content'][0]['type'] == 'image' %}}{{{{':'}}}}"
    "{{% else %}}{{{{': '}}}}{{% endif %}}"
    "{{% for line in message['content'] %}}{{% if line['type'] == 'text' %}}{{{{line['text']}}}}"
    "{{% elif line['type'] == 'image' %}}{{{{ '<image>' }}}}{{% endif %}}{{% endfor %}}"
    "<end_of_utterance>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ 'Assistant:' }}}}{{% endif %}}"
)
SMOLVLM_TEMPLATE = "<|im_start|>" + _TURNS.format(upper=" | capitalize")
IDEFICS3_TEMPLATE = "<|begin_of_text|>" + _TURNS.format(upper=".capitalize()")
GRANITE_TEMPLATE = """{%- for message in messages -%}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'image' -%}
{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end_of_text|>
' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_of_role|>assistant' -}}
{%- if controls -%}{{- ' ' + controls | tojson() -}}{%- endif -%}
{{- '<|end_of_role|>' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Preset:
    """A published shape: hub id, sizes, preprocessing, special tokens.

    Attributes:
        video_edge: ``video_sampling.video_size`` of models trained on videos.
        template: the chat template.
        leaves_out: files, and keys of preprocessor_config.json, that the published model lacks.
        config_keys: top-level keys of config.json whose published values nothing reads.
        added_tokens: content of added_tokens.json; its ids may lie outside the vocabulary.
    """

    name: str
    hub_id: str
    config: ModelConfig
    settings: ImageSettings
    tokens: SpecialTokens
    video_edge: int | None = None
    template: str = SMOLVLM_TEMPLATE
    leaves_out: tuple[str, ...] = ()
    config_keys: Mapping[str, int] = field(default_factory=dict)
    added_tokens: Mapping[str, int] = field(default_factory=dict)


def _smol_text(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> TextConfig:
    return TextConfig(
        rope=RopeConfig(theta=100000.0),
        vocab_size=49280,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_positions=8192,
        bos_token_id=1,
        eos_token_ids=(2,),  # generation_config.json has <end_of_utterance>
        pad_token_id=2,
    )


def _grid_tokens(first: int, side: int = 6) -> dict[str, int]:
    edge = range(1, side + 1)
    names = [f"<row_{row}_col_{col}>" for row in edge for col in edge]
    return {name: first + offset for offset, name in enumerate(names)}


_SMOL_TOKENS = SpecialTokens(
    ids={
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<global-img>": 49152,
        **_grid_tokens(49153),
        "<fake_token_around_image>": 49189,
        "<image>": 49190,
        "<end_of_utterance>": 49279,
    },
    bos="<|im_start|>",
    eos="<end_of_utterance>",
    pad="<|im_end|>",
    start="<|endoftext|>",
)
# No single tokens for <global-img> and the grid: they are plain text in this vocabulary.
_SMOL_2B_TOKENS = SpecialTokens(
    ids={
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<fake_token_around_image>": 49152,
        "<image>": 49153,
        "<end_of_utterance>": 49154,
    },
    bos="<|im_start|>",
    eos="<end_of_utterance>",
    pad="<|im_end|>",
    start="<|endoftext|>",
)
_LLAMA3_TOKENS = SpecialTokens(
    ids={
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<fake_token_around_image>": 128256,
        "<image>": 128257,
        "<end_of_utterance>": 128258,
    },
    bos="<|begin_of_text|>",
    eos="<end_of_utterance>",
    pad="<|reserved_special_token_0|>",
    add_bos=True,
    ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)
# Markers of rows and columns up to 4x4; further ones are plain text in this vocabulary.
_GRANITE_TOKENS = SpecialTokens(
    ids={
        "<|end_of_text|>": 100257,
        "<|start_of_role|>": 100264,
        "<|end_of_role|>": 100265,
        "<global-img>": 100268,
        "<fake_token_around_image>": 100269,
        "<image>": 100270,
        **_grid_tokens(100271, side=4),
    },
    bos="<|start_of_role|>",
    eos="<|end_of_text|>",
    pad="<|end_of_text|>",
)

_SMALL = ImageSettings(longest_edge=2048, tile_edge=512)
_TEXT_256M = _smol_text(576, 30, 9, 3, 1536)
_TEXT_500M = _smol_text(960, 32, 15, 5, 2560)
_TEXT_2B = replace(_smol_text(2048, 24, 32, 32, 8192), max_positions=16384)
_IDEFICS3_TEXT = TextConfig(
    rope=_LLAMA3_ROPE,
    vocab_size=128259,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
    pad_token_id=128002,
)
_256M = ModelConfig(_SIGLIP_BASE_512, _TEXT_256M, scale=4, image_token_id=49190)
_500M = ModelConfig(_SIGLIP_BASE_512, _TEXT_500M, scale=4, image_token_id=49190)
_2B_TEXT_V1 = replace(
    _TEXT_2B,
    rope=RopeConfig(theta=273768.0),
    vocab_size=49155,
    bos_token_id=0,
    eos_token_ids=(0,),
)
_2B_TEXT_V2 = replace(_TEXT_2B, rope=RopeConfig(theta=130000.0), max_positions=8192)
_GRANITE_TEXT = replace(
    _TEXT_256M,
    vocab_size=100352,
    bos_token_id=100264,
    eos_token_ids=(100257,),
    pad_token_id=100257,
)

# Idefics3's padding token, which every config.json but granite-docling's has at its top level; it
# lies outside the smaller vocabularies.
_IDEFICS3_PAD = {"pad_token_id": 128002}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "smolvlm-256m",
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            _256M,
            _SMALL,
            _SMOL_TOKENS,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smolvlm-500m",
            "HuggingFaceTB/SmolVLM-500M-Instruct",
            _500M,
            _SMALL,
            _SMOL_TOKENS,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smolvlm2-256m",
            "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
            replace(_256M, model_type="smolvlm"),
            _SMALL,
            _SMOL_TOKENS,
            video_edge=512,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smolvlm2-500m",
            "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            replace(_500M, model_type="smolvlm"),
            _SMALL,
            _SMOL_TOKENS,
            video_edge=512,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smolvlm-2.2b",
            "HuggingFaceTB/SmolVLM-Instruct",
            ModelConfig(_SIGLIP_SO400M_384, _2B_TEXT_V1, scale=3, image_token_id=49153),
            ImageSettings(longest_edge=1536, tile_edge=384),
            _SMOL_2B_TOKENS,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smolvlm2-2.2b",
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            ModelConfig(
                _SIGLIP_SO400M_384,
                _2B_TEXT_V2,
                scale=3,
                image_token_id=49190,
                model_type="smolvlm",
            ),
            ImageSettings(longest_edge=1536, tile_edge=384),
            _SMOL_TOKENS,
            video_edge=384,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "idefics3-8b",
            "HuggingFaceM4/Idefics3-8B-Llama3",
            ModelConfig(_SIGLIP_SO400M_364, _IDEFICS3_TEXT, scale=2, image_token_id=128257),
            ImageSettings(longest_edge=1456, tile_edge=364),
            _LLAMA3_TOKENS,
            template=IDEFICS3_TEMPLATE,
            leaves_out=("processor_config.json", "max_image_size"),
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "smoldocling-256m",
            "docling-project/SmolDocling-256M-preview",
            _256M,
            _SMALL,
            _SMOL_TOKENS,
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "granite-docling-258m",
            "ibm-granite/granite-docling-258M",
            ModelConfig(_SIGLIP_BASE_512, _GRANITE_TEXT, scale=4, image_token_id=100270, tied=True),
            _SMALL,
            _GRANITE_TOKENS,
            template=GRANITE_TEMPLATE,
            config_keys={"bos_token_id": 100264, "eos_token_id": 100257, "pad_token_id": 100257},
            added_tokens={"<end_of_utterance>": 100352},
        ),
        Preset(
            "colsmol-256m",
            "vidore/colSmol-256M",
            replace(_256M, embedding_dim=128),
            _SMALL,
            _SMOL_TOKENS,
            leaves_out=("generation_config.json",),
            config_keys=_IDEFICS3_PAD,
        ),
        Preset(
            "colsmol-500m",
            "vidore/colSmol-500M",
            replace(_500M, embedding_dim=128),
            _SMALL,
            _SMOL_TOKENS,
            leaves_out=("generation_config.json",),
            config_keys=_IDEFICS3_PAD,
        ),
    )
}


def preset(name: str) -> Preset:
    """Look up a preset by name. Raises ConfigError listing the available names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
