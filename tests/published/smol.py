"""SmolVLM and SmolVLM2, as data; see :mod:`tests.published.checkpoints`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.published.forms import (
    BASE_TEMPLATE,
    IDEFICS3_TEMPLATE,
    INSTRUCT_TEMPLATE,
    SMOL,
    SMOL_2B,
    Json,
    Published,
    generation,
    image_processor,
    tokenizer_config,
)

_NAMED = {
    "end_of_utterance_token": "<end_of_utterance>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
}
SMOL_TOKENIZER = tokenizer_config(
    "Idefics3", "<|im_start|>", "<end_of_utterance>", "<|im_end|>", vocab_size=49152
)
_SMOL2_TOKENIZER = {
    **tokenizer_config("SmolVLM", "<|im_start|>", "<end_of_utterance>", "<|im_end|>"),
    **_NAMED,
    "extra_special_tokens": _NAMED,
    "model_max_length": 8192,
}
DEAD = {  # of a resampler that no checkpoint has
    "_name_or_path": "",
    "hidden_act": "silu",
    "model_type": "vllama3",
    "num_key_value_heads": 1,
    "qk_layer_norms_perceiver": False,
    "resampler_depth": 6,
    "resampler_head_dim": 96,
    "resampler_n_heads": 16,
    "resampler_n_latents": 64,
}


def _smol_text(hidden: int, heads: int, kv_heads: int, ffn: int, layers: int | None) -> Json:
    sizes = {} if layers is None else {"num_hidden_layers": layers}
    return {
        "_flash_attn_2_enabled": True,
        "_name_or_path": "None",
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": ffn,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": heads,
        **sizes,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 2,
        "perceiver_config": DEAD,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
        "use_resampler": False,
        "vocab_size": 49280,
    }


def _smol_vision(model_type: str) -> Json:
    """Of 256M and 500M: numbers of layers and of the MLP are the library's defaults."""
    return {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": model_type,
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    }


def config_json(
    family: str, image_token: int, scale: int, text: Json, vision: Json, **more: Any
) -> Json:
    return {
        "architectures": [f"{family}ForConditionalGeneration"],
        "image_token_id": image_token,
        "model_type": family.lower(),
        "pad_token_id": 128002,
        "scale_factor": scale,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vision_config": vision,
        "vocab_size": text["vocab_size"],
        **more,
    }


_TEXT_256M = _smol_text(576, 9, 3, 1536, 30)
_TEXT_500M = _smol_text(960, 15, 5, 2560, None)  # 32 layers: LlamaConfig's default
_INSTRUCT = {"chat_template.json": {"chat_template": INSTRUCT_TEMPLATE}}
_BASE = {"chat_template.json": {"chat_template": BASE_TEMPLATE}}

