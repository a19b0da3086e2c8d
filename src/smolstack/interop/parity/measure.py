"""Compares one published shape at full width, stage by stage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from smolstack.batch import Batch
from smolstack.checkpoint.files import CheckpointFiles, read_files
from smolstack.checkpoint.load import Checkpoint
from smolstack.checkpoint.new import side_files
from smolstack.checkpoint.processor_files import build_processor
from smolstack.config import ModelConfig
from smolstack.family import Preset
from smolstack.interop.parity.samples import IMAGES, chats, sample_image
from smolstack.interop.reference import (
    image_processor,
    load_processor,
    model_inputs,
    share_model,
)
from smolstack.interop.rounding import rounded_differently
from smolstack.interop.traces import (
    difference,
    output_difference,
    spread,
    trace_ours,
    trace_theirs,
)
from smolstack.interop.weights import sharp_model
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor
from smolstack.vlm import VLM

NEW_TOKENS = 16
# Bounds: absolute differences of pixels and states, counts of differing ids and tokens.
BOUNDS: dict[str, float] = {
    "pixels": 1e-6,
    "token ids": 0,
    "positions": 0,
    "tower": 1e-4,
    "connector": 1e-4,
    "merged": 1e-4,
    "logits": 1e-4,
    "greedy tokens": 0,
}


@dataclass(frozen=True)
class Measured:
    """The result of a preset's comparison.

    Attributes:
        differences: largest difference by stage (see BOUNDS); for a retrieval model, "logits" are
            its embeddings, and there are no greedy tokens.
        spread: standard deviation of the logits, to judge the differences by.
    """

    preset: str
    vision_layers: int
    text_layers: int
    differences: dict[str, float]
    spread: float
    seconds: float

    @property
    def over(self) -> list[str]:
        """Stages whose difference exceeds its bound (or is NaN)."""
        return [name for name, value in self.differences.items() if not value <= BOUNDS[name]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "vision_layers": self.vision_layers,
            "text_layers": self.text_layers,
            "differences": {
                name: value if value < float("inf") else None
                for name, value in self.differences.items()
            },
            "spread": self.spread,
            "seconds": round(self.seconds, 1),
            "over": self.over,
        }


def measure(
    preset: Preset, *, vision_layers: int, text_layers: int, say: Callable[[str], None]
) -> Measured:
    """Compare a preset at its full width; ``say`` is called with progress messages."""
    began = perf_counter()
    config = preset.config.with_layers(vision_layers, text_layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("tokenizer and prompts")
        files = _write_files(preset, config, folder)
        ours, theirs = build_processor(files, config), load_processor(folder, config.model_type)
        found = {"pixels": 0.0, "token ids": float(_count_wrong_ids(ours, theirs))}
        say("images")
        found["pixels"] = _pixel_difference(ours, config.model_type)
        batch = ours.batch([ours.prepare(chat, split=split) for chat, split in chats()])
    say(f"weights, {vision_layers} + {text_layers} layers")
    model = sharp_model(config, seed=1)
    reference = share_model(model)
    say("forward")
    width, stages = _stages(model, reference, batch)
    found |= stages
    if config.embedding_dim is None:
        say("greedy answers")
        vlm = VLM(Checkpoint(files, config, model, ours, eos_token_ids=()))
        found["greedy tokens"] = float(_count_wrong_tokens(vlm, reference))
    return Measured(preset.name, vision_layers, text_layers, found, width, perf_counter() - began)


def _write_files(preset: Preset, config: ModelConfig, folder: Path) -> CheckpointFiles:
    """Write a checkpoint folder without weights, which processors do not need."""
    for name, content in side_files(preset, config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    return read_files(folder)


def _count_wrong_ids(ours: Processor, theirs: Any) -> int:
    """Count differing token ids over all chats, with and without splitting."""
    wrong = 0
    for chat, _ in chats():
        for split in (True, False):
            expected = theirs.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"do_image_splitting": split},
            )["input_ids"][0]
            wrong += _differing(list(ours.prepare(chat, split=split).token_ids), expected)
    return wrong


def _pixel_difference(processor: Processor, model_type: str) -> float:
    theirs = image_processor(processor.settings, model_type)
    largest = 0.0
    for seed, (size, mode, split) in enumerate(IMAGES):
        image = sample_image(size, mode, seed)
        plan = processor.plan(image, split=split)
        out = theirs(
            [image], do_image_splitting=split, return_row_col_info=True, return_tensors="pt"
        )
        if (plan.rows, plan.cols) != (out["rows"][0][0], out["cols"][0][0]):
            return float("inf")
        largest = max(largest, difference(processor.pixels(image, plan), out["pixel_values"][0]))
    return largest


def _stages(
    model: VisionLanguageModel, reference: Any, batch: Batch
) -> tuple[float, dict[str, float]]:
    ours, theirs = trace_ours(model, batch), trace_theirs(reference, batch)
    real = batch.attention_mask
    wrong_rows = sum(len(wrong) for _, wrong in rounded_differently(model.config.vision.side))
    retrieval = model.config.embedding_dim is not None
    return spread(ours, real), {
        "positions": difference(ours.positions, theirs.positions) + wrong_rows,
        "tower": difference(ours.tower, theirs.tower),
        "connector": difference(ours.connector, theirs.connector),
        "merged": difference(ours.merged[real], theirs.merged[real]),
        "logits": output_difference(ours, theirs, real, unit=retrieval),
    }


def _count_wrong_tokens(vlm: VLM, reference: Any) -> int:
    """Count differing greedy tokens over all chats, with chats of one kind as one batch; end tokens
    are disabled.
    """
    wrong = 0
    for split in (True, False):
        prompts = [chat for chat, kind in chats() if kind is split]
        batch = vlm.processor(prompts, split=split)
        answers = vlm.ask_many(prompts, split=split, max_new_tokens=NEW_TOKENS)
        with torch.inference_mode():
            out = reference.generate(
                **model_inputs(batch),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=vlm.config.text.pad_token_id,
            )
        rows = out[:, batch.token_ids.shape[1] :].tolist()
        pairs = zip(answers, rows, strict=True)
        wrong += sum(_differing(list(answer.token_ids), row) for answer, row in pairs)
    return wrong


def _differing(ours: list[int], theirs: list[int]) -> int:
    """Count positions at which two lists of ids differ, including missing ones."""
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return wrong + abs(len(ours) - len(theirs))
