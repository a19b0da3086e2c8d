"""A process that builds an untrusted grammar with limited time and memory, and reports its size.

The vocabulary is that of single bytes: what has no limit in llguidance, the automata of its
patterns, does not depend on it.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any

from smolstack.processor import limited_process

_NICE = 5  # the answers that are being written come first


def _answer(_: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    matching = importlib.import_module("llguidance")
    tokens = matching.LLTokenizer("byte")
    matching.LLMatcher(tokens, matching.LLMatcher.grammar_from_lark('start: "a"'), log_level=0)
    before = _resident()
    matcher = matching.LLMatcher(tokens, content.decode(), log_level=0)
    if not matcher.is_error():
        matcher.compute_logit_bias()
    return {"bytes": max(0, _resident() - before)}, b""


def _resident() -> int:
    """Return this process's resident size in bytes; 0 where it is not known."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (ImportError, OSError):
        return 0


if __name__ == "__main__":
    with suppress(ImportError):  # loaded before memory is limited
        importlib.import_module("llguidance")
    with suppress(AttributeError, OSError):
        os.nice(_NICE)
    limited_process.answer_call(_answer)
