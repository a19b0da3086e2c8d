"""The result of a request: text, finish reason, usage and timings."""

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
        visual_tokens: the visual tokens among them.
        completion_tokens: generated tokens, including the end token.
        tiles: tiles of all images of the prompt.
        cached_tokens: prompt tokens that were copied from the prefix cache instead of computed.
    """

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    tiles: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds per stage of one request; model passes shared with other requests count in full."""

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
        """Decoding rate of one sequence; 0 if nothing was decoded after the first token."""
        return self.decode_steps / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural) of one token of an answer, before any sampling parameters.

    Attributes:
        top: (token, log-probability) of the most likely tokens at this position, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer, without surrounding white space; with a ``schema`` or ``regex``, exactly
            the matching text.
        finish_reason: "stop" (end token or stop string), "length", or "repetition".
        token_ids: the generated tokens, including the end token.
        usage, timings: see these classes.
        logprobs: of each token, if requested.
        parsed: with ``schema``, the JSON value or pydantic object that the text represents; None if
            the answer was cut off or the pydantic model's validators reject it.
        probabilities: with ``choices``, the probability of each, given that the answer is one of
            them.
        choice_logprobs: with ``choices``, the natural logarithm of the unconditional probability
            that the answer is exactly this text.
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
        """Plain data, for JSON, without ``parsed``, which the text contains."""
        data = asdict(replace(self, parsed=None))
        del data["parsed"]
        return data
