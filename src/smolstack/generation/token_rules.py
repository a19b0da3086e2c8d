"""Rules about single tokens (logits processors): penalties, biases and exclusions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolstack.errors import GenerationError
from smolstack.generation.structured_output import blamed

NAMES = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "bad_words",
)


@dataclass(frozen=True)
class TokenRules:
    """Changes of an answer's logits, before all sampling parameters.

    Attributes:
        presence_penalty: subtracted from the logit of every token that occurs in the answer, −2 to
            2.
        frequency_penalty: subtracted once per occurrence in the answer, −2 to 2.
        logit_bias: (token, value added to its logit, −100 to 100).
        min_tokens: minimum length before a token that ends the answer is allowed.
        ignore_eos: never choose the checkpoint's end tokens.
        stop_token_ids: additional tokens that end the answer.
        bad_words: texts that never occur in the answer, however they are tokenized.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise GenerationError(f"{name} is {value}, expected −2 to 2")
        for token, bias in self.logit_bias:
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise GenerationError(f"logit_bias of {token} is {bias}, expected −100 to 100")
        if self.min_tokens < 0:
            raise GenerationError(f"min_tokens is {self.min_tokens}, expected 0 or more")
        if any(not word for word in self.bad_words):
            raise GenerationError("a bad word is empty, expected text")

    def check_vocabulary(self, size: int) -> None:
        """Raise GenerationError for token ids that are not below ``size``."""
        for name, tokens in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < size:
                    raise GenerationError(
                        f"{name} contains token id {token}, expected 0 to {size - 1}"
                    )

    def apply(
        self, logits: Tensor, taken: Sequence[int], ends: Sequence[int], eos: Sequence[int]
    ) -> Tensor:
        """Return the changed logits (V,) of the token that follows ``taken``; the input is not
        modified.

        Args:
            ends: tokens that end the answer.
            eos: the checkpoint's end tokens among them.
        """
        if self == _NONE:
            return logits
        logits = logits.float().clone()
        for token, times in Counter(taken).items():
            logits[token] -= self.presence_penalty + times * self.frequency_penalty
        for token, bias in self.logit_bias:
            logits[token] += bias
        never = list(ends) if len(taken) < self.min_tokens else []
        never += list(eos) if self.ignore_eos else []
        if never:
            logits[never] = -torch.inf
        return logits


_NONE = TokenRules()


def read_rules(given: Mapping[str, Any], structure: str | None) -> TokenRules:
    """Return the token rules among the options of an answer.

    Args:
        structure: the option of the answer's structure, such as "schema", or None.

    Raises:
        GenerationError: a value is invalid, or a rule cannot be combined with the structure.
    """
    found = {name: given[name] for name in NAMES if given.get(name) is not None}
    if isinstance(bias := found.get("logit_bias"), Mapping):
        try:
            found["logit_bias"] = tuple((int(token), float(by)) for token, by in bias.items())
        except (TypeError, ValueError):
            raise GenerationError(
                f"logit_bias is {bias!r:.80}, expected token ids and numbers"
            ) from None
    for name in ("stop_token_ids", "bad_words"):
        if name in found:
            value = found[name]
            found[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
    rules = TokenRules(**found)
    limit = given.get("max_new_tokens")
    if limit is not None and rules.min_tokens > limit:
        raise GenerationError(
            f"min_tokens is {rules.min_tokens}, expected at most max_new_tokens, {limit}"
        )
    if structure is not None:
        names = ["min_tokens", "ignore_eos", "stop_token_ids", "bad_words"]
        if structure == "choices":  # choices are not sampled
            names = list(NAMES)
        with blamed(structure):
            _check_unused(rules, names, structure)
    return rules


def _check_unused(rules: TokenRules, names: Sequence[str], structure: str) -> None:
    for name in names:
        if getattr(rules, name) != getattr(_NONE, name):
            raise GenerationError(
                f"found {name} and {structure}, which cannot be combined: {structure} alone "
                "determines the answer and its end"
            )
