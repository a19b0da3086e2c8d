"""A constraint that applies only to answers that begin with a trigger text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smolstack.generation.constraint import Constraint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llguidance import LLMatcher


class TriggeredConstraint(Constraint):
    """Leaves an answer unconstrained unless it begins with ``trigger``; then only the grammar's
    text can follow.

    Args:
        decode: token ids → text.
    """

    exact = False

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        trigger: str,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        super().__init__(matcher, vocab_size, 0)
        self.bound = self.free = False
        self._trigger, self._decode = trigger, decode
        self._taken: list[int] = []

    def begin(self) -> TriggeredConstraint:
        """Nothing to compute: nothing is constrained yet."""
        return self

    def copy(self) -> TriggeredConstraint:
        matcher = self.matcher.deep_copy()
        return TriggeredConstraint(matcher, self.vocab_size, self._trigger, self._decode)

    def allowed(self) -> Tensor:
        if self.bound:
            return super().allowed()
        return torch.ones(self.vocab_size, dtype=torch.bool)

    def take(self, token: int) -> None:
        if self.free:
            return
        if self.bound:
            super().take(token)
            return
        self._taken.append(token)
        if self.matcher.try_consume_tokens([token]) != 1:
            self.free = True  # it begins differently
        else:
            self.bound = len(self._decode(self._taken).lstrip()) >= len(self._trigger)

    @property
    def complete(self) -> bool:
        return self.bound and super().complete
