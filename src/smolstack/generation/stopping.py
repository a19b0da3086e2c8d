"""Stop conditions: end tokens, stop strings, length, and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from smolstack.errors import GenerationError

FinishReason: TypeAlias = Literal["stop", "length", "repetition"]


@dataclass(frozen=True)
class RepetitionRule:
    """Detects answers that end in many repetitions of a short phrase.

    Attributes:
        longest: maximum length of the phrase in tokens.
        times: minimum number of consecutive repetitions.
        tokens: minimum number of tokens in all repetitions, so that "0000" and the ruled lines of a
            table are not detected.
    """

    longest: int = 64
    times: int = 4
    tokens: int = 48

    def __post_init__(self) -> None:
        if self.longest < 1 or self.times < 2 or self.tokens < 2:
            raise GenerationError(
                f"a repetition rule with longest {self.longest}, times {self.times}, tokens "
                f"{self.tokens}; expected at least 1, 2 and 2"
            )

    def matches(self, ids: Sequence[int]) -> bool:
        """Return whether the tokens end in such a repetition."""
        for period in range(1, min(self.longest, len(ids) // self.times) + 1):
            span = max(self.times * period, self.tokens)
            if span > len(ids):
                continue
            tail = ids[-span:]
            if all(tail[i] == tail[i - period] for i in range(span - 1, period - 1, -1)):
                return True
        return False


@dataclass(frozen=True)
class Stopping:
    """The stop conditions of an answer.

    Attributes:
        max_new_tokens: maximum length in tokens.
        eos_token_ids: tokens that end it.
        stop: strings that end it; neither they nor what follows is part of the answer.
        repetition: the repetition rule, or None.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    repetition: RepetitionRule | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}, expected 1 or more")
        if any(not text for text in self.stop):
            raise GenerationError("a stop string is empty, expected text")


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """Return the index of the first stop string at or after ``start``, or None."""
    found = [place for stop in stops if (place := text.find(stop, start)) >= 0]
    return min(found) if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of ``text`` that may begin a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
