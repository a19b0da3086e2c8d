"""Greedy answers are token for token those of transformers' generate, alone and in batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smolstack
from smolstack.checkpoint.new import side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import load_model, model_inputs
from smolstack.interop.weights import sharp_model
from smolstack.vlm import VLM

NEW_TOKENS = 24
FAMILIES = ["smolvlm-256m", "smolvlm2-500m", "smolvlm-2.2b", "idefics3-8b", "granite-docling-258m"]


def _image(width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


PROMPTS: list[Any] = [
    (_image(60, 80, 1), "What does it say?"),
    "There is no image here. How many lines are there, and why?",
    ([_image(40, 40, 2), _image(90, 30, 3)], "Compare the two."),
    "Why?",
]


def _checkpoint(shape: str, folder: Path, seed: int) -> Path:
    preset = miniature(PRESETS[shape], vision_head=8, text_head=16)
    model = sharp_model(preset.config, seed=seed)
    return save_checkpoint(folder, model, side_files(preset, preset.config))


def _theirs(model: Any, vlm: VLM, prompts: list[Any], split: bool, **options: Any) -> list[Any]:
    """transformers' new tokens per prompt, up to and with the first end token."""
    batch = vlm.processor(prompts, split=split)
    pad = vlm.config.text.pad_token_id
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": pad} | options
    with torch.inference_mode():
        out = model.generate(**model_inputs(batch), **options)
    rows = out[:, batch.token_ids.shape[1] :].tolist()
    return [_until_end(row, vlm.eos_token_ids) for row in rows]


def _until_end(ids: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    stops = [place for place, token in enumerate(ids) if token in ends]
    return tuple(ids[: stops[0] + 1] if stops else ids)


def _ours(vlm: VLM, prompts: list[Any], split: bool, **options: Any) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": NEW_TOKENS} | options
    return [answer.token_ids for answer in vlm.ask_many(prompts, split=split, **options)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(request.param, tmp_path_factory.mktemp("greedy") / request.param, seed=11)


def test_greedy_answers_are_the_same_in_a_batch_and_alone(folder: Path) -> None:
    vlm, theirs = smolstack.load(folder), load_model(folder)
    ours = _ours(vlm, PROMPTS, split=False)
    assert ours == _theirs(theirs, vlm, PROMPTS, split=False)
    assert len(set(ours)) == len(PROMPTS)
    for prompt, together in zip(PROMPTS, ours, strict=True):
        assert _ours(vlm, [prompt], split=False) == [together]
        assert _theirs(theirs, vlm, [prompt], split=False) == [together]


def test_split_images_too(folder: Path) -> None:
    vlm, theirs = smolstack.load(folder), load_model(folder)
    prompts: list[Any] = [(_image(200, 50, 4), "Read it."), "Nothing."]
    ours = _ours(vlm, prompts, split=True, max_new_tokens=8)
    assert ours == _theirs(theirs, vlm, prompts, split=True, max_new_tokens=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint("smolvlm-256m", tmp_path_factory.mktemp("greedy") / "small", seed=12)


@pytest.mark.parametrize("penalty", [0.8, 1.2, 2.0])
def test_a_repetition_penalty_acts_alike(small: Path, penalty: float) -> None:
    vlm, theirs = smolstack.load(small), load_model(small)
    plain = _ours(vlm, PROMPTS, split=False)
    penalized = []
    for prompt in PROMPTS:
        ours = _ours(vlm, [prompt], split=False, repetition_penalty=penalty)
        assert ours == _theirs(theirs, vlm, [prompt], split=False, repetition_penalty=penalty)
        penalized += ours
    assert penalized != plain


def test_any_of_a_list_of_end_tokens_ends_an_answer(small: Path, tmp_path: Path) -> None:
    free = _ours(smolstack.load(small), PROMPTS, split=False)
    ends = [free[0][3], free[1][7]]
    folder = tmp_path / "ends"
    shutil.copytree(small, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = ends
    (folder / "generation_config.json").write_text(json.dumps(generation))
    vlm, theirs = smolstack.load(folder), load_model(folder)
    assert vlm.eos_token_ids == tuple(ends)
    ours = _ours(vlm, PROMPTS, split=False)
    assert ours == _theirs(theirs, vlm, PROMPTS, split=False)
    assert (len(ours[0]), len(ours[1])) <= (4, 8)


def test_a_continuation_of_a_hundred_tokens_does_not_drift(small: Path) -> None:
    vlm, theirs = smolstack.load(small), load_model(small)
    ours = _ours(vlm, PROMPTS[:2], split=False, max_new_tokens=100)
    assert ours == _theirs(theirs, vlm, PROMPTS[:2], split=False, max_new_tokens=100)
