"""The bridge that speaks (``make real``): it reads images and has kept its language."""

from __future__ import annotations

import json
from pathlib import Path

import smolstack

READ = 24  # test images asked about


def examples(bridged: Path) -> list[tuple[Path, str, str]]:
    """Images with fonts and strings that were not trained on, questions, and expected answers."""
    folder = bridged.parent.parent / "test"
    rows = map(json.loads, (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        (
            folder / row["messages"][0]["content"][0]["image"],
            row["messages"][0]["content"][1]["text"],
            row["messages"][1]["content"][0]["text"],
        )
        for row in list(rows)[:READ]
    ]


def test_it_answers_about_images_in_sentences(bridged: Path) -> None:
    vlm = smolstack.load(bridged, dtype="float32")
    asked = examples(bridged)
    answers = vlm.ask_many([(image, text) for image, text, _ in asked], split=False)
    pairs = list(zip(answers, asked, strict=True))
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert sum(answer.text == expected for answer, (_, _, expected) in pairs) >= READ / 2


def test_int8_reads_as_well_as_float32(bridged: Path) -> None:
    asked = examples(bridged)
    right = []
    for dtype in ("float32", "int8"):
        vlm = smolstack.load(bridged, dtype=dtype)
        answers = vlm.ask_many([(image, text) for image, text, _ in asked], split=False)
        expected = [answer for _, _, answer in asked]
        right.append(sum(a.text == e for a, e in zip(answers, expected, strict=True)))
    assert right[1] >= right[0] - 1


def test_it_still_talks_without_images(bridged: Path) -> None:
    vlm = smolstack.load(bridged, dtype="float32")
    answer = vlm.ask(None, "What is the capital of France?", max_new_tokens=24)
    assert "Paris" in answer.text