SMOLVLM_256M = Published(
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    config_json("Idefics3", 49190, 4, _TEXT_256M, _smol_vision("idefics3")),
    image_processor("Idefics3", 2048, 512),
    SMOL,
    SMOL_TOKENIZER,
    generation(0, 49279, 2),
    {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
    _INSTRUCT,
    preset="smolvlm-256m",
)
SMOLVLM_256M_BASE = replace(
    SMOLVLM_256M,
    repository="HuggingFaceTB/SmolVLM-256M-Base",
    config={
        **SMOLVLM_256M.config,
        "vision_config": {**_smol_vision("siglip_vision_model"), "use_base_siglip": True},
    },
    generation=generation(1, 2, 2),
    files=_BASE,
    preset=None,
)
SMOLVLM_500M = replace(
    SMOLVLM_256M,
    repository="HuggingFaceTB/SmolVLM-500M-Instruct",
    config=config_json("Idefics3", 49190, 4, _TEXT_500M, _smol_vision("idefics3")),
    preset="smolvlm-500m",
)
SMOLVLM_500M_BASE = replace(
    SMOLVLM_500M,
    repository="HuggingFaceTB/SmolVLM-500M-Base",
    generation=generation(0, 0, 2),
    files=_BASE,
    preset=None,
)

_VISION_2B = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "max_image_size": {"longest_edge": 384},
    "model_type": "idefics3",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "tie_word_embeddings": False,
    "use_base_siglip": False,
}
_TEXT_2B = {
    "_flash_attn_2_enabled": True,
    "architectures": ["VLlama3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "neftune_noise_alpha": 0.0,
    "num_hidden_layers": 24,  # 32 heads and as many for keys: LlamaConfig's defaults
    "pad_token_id": 2,
    "perceiver_config": DEAD,
    "pixel_shuffle_factor": 3,
    "qk_layer_norms": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 273768.0,
    "torch_dtype": "bfloat16",
    "use_resampler": False,
    "vocab_size": 49155,
}
SMOLVLM_2B = Published(
    "HuggingFaceTB/SmolVLM-Instruct",
    config_json("Idefics3", 49153, 3, _TEXT_2B, _VISION_2B, image_seq_len=81),
    image_processor("Idefics3", 1536, 384),
    SMOL_2B,
    SMOL_TOKENIZER,
    generation(0, 49154, 2),
    {"image_seq_len": 81, "processor_class": "Idefics3Processor"},
    _INSTRUCT,
    preset="smolvlm-2.2b",
)
SMOLVLM_2B_SYNTHETIC = replace(
    SMOLVLM_2B, repository="HuggingFaceTB/SmolVLM-Synthetic", preset=None
)
SMOLVLM_2B_BASE = replace(
    SMOLVLM_2B,
    repository="HuggingFaceTB/SmolVLM-Base",
    generation=generation(0, 0, 2),
    files=_BASE,
    preset=None,
)
# The first commits kept the numbers of Idefics3's library defaults, which this tower cannot see.
SMOLVLM_2B_FIRST = replace(
    SMOLVLM_2B,
    repository="HuggingFaceTB/SmolVLM-Instruct, first commits",
    preprocessor=image_processor("Idefics3", 1456, 364),
    processor={"image_seq_len": 169, "processor_class": "Idefics3Processor"},
    generation=generation(0, 0, 2),
    files={"chat_template.json": {"chat_template": IDEFICS3_TEMPLATE}},
    preset=None,
)


def _video(edge: int) -> Json:
    return {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": edge}}}


def _smolvlm2(name: str, text: Json, preset: str | None, video_edge: int = 512) -> Published:
    keys = {"use_reentrant_checkpointing": False, "transformers_version": "4.47.1"}
    return Published(
        name,
        {
            **config_json("SmolVLM", 49190, 4, text, _smol_vision("smolvlm_vision"), **keys),
            "torch_dtype": "float32",
            "use_cache": False,
        },
        image_processor("SmolVLM", 2048, 512, **_video(video_edge)),
        SMOL,
        _SMOL2_TOKENIZER,
        generation(0, 49279, 2, "4.47.1"),
        {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"},
        _INSTRUCT,
        preset=preset,
    )


SMOLVLM2_256M = _smolvlm2("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", _TEXT_256M, "smolvlm2-256m")
SMOLVLM2_500M = _smolvlm2(
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    {**_TEXT_500M, "num_hidden_layers": 32},
    "smolvlm2-500m",
)
SMOLVLM2_500M_FIRST = _smolvlm2(
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct, first commits", _TEXT_500M, None, video_edge=384
)
_TEXT2_2B = {
    **{key: value for key, value in _TEXT_2B.items() if not key.endswith("os_token_id")},
    "max_position_embeddings": 8192,
    "rope_theta": 130000,  # of SmolLM2-1.7B-Instruct; assumed here
    "vocab_size": 49280,
}
SMOLVLM2_2B = replace(
    SMOLVLM2_256M,
    repository="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    config={
        **SMOLVLM2_256M.config,
        "scale_factor": 3,
        "text_config": _TEXT2_2B,
        "vision_config": {**_VISION_2B, "model_type": "smolvlm_vision"},
    },
    preprocessor=image_processor("SmolVLM", 1536, 384, **_video(384)),
    processor={"image_seq_len": 81, "processor_class": "SmolVLMProcessor"},
    preset="smolvlm2-2.2b",
)
SMOLVLM2_2B_BASE = replace(
    SMOLVLM_2B,
    repository="HuggingFaceTB/SmolVLM2-2.2B-Base",
    config=config_json("Idefics3", 49190, 3, _TEXT2_2B, _VISION_2B),
    vocabulary=SMOL,
    generation=generation(1, 2, 2),
    files=_BASE,
    preset=None,
)
