"""What an answer is: its text, why it ended, what it used and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from smolstack.generation.stopping import FinishReason


@dataclass(frozen=True)
class Usage:
    """Tokens and tiles of one answer.

    Attributes:
        prompt_tokens: the whole prompt, visual tokens included.
        visual_tokens: those of them that stand for pictures.
        completion_tokens: tokens generated, the end token included.
        tiles: tiles of all pictures of the prompt.
    """

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    tiles: int


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage took, for the whole batch that the answer was part of."""

    pictures: float
    vision: float
    prefill: float
    decode: float
    decode_steps: int

    @property
    def total(self) -> float:
        return self.pictures + self.vision + self.prefill + self.decode

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate of one sequence; 0 when nothing was decoded after the first token."""
        return self.decode_steps / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer, without surrounding white space.
        finish_reason: "stop" (end token or stop string), "length", or "repetition".
        token_ids: the tokens generated, the end token included.
        usage, timings: see there.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)
