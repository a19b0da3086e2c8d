"""The output of one request: chooses tokens, applies its grammar and stop conditions, and
detokenizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from smolstack.errors import ContextLengthError, GenerationError
from smolstack.generation.answer import Answer, Timings, TokenLogprob, Usage
from smolstack.generation.choices import probabilities
from smolstack.generation.constraint import Constraint
from smolstack.generation.detokenizer import Detokenizer
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.sampling import Sampler
from smolstack.generation.stopping import FinishReason, Stopping
from smolstack.generation.structured_output import Choices, Schema
from smolstack.generation.token_rules import TokenRules
from smolstack.processor.processor import Prompt


@dataclass
class Output:
    """An answer in progress, extended one token at a time.

    Attributes:
        constraint: its grammar, or None.
        top_logprobs: number of most likely tokens recorded at each position; None: none.
        rules: rules about single tokens.
        continues: whether white space at its beginning and end is part of it.
    """

    prompt_tokens: int
    limit: int
    sampler: Sampler
    stream: Detokenizer
    stopping: Stopping
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    rules: TokenRules = field(default_factory=TokenRules)
    continues: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _handed_out: int = 0  # characters emitted, without the lead
    _lead_left: int = -1  # characters of the lead not yet generated

    def take(self, logits: torch.Tensor) -> str:
        """Choose a token from logits (V,) and determine whether the answer ends with it; return the
        characters that became final.
        """
        with torch.inference_mode():
            allowed = None if self.constraint is None else self.constraint.allowed()
            token = self._choose(logits, allowed)
            if self.top_logprobs is not None:
                self.logprobs.append(_logprob(logits, token, self.top_logprobs))
        self.token_ids.append(token)
        if self.constraint is not None:
            self.constraint.take(token)
        return self._after_lead(self._push(token))

    def _choose(self, logits: torch.Tensor, allowed: torch.Tensor | None) -> int:
        """Return the next token; one that would complete a bad word is drawn again."""
        rules, seen = self.rules, self.sampler.seen
        ends = self.stopping.eos_token_ids
        own = ends[: len(ends) - len(rules.stop_token_ids)]
        scores = rules.apply(logits, self.token_ids, ends, own)
        while True:
            token = self.sampler(scores, allowed)
            if not rules.bad_words or token in ends:
                return token
            if float(scores[token]) == -torch.inf:
                raise GenerationError("bad_words exclude all tokens that could continue the answer")
            text = self.stream.decode([*self.token_ids, token])
            if not any(word in text for word in rules.bad_words):
                return token
            scores[token], self.sampler.seen = -torch.inf, seen

    def take_all(self, token_ids: Sequence[int]) -> str:
        """Set the complete answer, chosen elsewhere; return its text."""
        self.token_ids.extend(token_ids)
        text = "".join(self.stream.push(t) for t in token_ids if t not in self._ends)
        self.finish_reason = "stop"
        return self._after_lead(text + self.stream.finish())

    @property
    def text(self) -> str:
        """The answer so far, without surrounding white space unless its grammar makes it exact."""
        if self.constraint is None or not self.constraint.exact:
            return self.stream.text if self.continues else self.stream.text.strip()
        return self.stream.text[self.constraint.lead :]

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.stopping.eos_token_ids

    def _push(self, token: int) -> str:
        if token in self._ends:
            self.finish_reason = "stop"
            return self.stream.finish()
        piece = self.stream.push(token)
        if self.stream.stopped or (self.constraint is not None and self.constraint.complete):
            self.finish_reason = "stop"
        elif self.stopping.repetition is not None and self.stopping.repetition.matches(
            self.token_ids
        ):
            self.finish_reason = "repetition"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        return piece

    def _after_lead(self, piece: str) -> str:
        """Return a piece without the lead that the chat template leaves to the model."""
        if self.constraint is None or not self.constraint.exact:
            piece = piece if self._handed_out or self.continues else piece.lstrip()
        else:
            left = self.constraint.lead if self._lead_left < 0 else self._lead_left
            self._lead_left = max(0, left - len(piece))
            piece = piece[left:]
        self._handed_out += len(piece)
        return piece


def new_output(
    token_ids: Sequence[int],
    options: ValidatedOptions,
    decode: Callable[[Sequence[int]], str],
    max_positions: int,
    constraint: Constraint | None = None,
) -> Output:
    """Return an empty output, after checking that there is room for an answer.

    Args:
        token_ids: the prompt's tokens.
        decode: token ids → text.
        max_positions: context length of the model.
        constraint: the grammar's state for this answer.

    Raises:
        ContextLengthError: the prompt leaves no room for a new token.
    """
    room = max_positions - len(token_ids)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(token_ids)} tokens and the model's context "
            f"{max_positions}, which leaves no room for an answer"
        )
    return Output(
        prompt_tokens=len(token_ids),
        limit=min(options.stopping.max_new_tokens, room),
        sampler=Sampler(options.sampling, torch.tensor(list(token_ids), dtype=torch.long)),
        stream=Detokenizer(decode, options.stopping.stop),
        stopping=options.stopping,
        constraint=constraint,
        top_logprobs=options.logprobs,
        rules=options.rules,
        continues=options.continues,
    )


def make_answer(
    prompt: Prompt,
    output: Output,
    timings: Timings,
    options: ValidatedOptions,
    scores: Sequence[float] | None = None,
    *,
    computed_tokens: int | None = None,
) -> Answer:
    """Return the answer of a finished output.

    Args:
        scores: log-probabilities of its choices.
        computed_tokens: prompt tokens that were not copied from the prefix cache.
    """
    assert output.finish_reason is not None
    structure, text = options.structure, output.text
    parsed = None
    if isinstance(structure, Schema) and output.finish_reason == "stop":
        parsed = structure.parse(text)
    answer = Answer(
        text=text,
        finish_reason=output.finish_reason,
        token_ids=tuple(output.token_ids),
        usage=Usage(
            prompt_tokens=output.prompt_tokens,
            visual_tokens=sum(plan.visual_tokens for plan in prompt.plans),
            completion_tokens=len(output.token_ids),
            tiles=sum(plan.tiles for plan in prompt.plans),
            cached_tokens=0 if computed_tokens is None else output.prompt_tokens - computed_tokens,
        ),
        timings=timings,
        logprobs=None if options.logprobs is None else tuple(output.logprobs),
        parsed=parsed,
    )
    if scores is None or not isinstance(structure, Choices):
        return answer
    return replace(
        answer,
        probabilities=dict(zip(structure.texts, probabilities(scores), strict=True)),
        choice_logprobs=dict(zip(structure.texts, scores, strict=True)),
    )


def _logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """Return the log-probabilities of a token and the most likely ones, before any sampling
    parameters.
    """
    scores = logits.float().log_softmax(dim=-1)
    best = scores.topk(min(top, scores.numel()))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(scores[token]), tuple(pairs))
