"""What cannot be bridged is said in a sentence, before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.bridging.conftest import MakeText, MakeVision

import smolstack
from smolstack.bridging import plan_bridge
from smolstack.errors import CheckpointError, ConfigError, SmolstackError


def change(folder: Path, name: str, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**json.loads((folder / name).read_text()), **values}
    kept = {key: value for key, value in data.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("chosen", "scale"),
    [({}, 1), ({"scale": 3}, 3), ({"visual_tokens": 9}, 2), ({"visual_tokens": 1}, 6)],
)
def test_the_scale_comes_from_the_grid(
    make_vision: MakeVision, make_text: MakeText, chosen: dict[str, int], scale: int
) -> None:
    """6×6 patches: 36 tokens are the nearest to the usual 64."""
    planned = plan_bridge(make_vision(), make_text(), **chosen)  # type: ignore[arg-type]
    assert planned.config.scale == scale
    assert (planned.settings.tile_edge, planned.settings.longest_edge) == (48, 192)
    assert planned.settings.mean == (0.4, 0.5, 0.6)
    assert planned.settings.resample == 3


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            {"visual_tokens": 64},
            "visual_tokens is 64; the tower's grid of 6×6 patches can be merged by scales "
            "1 (36 tokens), 2 (9 tokens), 3 (4 tokens), 6 (1 tokens)",
        ),
        ({"scale": 4}, "scale is 4; the tower's grid of 6×6"),
        ({"scale": 2, "visual_tokens": 9}, "scale and visual_tokens"),
        ({"longest_edge": 40}, "longest_edge is 40, expected at least the 48 pixels of a tile"),
        ({"dtype": "int8"}, "dtype is 'int8', expected auto or one of"),
    ],
)
def test_wishes_that_cannot_be(
    make_vision: MakeVision, make_text: MakeText, chosen: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_bridge(make_vision(), make_text(), **chosen)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"model_type": "siglip2_vision_model"}, "variable resolution"),
        ("config.json", {"model_type": "clip"}, "has model_type 'clip', expected a checkpoint of"),
        ("config.json", {"hidden_size": 30}, "1 wrong|do not|does not match its config"),
        ("config.json", {"num_channels": 1}, "num_channels is 1, expected 3: images are"),
        ("config.json", {"hidden_act": "mish"}, "hidden_act is 'mish', expected one of"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantized by AWQ"),
    ],
)
def test_vision_towers_that_are_something_else(
    make_vision: MakeVision, make_text: MakeText, file: str, values: dict[str, Any], said: str
) -> None:
    vision = make_vision()
    change(vision, file, **values)
    with pytest.raises(SmolstackError, match=said):
        plan_bridge(vision, make_text())


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"model_type": "qwen2"}, "has model_type 'qwen2', expected a checkpoint"),
        ("config.json", {"tie_word_embeddings": False}, "has no lm_head.weight, and its config"),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'yarn', expected one of",
        ),
        ("config.json", {"num_hidden_layers": 3}, "9 missing: model.layers.2.input_layernorm"),
        ("config.json", {"quantization": {"bits": 4}}, "has quantized weights"),
        (
            "tokenizer_config.json",
            {"eos_token": "<eos>"},
            "names eos_token '<eos>', pad_token '<eos>', which",
        ),
    ],
)
def test_text_towers_that_are_something_else(
    make_vision: MakeVision, make_text: MakeText, file: str, values: dict[str, Any], said: str
) -> None:
    text = make_text()
    change(text, file, **values)
    with pytest.raises(SmolstackError, match=said):
        plan_bridge(make_vision(), text)


def test_a_folder_without_a_fast_tokenizer(make_vision: MakeVision, make_text: MakeText) -> None:
    text = make_text()
    (text / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json.*AutoTokenizer"):
        plan_bridge(make_vision(), text)


def test_files_of_other_times_are_read(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """Buffers that older versions stored, a head beside its twin, keys that are newer than a file,
    a tower without its image processor."""
    text, vision = make_text(), make_vision(processor=False)
    weights = load_file(text / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, text / "model.safetensors")
    change(text, "config.json", rope_parameters=None, rms_norm_eps=None, head_dim=None)
    planned = plan_bridge(vision, text)
    assert planned.config.tied
    assert (planned.config.text.rope.theta, planned.config.text.rms_norm_eps) == (10000.0, 1e-6)
    notes = " ".join(planned.notes)
    assert "no preprocessor_config.json" in notes
    assert "config.json has no rope_theta; it is 10000, LlamaConfig's" in notes
    assert "left out the pooling head, which no connector reads" in notes
    planned.write(tmp_path / "bridged")


def test_a_tower_alone_is_told_what_makes_a_model_of_it(
    make_vision: MakeVision, make_text: MakeText
) -> None:
    with pytest.raises(CheckpointError, match=r"language model.* smolstack bridge VIS"):
        smolstack.load(make_text())
    with pytest.raises(CheckpointError, match=r"vision tower .* smolstack bridge /"):
        smolstack.load(make_vision(whole=True))


def test_an_adapter_beside_a_plain_model_is_not_passed_over(
    make_vision: MakeVision, make_text: MakeText
) -> None:
    text = make_text()
    (text / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter .* merge it first"):
        plan_bridge(make_vision(), text)


def test_a_bare_llama_is_bridged_when_its_head_is_its_embedding(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """A LlamaModel's names have no prefix; without ties its head would be missing."""
    text = make_text()
    weights = load_file(text / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, text / "model.safetensors")
    bridged = plan_bridge(make_vision(), text).write(tmp_path / "bridged")
    table = smolstack.load(bridged).model.decoder.embedding.weight
    assert torch.equal(table[:330], bare["embed_tokens.weight"])
