"""Makes requests from prompts and options; all errors are raised before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from smolstack.errors import ConfigError
from smolstack.generation.choices import continuations
from smolstack.generation.constraint import Constraint
from smolstack.generation.grammar import Grammars
from smolstack.generation.lark import Lark
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.output import new_output
from smolstack.generation.request import Request
from smolstack.generation.structured_output import Choices, blamed, option_of
from smolstack.generation.triggered_constraint import TriggeredConstraint
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor, Prompt


class RequestMaker:
    """Makes requests for one model. Thread-safe.

    Args:
        check: raises for a request that can never run.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        check: Callable[[Request], None],
    ) -> None:
        self.model, self.processor, self.check = model, processor, check
        self._grammars: dict[tuple[tuple[int, ...], str], Grammars] = {}

    def requests(
        self,
        prompts: Sequence[Prompt],
        options: ValidatedOptions | Sequence[ValidatedOptions],
        *,
        deadline: float | None = None,
    ) -> list[Request]:
        """Make validated requests for answers. Thread-safe.

        Args:
            prompts: one per request.
            options: for all requests, or one per prompt; these may differ only in their sampling
                parameters.
            deadline: when the answers must be complete, on the core's clock.

        Raises:
            ContextLengthError, GenerationError, KVCacheError: a prompt or its options cannot be
                answered.
        """
        each = [options] * len(prompts) if isinstance(options, ValidatedOptions) else list(options)
        if self.model.config.embedding_dim is not None:
            raise ConfigError(
                "this checkpoint has an embedding head and cannot generate text; use embed_pages "
                "and embed_queries (smolstack map --embed retrieval, smolstack search)"
            )
        constraint, size = self._first_constraint(each[0])
        made = []
        for prompt, own in zip(prompts, each, strict=True):
            request = self._request(
                prompt, own, None if constraint is None else constraint.copy(), deadline
            )
            request.grammar_bytes = size
            self.check(request)
            made.append(request)
        return made

    def _first_constraint(self, options: ValidatedOptions) -> tuple[Constraint | None, int]:
        """Return the constraint of all answers, and the size of its grammar. The allowed first
        tokens take longest to compute, so this is done here and once.
        """
        if options.structure is None:
            return None, 0
        with blamed(option_of(options.structure)):
            grammar = self.compile(options)
            if grammar is None:
                return None, 0
            # With kept special tokens the text contains them, but the grammar does not.
            pointing = not options.keep_special_tokens
            grammars = self.grammars(options.stopping.eos_token_ids, self._lead(options))
            made = self._constraint(grammars, grammar, options, pointing)
            return made.begin(), len(grammar)

    def _request(
        self,
        prompt: Prompt,
        options: ValidatedOptions,
        constraint: Constraint | None,
        deadline: float | None,
    ) -> Request:
        tokenizer, choices = self.processor.tokenizer, None
        ends = options.stopping.eos_token_ids
        options.rules.check_vocabulary(self.model.config.text.vocab_size)
        decode = partial(tokenizer.decode, skip_special=not options.keep_special_tokens)
        positions = self.model.config.text.max_positions
        output = new_output(prompt.token_ids, options, decode, positions, constraint)
        if isinstance(options.structure, Choices):
            lead, texts = self._lead(options), options.structure.texts
            with blamed("choices"):
                choices = continuations(self.processor, prompt, lead, texts, ends, shown=decode)
        return Request(
            prompt, "answer", options=options, output=output, choices=choices, deadline=deadline
        )

    def _constraint(
        self, grammars: Grammars, grammar: str, options: ValidatedOptions, pointing: bool
    ) -> Constraint:
        structure = options.structure
        if isinstance(structure, Lark) and structure.trigger:
            decode = partial(self.processor.tokenizer.decode, skip_special=True)
            return TriggeredConstraint(
                grammars.matcher(grammar), grammars.vocab_size, structure.trigger, decode
            )
        return grammars.constraint(grammar, pointing=pointing)

    def compile(self, options: ValidatedOptions) -> str | None:
        """Return the grammar of the answers, or None.

        Raises:
            GenerationError: the grammar is not supported.
        """
        structure = options.structure
        if structure is None or isinstance(structure, Choices):
            return None
        return self.grammars(options.stopping.eos_token_ids, self._lead(options)).compile(structure)

    def grammars(self, eos_token_ids: tuple[int, ...], lead: str | None = None) -> Grammars:
        """Return grammars over this checkpoint's vocabulary, for answers with these end tokens."""
        key = (eos_token_ids, self.processor.answer_lead if lead is None else lead)
        if key not in self._grammars:
            self._grammars[key] = Grammars(
                self.processor.tokenizer,
                self.model.config.text.vocab_size,
                *key,
                self.processor.pointing,
            )
        return self._grammars[key]

    def _lead(self, options: ValidatedOptions) -> str:
        """Return the text between a prompt and its answer."""
        return "" if options.continues else self.processor.answer_lead
