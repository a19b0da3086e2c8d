"""Variations of published folders: the newer layout, MLX's names, one that contradicts itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.published import folders
from tests.published.checkpoints import IDEFICS3_8B, SMOLDOCLING
from tests.published.forms import Published
from tests.published.smol import SMOLVLM2_256M, SMOLVLM_2B_FIRST, SMOLVLM_256M
from tests.published.test_parity import LOGITS, assert_same, chat, image

import smolstack
from smolstack.errors import CheckpointError
from smolstack.interop.reference import load_model

_ROPE = ("rope_theta", "rope_scaling")


def newer(published: Published) -> Published:
    """As transformers 5 saves it: other files, and other names for the same settings."""
    config = {key: value for key, value in published.config.items() if key != "torch_dtype"}
    text = dict(config["text_config"])
    rope = {key: text.pop(key) for key in _ROPE if key in text}
    scaling = rope.get("rope_scaling") or {"rope_type": "default"}
    text["rope_parameters"] = {**scaling, "rope_theta": float(rope["rope_theta"])}
    text["dtype"] = text.pop("torch_dtype")
    # Its writer writes class defaults out.
    preprocessor = {
        "max_image_size": {"longest_edge": 364},
        **published.preprocessor,
        "return_row_col_info": False,
    }
    (template,) = published.files.values()
    assert isinstance(template, dict)
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer: dict[str, Any] = {
        key: value
        for key, value in published.tokenizer.items()
        if key not in ("additional_special_tokens", "tokenizer_class", *named)
    }
    return replace(
        published,
        repository=f"{published.repository}, saved by transformers 5",
        config={**config, "text_config": text, "dtype": "bfloat16"},
        preprocessor={},
        processor={
            "image_processor": preprocessor,
            "image_seq_len": 169 if published is IDEFICS3_8B else 64,
            "processor_class": published.preprocessor["processor_class"],
        },
        tokenizer={
            **tokenizer,
            "backend": "tokenizers",
            "extra_special_tokens": named,
            "tokenizer_class": "TokenizersBackend",
        },
        files={"chat_template.jinja": str(template["chat_template"])},
    )


@pytest.mark.parametrize(
    "published",
    [newer(SMOLVLM_256M), newer(IDEFICS3_8B), newer(SMOLVLM2_256M)],
    ids=lambda one: one.repository,
)
def test_the_layout_of_transformers_5(published: Published, tmp_path: Path) -> None:
    assert_same(folders.write(published, tmp_path / "model"), published.config["model_type"])


def test_an_mlx_conversion_in_bfloat16(tmp_path: Path) -> None:
    original = folders.write(SMOLDOCLING, tmp_path / "original")
    folder = folders.write(SMOLDOCLING, tmp_path / "mlx")
    state = load_file(original / "model.safetensors")
    renamed = {}
    for name, tensor in state.items():
        own = name.removeprefix("model.").replace("text_model.", "language_model.")
        own = own.replace("lm_head.", "language_model.lm_head.")
        if name.endswith("patch_embedding.weight"):
            renamed[own] = tensor.permute(0, 2, 3, 1).contiguous()
        else:
            renamed[own] = tensor
    save_file(renamed, folder / "model.safetensors", {"format": "mlx"})
    vlm = smolstack.load(folder, dtype="float32")
    batch = vlm.processor([chat(image())], split=False)
    inputs = {"input_ids": batch.token_ids, "pixel_values": batch.tiles[None]}
    with torch.inference_mode():
        expected = load_model(original)(**inputs).logits
        assert (vlm.model(batch) - expected).abs().max() <= LOGITS


def test_settings_that_contradict_the_tower_are_refused_by_name(tmp_path: Path) -> None:
    folder = folders.write(SMOLVLM_2B_FIRST, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tiles of 364 pixels, a grid of 26x26 patches"):
        smolstack.load(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "max_image_size": {"longest_edge": 384}}))
    with pytest.raises(CheckpointError, match=r"image_seq_len 169, .* 81"):
        smolstack.load(folder)
