"""Configs: both generations of files, strict where a guess would change answers."""

from __future__ import annotations

from typing import Any

import pytest

from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.errors import ConfigError
from smolstack.family import PRESETS, preset


def hf_config(**changes: Any) -> dict[str, Any]:
    """A small config.json; ``text_x=…`` and ``vision_x=…`` reach inside, None removes a key."""
    data: dict[str, Any] = {
        "model_type": "idefics3",
        "scale_factor": 2,
        "image_token_id": 90,
        "vision_config": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 24,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
        },
    }
    for key, value in changes.items():
        part, _, name = key.partition("_")
        inside = part in ("text", "vision") and name != "config"
        target, name = (data[f"{part}_config"], name) if inside else (data, key)
        if value is None:
            target.pop(name)
        else:
            target[name] = value
    return data


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_back(name: str) -> None:
    config = PRESETS[name].config
    read = ModelConfig.from_hf(config.to_hf())
    assert (read.vision, read.text, read.scale) == (config.vision, config.text, config.scale)
    assert read.image_token_id == config.image_token_id


def test_sizes_that_old_files_leave_out_are_the_library_s() -> None:
    data = hf_config()
    data["vision_config"] = {"image_size": 384, "patch_size": 14}
    data["scale_factor"] = 3
    vision = ModelConfig.from_hf(data).vision
    assert (vision.hidden_size, vision.num_heads, vision.num_layers) == (1152, 16, 12)
    assert (vision.intermediate_size, vision.side) == (3072, 27)
    text = TextConfig.from_hf({"rope_theta": 1.0, "rms_norm_eps": 1e-5})
    assert (text.hidden_size, text.num_layers, text.num_heads, text.num_kv_heads) == (
        4096,
        32,
        32,
        32,
    )


@pytest.mark.parametrize(
    "place",
    [
        {"rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        {"rope_scaling": {"rope_theta": 5.0, "type": "default"}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}},
    ],
)
def test_rope_theta_is_found_in_old_and_new_places(place: dict[str, Any]) -> None:
    assert RopeConfig.from_hf(place) == RopeConfig(theta=5.0)


def test_llama3_scaling_is_read_from_old_files() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = RopeConfig.from_hf({"rope_theta": 500000.0, "rope_scaling": scaling})
    assert rope == preset("idefics3-8b").config.text.rope


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_rope_theta": None}, "text_config has no rope_theta"),
        ({"text_rms_norm_eps": None}, "text_config has no rms_norm_eps"),
        ({"scale_factor": None}, "config.json has no scale_factor"),
        ({"image_token_id": None}, "config.json has no image_token_id"),
        ({"vision_config": None}, "has no vision_config object"),
        ({"text_config": "llama"}, "has no text_config object"),
        ({"scale_factor": 3}, r"scale_factor 3 does not divide the patch grid 8×8"),
        ({"scale_factor": "2"}, "scale_factor is '2', expected an integer"),
        ({"image_token_id": 100}, "image_token_id is 100, outside the vocabulary of 100"),
        ({"vision_num_attention_heads": 5}, "hidden_size 32 is not divisible by its 5 attention"),
        ({"vision_hidden_act": "sine"}, "hidden_act is 'sine', expected one of"),
        ({"vision_image_size": [64, 32]}, "image_size is .*expected one integer"),
        ({"vision_patch_size": 65}, "patch_size is 65, larger than"),
        ({"text_num_key_value_heads": 4}, "num_attention_heads 6 is not divisible by its 4"),
        ({"text_num_attention_heads": 7}, "hidden_size 24 is not divisible by its 7"),
        ({"text_model_type": "qwen2"}, "model_type is 'qwen2', expected 'llama'"),
        ({"text_head_dim": 5}, "head_dim is 5"),
        ({"text_rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn', expected one of"),
        ({"text_rope_scaling": {"rope_type": "llama3"}}, "has no factor"),
        ({"text_qk_layer_norms": True}, "qk_layer_norms is True; only False is supported"),
        (
            {"text_rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; only 1.0 is supported",
        ),
        ({"text_rope_theta": True}, "rope_theta is True, expected a number"),
    ],
)
def test_a_config_that_cannot_be_built_names_key_and_value(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(hf_config(**change))


def test_head_size_may_differ_from_hidden_over_heads() -> None:
    text = ModelConfig.from_hf(hf_config(text_head_dim=16, text_num_attention_heads=4)).text
    assert (text.head_dim, text.hidden_size, text.num_heads) == (16, 24, 4)


def test_end_tokens_may_be_one_or_several() -> None:
    for value, ids in ((7, (7,)), ([7, 8], (7, 8)), (None, ())):
        data = {"rope_theta": 1.0, "rms_norm_eps": 1e-5, "eos_token_id": value}
        assert TextConfig.from_hf(data).eos_token_ids == ids


def test_a_grid_of_27_ignores_the_last_six_pixels() -> None:
    assert VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14).side == 27


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("smolvlm-256m", 64),
        ("smolvlm-500m", 64),
        ("smolvlm-2.2b", 81),
        ("smolvlm2-2.2b", 81),
        ("idefics3-8b", 169),
        ("granite-docling-258m", 64),
    ],
)
def test_published_tokens_per_tile(name: str, tokens: int) -> None:
    assert preset(name).config.tokens_per_tile == tokens


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'smol', .*smolvlm-256m"):
        preset("smol")
