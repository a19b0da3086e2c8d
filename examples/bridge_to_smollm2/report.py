"""What a bridged model reads and what it still says: exact answers by kind, KL on plain chats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import smolstack
from smolstack.processor.processor import Prompt
from smolstack.vlm import VLM

AT_ONCE = 8  # answers of a batch


def measure(model: Path, asked: Path, chats: Path, plain: VLM) -> dict[str, Any]:
    """Shares of exact answers by kind of question, some wrong ones, and the KL of plain chats.

    Args:
        model: a checkpoint folder.
        asked, chats: files of examples that were not trained on.
        plain: the model before anything was trained: its text answers are the language model's.
    """
    vlm = smolstack.load(model, dtype="float32")
    rows = _rows(asked)
    right: Counter[str] = Counter()
    wrong = []
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        prompts = [(asked.parent / _image(row), _text(row, 0)) for row in some]
        answers = vlm.ask_many(prompts, max_new_tokens=32, split=False)
        for row, answer in zip(some, answers, strict=True):
            if answer.text.strip() == _text(row, 1):
                right[row["kind"]] += 1
            else:
                wrong.append([_image(row), _text(row, 0), _text(row, 1), answer.text.strip()])
    counts = Counter(row["kind"] for row in rows)
    kinds = {kind: right[kind] / count for kind, count in sorted(counts.items())}
    return {
        "exact": sum(right.values()) / max(1, len(rows)),
        "kinds": kinds,
        "kl": divergence(plain, vlm, _rows(chats)),
        "wrong": wrong[:20],
    }


@torch.inference_mode()
def divergence(plain: VLM, vlm: VLM, chats: list[dict[str, Any]]) -> float:
    """Mean KL, in nats per token, of ``vlm`` from ``plain`` over the plain model's own answers."""
    total, tokens = 0.0, 0
    for row in chats:
        question = plain.processor.prepare(_text(row, 0)).token_ids
        answer = plain.processor.tokenizer.encode(_text(row, 1), special=False)
        batch = plain.processor.batch([Prompt("", (*question, *answer), (), ())])
        positions = slice(len(question) - 1, len(question) + len(answer))
        one, other = (m.model(batch)[0, positions].log_softmax(-1) for m in (plain, vlm))
        total += float((one.exp() * (one - other)).sum())
        tokens += one.shape[0]
    return total / max(1, tokens)


def table(stages: dict[str, dict[str, Any]]) -> str:
    """The stages beside each other, in Markdown."""
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
