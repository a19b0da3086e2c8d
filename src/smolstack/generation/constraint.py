"""Which tokens may come next in an answer that keeps to a grammar.

Shapes: V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smolstack.errors import GenerationError

if TYPE_CHECKING:
    from llguidance import LLMatcher

POINTS_IN_A_ROW = 6  # then the text has to go on


class Constraint:
    """What one answer may go on with; told every token taken.

    Where the form leaves a choice, the model may first point at what it is about to read, if its
    checkpoint has tokens for that: they are no part of the text, so the form does not see them.

    Attributes:
        lead: characters at the answer's beginning that are not part of its form.
        exact: whether the answer is what matches, white space around it included.
    """

    exact = True

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, lead: int, pointing: range = range(0)
    ) -> None:
        self.matcher, self.vocab_size, self.lead = matcher, vocab_size, lead
        self.pointing, self.pointed = pointing, 0  # how many of them came last
        self._first: bytes | None = None

    def begin(self) -> Constraint:
        """Find out what may come first, which takes longest; in any thread.

        Raises:
            GenerationError: the form is too complex to follow.
        """
        self._first = self.matcher.compute_logit_bias()
        self._check()
        return self

    def copy(self) -> Constraint:
        """The same for another answer; of one that was not told a token yet."""
        made = Constraint(self.matcher.deep_copy(), self.vocab_size, self.lead, self.pointing)
        made._first = self._first
        return made

    def allowed(self) -> Tensor:
        """Tokens that may come next: (V,) bool.

        Raises:
            GenerationError: the form became too complex to follow.
        """
        found, self._first = self._first, None
        if found is None:
            found = self.matcher.compute_logit_bias()
            self._check()
        bias = np.frombuffer(found, dtype=np.uint8)
        allowed = torch.from_numpy(bias[: self.vocab_size] != 0)
        if self.pointing and self.pointed < POINTS_IN_A_ROW and allowed.count_nonzero() > 1:
            allowed[self.pointing.start : self.pointing.stop] = True
        return allowed

    def take(self, token: int) -> None:
        """Count a token as written."""
        if token in self.pointing:
            self.pointed += 1
            return
        self.pointed = 0
        self.matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether the form is whole and nothing can follow it."""
        stopped: bool = self.matcher.is_stopped()
        return stopped

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = reason_of(self.matcher.get_error())
            raise GenerationError(f"the answer's form cannot be followed further: {reason}")


def reason_of(message: str) -> str:
    """The part of llguidance's message that tells what is wrong, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = (found or lines or ["no reason given"])[0]
    # Places in the grammar that stands around the schema say nothing to its author.
    for mark in ("failed to compile JSON schema: ",):
        first = first.partition(mark)[2] or first
    return first[:300]
