"""What transformers saves, smolstack loads, and the other way round, with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import smolstack
from smolstack.checkpoint.new import side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import load_model, load_processor
from smolstack.interop.weights import sharp_model

IMAGE = Image.linear_gradient("L").resize((70, 40)).convert("RGB")
CHAT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}],
    }
]


def _transformers_answer(folder: Path) -> list[int]:
    """Its own model, processor and files, with nothing of smolstack in between."""
    inputs = load_processor(folder).apply_chat_template(
        CHAT,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_image_splitting": False},
    )
    with torch.inference_mode():
        out = load_model(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _smolstack_answer(folder: Path) -> list[int]:
    answer = smolstack.load(folder).ask(messages=CHAT, split=False, max_new_tokens=12)
    return list(answer.token_ids)


@pytest.mark.parametrize("shard", [None, 200_000])
@pytest.mark.parametrize("shape", ["smolvlm-256m", "idefics3-8b", "granite-docling-258m"])
def test_a_checkpoint_keeps_its_answers_through_both_libraries(
    shape: str, shard: int | None, tmp_path: Path
) -> None:
    preset = miniature(PRESETS[shape])
    model = sharp_model(preset.config, seed=21)
    ours = save_checkpoint(
        tmp_path / "ours",
        model,
        side_files(preset, preset.config),
        max_shard_bytes=shard or 10**9,
    )
    expected = _smolstack_answer(ours)
    assert _transformers_answer(ours) == expected

    theirs = tmp_path / "theirs"
    load_model(ours).save_pretrained(theirs, **({} if shard is None else {"max_shard_size": shard}))
    load_processor(ours).save_pretrained(theirs)
    assert not (theirs / "preprocessor_config.json").exists()
    assert (len(list(theirs.glob("*.safetensors"))) > 1) == (shard is not None)
    assert _smolstack_answer(theirs) == expected

    again = smolstack.load(theirs).save(tmp_path / "again")
    assert _smolstack_answer(again) == expected
    assert _transformers_answer(again) == expected
