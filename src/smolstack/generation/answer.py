"""What an answer is: its text, why it ended, what it used and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from smolstack.generation.stopping import FinishReason


@dataclass(frozen=True)
class Usage:
    """Tokens and tiles of one answer.

    Attributes:
        prompt_tokens: the whole prompt, visual tokens included.
        visual_tokens: those of them that stand for images.
        completion_tokens: tokens generated, the end token included.
        tiles: tiles of all images of the prompt.
        cached_tokens: those of the prompt that were copied from the prefix cache, not read again.
    """

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    tiles: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds of each stage of one request; passes that it shared with others count in full."""

    images: float
    vision: float
    prefill: float
    decode: float
    decode_steps: int

    @property
    def total(self) -> float:
        return self.images + self.vision + self.prefill + self.decode

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate of one sequence; 0 when nothing was decoded after the first token."""
        return self.decode_steps / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """What the model gave one token of an answer: natural logarithms, before any warping.

    Attributes:
        top: (token, log-probability) of the likeliest ones at this place, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer, without surrounding white space; one with a ``schema`` or ``regex`` is
            exactly what matches.
        finish_reason: "stop" (end token or stop string), "length", or "repetition".
        token_ids: the tokens generated, the end token included.
        usage, timings: see there.
        logprobs: of each token, where asked for.
        parsed: with ``schema``, the JSON value or the pydantic object that the text stands for;
            None when the answer was cut off or the model's own validators refuse it.
        probabilities: with ``choices``, how likely each is, given that the answer is one of them.
        choice_logprobs: with ``choices``, the natural logarithm of the probability that the answer
            is exactly this text, whatever else it could be.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    parsed: Any = None
    probabilities: Mapping[str, float] | None = None
    choice_logprobs: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; what ``parsed`` stands for is in the text."""
        data = asdict(replace(self, parsed=None))
        del data["parsed"]
        return data
