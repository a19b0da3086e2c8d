"""Text-only chats with the language model's own answers, against catastrophic forgetting."""

from __future__ import annotations

import json
import random
from pathlib import Path

from smolstack.vlm import VLM

SUBJECTS = [
    "the moon",
    "bread",
    "winter",
    "bicycles",
    "rivers",
    "honey",
    "libraries",
    "volcanoes",
    "tea",
    "gardens",
    "trains",
    "sleep",
    "whales",
    "bridges",
    "coffee",
    "mountains",
    "maps",
    "music",
    "glass",
    "rain",
    "paper",
    "clocks",
    "bees",
    "islands",
    "chess",
    "cotton",
    "salt",
    "lighthouses",
    "owls",
    "deserts",
]
FORMS = (
    "Tell me something about {}.",
    "Write one sentence about {}.",
    "What do people like about {}?",
    "Give me three words that go with {}.",
    "Explain {} to a child.",
    "Ask me a question about {}.",
)
MAX_NEW_TOKENS = 48  # per answer


def questions(split: str) -> list[str]:
    """Return all questions of a split; one subject in six is held out."""
    held_out = split == "held-out"
    chosen = [s for number, s in enumerate(SUBJECTS) if (number % 6 == 5) == held_out]
    return [form.format(subject) for subject in chosen for form in FORMS]


def write_chats(file: Path, vlm: VLM, count: int, *, split: str, seed: int) -> Path:
    """Write ``count`` questions with the model's greedy answers; existing answers are kept."""
    remaining = questions(split)
    random.Random(f"{seed} {split}").shuffle(remaining)
    done = _complete_lines(file)
    with file.open("w", encoding="utf-8") as out:
        out.writelines(done[:count])
        for question in remaining[len(done) : count]:
            answer = vlm.ask(None, question, max_new_tokens=MAX_NEW_TOKENS).text.strip()
            messages = [
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer or "Yes."}]},
            ]
            row = {"kind": "chat", "messages": messages}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
    return file


def _complete_lines(file: Path) -> list[str]:
    """Return the lines of an interrupted run, without an incomplete last line."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
