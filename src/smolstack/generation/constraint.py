"""The tokens that may come next in an answer that follows a grammar.

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

# In llguidance's message. Whether an expression gets there depends on the answer's text, so it is
# not known before: nested repetitions that can divide a text in many ways have ever larger states.
_TOO_COMPLEX = "Stop: LexerTooComplex"
POINTS_IN_A_ROW = 6  # consecutive; then the text must continue


class Constraint:
    """The state of one answer's grammar, advanced by every chosen token.

    Where the grammar allows several continuations, the model may first generate pointing tokens, if
    its checkpoint has any. They are not part of the text, so the grammar ignores them.

    Attributes:
        lead: characters at the beginning of the answer that are not part of the constrained text.
        exact: whether the answer is exactly the matching text, including surrounding white space.
    """

    exact = True

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, lead: int, pointing: range = range(0)
    ) -> None:
        self.matcher, self.vocab_size, self.lead = matcher, vocab_size, lead
        self.pointing, self.pointed = pointing, 0  # consecutive pointing tokens
        self._first: bytes | None = None

    def begin(self) -> Constraint:
        """Compute the allowed first tokens, which takes longest. May run in any thread.

        Raises:
            GenerationError: the grammar is too complex.
        """
        self._first = self.matcher.compute_logit_bias()
        self._check()
        return self

    def copy(self) -> Constraint:
        """Return a copy for another answer; only before the first token."""
        made = Constraint(self.matcher.deep_copy(), self.vocab_size, self.lead, self.pointing)
        made._first = self._first
        return made

    def allowed(self) -> Tensor:
        """Return the tokens that may come next: (V,) bool.

        Raises:
            GenerationError: the grammar became too complex.
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
        """Advance the grammar by a chosen token."""
        if token in self.pointing:
            self.pointed += 1
            return
        self.pointed = 0
        self.matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Return whether the text is complete and nothing can follow."""
        stopped: bool = self.matcher.is_stopped()
        return stopped

    def _check(self) -> None:
        if self.matcher.is_error():
            message = self.matcher.get_error()
            reason = reason_of(message)
            if _TOO_COMPLEX in message:
                raise GenerationError(
                    f"the grammar became too complex to continue the answer ({reason}); let its "
                    "nested repetitions divide a text in one way only: (\\w{1,20} ){1,500}, not "
                    "(\\w{1,20} ?){1,500}"
                )
            raise GenerationError(f"the grammar cannot continue the answer: {reason}")


def reason_of(message: str) -> str:
    """Return the reason in llguidance's error message, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = (found or lines or ["no reason given"])[0]
    # Positions in the grammar generated from a schema mean nothing to the user.
    for mark in ("failed to compile JSON schema: ",):
        first = first.partition(mark)[2] or first
    return first[:300]
