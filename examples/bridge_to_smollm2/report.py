"""Evaluates a bridged model: exact answers by kind of question, and KL on text-only chats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import smolstack
from smolstack.processor.processor import Prompt
from smolstack.vlm import VLM

BATCH_SIZE = 8  # answers


def measure(model: Path, image_chats: Path, chats: Path, base: VLM) -> dict[str, Any]:
    """Return the shares of exact answers by kind, some wrong answers, and the KL on chats.

    Args:
        model: a checkpoint folder.
        image_chats, chats: files of evaluation examples.
        base: the model before training, with the language model's original answers.
    """
    vlm = smolstack.load(model, dtype="float32")
    rows = _rows(image_chats)
    correct: Counter[str] = Counter()
    wrong = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch_rows = rows[start : start + BATCH_SIZE]
        prompts = [(image_chats.parent / _image(row), _text(row, 0)) for row in batch_rows]
        answers = vlm.ask_many(prompts, max_new_tokens=32, split=False)
        for row, answer in zip(batch_rows, answers, strict=True):
            if answer.text.strip() == _text(row, 1):
                correct[row["kind"]] += 1
            else:
                wrong.append([_image(row), _text(row, 0), _text(row, 1), answer.text.strip()])
    counts = Counter(row["kind"] for row in rows)
    kinds = {kind: correct[kind] / count for kind, count in sorted(counts.items())}
    return {
        "exact": sum(correct.values()) / max(1, len(rows)),
        "kinds": kinds,
        "kl": mean_kl(base, vlm, _rows(chats)),
        "wrong": wrong[:20],
    }


@torch.inference_mode()
def mean_kl(base: VLM, vlm: VLM, chats: list[dict[str, Any]]) -> float:
    """Return KL(base ‖ vlm) in nats per token, averaged over the base model's own answers."""
    total, tokens = 0.0, 0
    for row in chats:
        question = base.processor.prepare(_text(row, 0)).token_ids
        answer = base.processor.tokenizer.encode(_text(row, 1), special=False)
        batch = base.processor.batch([Prompt("", (*question, *answer), (), ())])
        positions = slice(len(question) - 1, len(question) + len(answer))
        one, other = (m.model(batch)[0, positions].log_softmax(-1) for m in (base, vlm))
        total += float((one.exp() * (one - other)).sum())
        tokens += one.shape[0]
    return total / max(1, tokens)


def table(stages: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a column per stage."""
    kinds = next(iter(stages.values()))["kinds"]
    lines = [f"| | {' | '.join(stages)} |", f"|---{'|---' * len(stages)}|"]
    for kind in kinds:
        shares = (f"{stage['kinds'][kind]:.0%}" for stage in stages.values())
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    whole = (f"{stage['exact']:.1%}" for stage in stages.values())
    lines.append(f"| all | {' | '.join(whole)} |")
    divergences = (f"{stage['kl']:.4f}" for stage in stages.values())
    lines.append(f"| KL of text-only answers | {' | '.join(divergences)} |")
    return "\n".join(lines)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _text(row: dict[str, Any], message: int) -> str:
    parts = row["messages"][message]["content"]
    return "".join(part.get("text", "") for part in parts)


def _image(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"][0]["image"])
