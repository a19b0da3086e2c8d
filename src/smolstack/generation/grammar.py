"""Grammars of structured output, compiled for a checkpoint's vocabulary.

llguidance (extra ``structured``) computes which tokens may come next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from smolstack.errors import GenerationError
from smolstack.generation import grammar_limits
from smolstack.generation.constraint import Constraint, reason_of
from smolstack.generation.lark import Lark
from smolstack.generation.structured_output import Regex, Schema
from smolstack.processor.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON on one line with the usual spaces. With free white space, an uncertain model may generate
# white space endlessly.
_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

_PATTERNS_TRIED = 100  # one by one, to name the one that is refused


@dataclass
class Grammars:
    """Grammars over one checkpoint's vocabulary.

    Attributes:
        tokenizer: the checkpoint's tokenizer.
        vocab_size: V, logits per token.
        eos_token_ids: tokens that end an answer.
        lead: text that the chat template expects between the prompt and an answer.
        pointing: tokens that are not part of an answer's text.
    """

    tokenizer: TextTokenizer
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    lead: str
    pointing: range = range(0)
    _backend: LLTokenizer | None = field(default=None, repr=False)

    def compile(self, structure: Schema | Regex | Lark) -> str:
        """Return the grammar of an answer, including its lead.

        Raises:
            GenerationError: the schema or expression is not supported, or llguidance is not
                installed.
        """
        matching = _llguidance()
        if isinstance(structure, Lark):
            given = structure.grammar
            grammar_limits.check_patterns(grammar_limits.patterns_in(given, lark=True))
            text: str = matching.LLMatcher.grammar_from_lark(structure.after(self.lead))
            if structure.name == "grammar" or grammar_limits.needs_trial(given):
                grammar_limits.try_grammar(text, structure.name)
            self._check(structure.name, "", text, structure.schemas)
            return text
        lead = f"{json.dumps(self.lead)} " if self.lead else ""
        if isinstance(structure, Regex):
            grammar_limits.check_patterns([structure.pattern])
            alone = matching.LLMatcher.grammar_from_regex(structure.pattern)
            self._check("regex", structure.pattern, alone)
            body = f"/{matching.regex_to_lark(structure.pattern)}/"
            lark = f"start: {lead}{body}"
        else:
            schema = guided(structure.schema)
            grammar_limits.check_patterns(grammar_limits.patterns_in(schema, lark=False))
            lark = f"start: {lead}body\nbody: %json {schema}"
        grammar: str = matching.LLMatcher.grammar_from_lark(lark)
        if isinstance(structure, Schema) and grammar_limits.needs_trial(schema):
            grammar_limits.try_grammar(grammar, "schema")
        if isinstance(structure, Regex):
            self._check("regex", "", grammar)
        else:
            self._check("schema", "", grammar, [("", schema)])
        return grammar

    def constraint(self, grammar: str, *, pointing: bool = True) -> Constraint:
        """Return a constraint for one answer, from the grammar returned by :meth:`compile`.

        ``pointing``: whether pointing tokens are allowed.
        """
        matcher = self.matcher(grammar)
        begun = matcher.deep_copy()
        if self.lead:  # which precedes the constrained text
            begun.try_consume_tokens(self.tokenizer.encode(self.lead, special=False))
        possible = np.frombuffer(begun.compute_logit_bias(), dtype=np.uint8).any()
        stuck = begun.is_stopped() and not begun.is_accepting()
        if begun.is_error() or not possible or stuck:
            raise GenerationError("no answer can satisfy the grammar or schema")
        pointing_ids = self.pointing if pointing else range(0)
        return Constraint(matcher, self.vocab_size, len(self.lead), pointing_ids)

    def matcher(self, grammar: str) -> LLMatcher:
        """Return llguidance's matcher for one answer, for a grammar returned by :meth:`compile`."""
        made: LLMatcher = _llguidance().LLMatcher(self._tokens(), grammar, log_level=0)
        return made

    def _check(
        self, name: str, shown: str, grammar: str, schemas: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Raise GenerationError for a grammar that is not supported.

        ``schemas``: what each JSON Schema in it is, and its text.
        """
        message = self._refused(grammar)
        if message is not None:
            what = f"{name} {shown!r:.80}" if shown else f"the {name}"
            reason = reason_of(message)
            where = self._pattern_refused(schemas, reason)
            verb = "are" if name == "tools" else "is"
            raise GenerationError(f"{what} {verb} not supported: {where}{reason}")

    def _pattern_refused(self, schemas: Sequence[tuple[str, str]], reason: str) -> str:
        """Return text that names the pattern which is refused for this reason; empty if it is not
        a pattern's. llguidance gives its position in the grammar that it is written in, if any."""
        as_grammar = _llguidance().LLMatcher.grammar_from_regex
        for what, text in schemas:
            placed = grammar_limits.placed_patterns(json.loads(text))
            for place, pattern in islice(placed, _PATTERNS_TRIED):
                if reason in (self._refused(as_grammar(pattern)) or ""):
                    return f"{what}{place} {pattern!r:.80}: "
        return ""

    def _refused(self, grammar: str) -> str | None:
        """Return why a grammar is not supported, in llguidance's words, or None."""
        refused, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokens()
        )
        return str(messages[0]) if refused else None

    def _tokens(self) -> LLTokenizer:
        if self._backend is None:
            vocabulary = max(self.vocab_size, self.tokenizer.size)
            try:
                self._backend = _llguidance().LLTokenizer(
                    self.tokenizer.backend.to_str(),
                    n_vocab=vocabulary,
                    eos_token=list(self.eos_token_ids) or None,
                )
            except (ValueError, RuntimeError) as error:
                raise GenerationError(
                    "structured output needs the bytes of each token, which tokenizer.json does "
                    f"not define: {reason_of(str(error))}"
                ) from error
        return self._backend


def guided(schema: Mapping[str, Any] | bool) -> str:
    """Return a schema as JSON text that also specifies white space."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        return json.dumps({**schema, "x-guidance": _STYLE})
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"schema is not valid JSON: {error}") from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GenerationError(
            "schema=, regex= and grammar= need llguidance: pip install 'smolstack[structured]'"
        ) from None
    return llguidance
