"""Structured output: answers that match a JSON Schema or a regular expression.

llguidance (extra ``structured``) computes which tokens may come next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from smolstack.errors import GenerationError
from smolstack.generation import form_limits
from smolstack.generation.constraint import Constraint, reason_of
from smolstack.generation.lark import Lark, read_grammar
from smolstack.processor.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHOICES = 1000
# JSON on one line with the usual spaces. With free white space, an uncertain model may generate
# white space endlessly.
_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


@dataclass(frozen=True)
class Schema:
    """A JSON Schema, and the pydantic model that it came from, if one was given."""

    schema: Mapping[str, Any] | bool
    model: Any = None

    def parse(self, text: str) -> Any:
        """Return the value that an answer represents; None if the pydantic model's validators
        reject it.
        """
        if self.model is None:
            return json.loads(text)
        try:
            return self.model.model_validate_json(text)
        except ValueError:
            return None


@dataclass(frozen=True)
class Regex:
    """A regular expression that must match the whole answer."""

    pattern: str


@dataclass(frozen=True)
class Choices:
    """Texts of which the answer is one."""

    texts: tuple[str, ...]


Structure: TypeAlias = "Schema | Regex | Choices | Lark"


def read_structure(
    schema: Any,
    regex: str | None,
    choices: Sequence[str] | None,
    stop: Sequence[str],
    grammar: str | Lark | None = None,
) -> Structure | None:
    """Return the requested structure, or None.

    Raises:
        GenerationError: more than one was given, one was combined with stop strings, or a value has
            the wrong type.
    """
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise GenerationError(f"found {' and '.join(names)}, expected only one")
    if stop:
        raise GenerationError(
            f"found stop strings and {names[0]}, which cannot be combined: a stop string could "
            "make the answer invalid"
        )
    if schema is not None:
        return _schema(schema)
    if regex is not None:
        if not isinstance(regex, str):
            raise GenerationError(f"regex is a {type(regex).__name__}, expected text")
        return Regex(regex)
    if grammar is not None:
        return read_grammar(grammar)
    return _choices(choices)


def _schema(schema: Any) -> Schema:
    if isinstance(schema, (Mapping, bool)):
        return Schema(schema)
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return Schema(closed(schema.model_json_schema()), schema)
    raise GenerationError(
        f"schema is a {type(schema).__name__}, expected a JSON Schema (a dict) or a pydantic model"
    )


def closed(schema: Any) -> Any:
    """Return a schema whose objects have the named properties and no others.

    By default, JSON Schema allows additional properties in every object, and models often keep
    inventing them.

    Raises:
        GenerationError: the schema is nested too deeply.
    """
    try:
        return _closed(schema)
    except RecursionError:
        raise GenerationError("the schema is nested too deeply") from None


def _closed(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        made = {key: _closed_under(key, value) for key, value in schema.items()}
        if "properties" in made and not {"additionalProperties", "patternProperties"} & set(made):
            made["additionalProperties"] = False
        return made
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    return schema


def _closed_under(key: str, value: Any) -> Any:
    if key in ("const", "enum", "default", "examples"):
        return value  # data, not schemas
    if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
        return {name: _closed(one) for name, one in value.items()}
    return _closed(value)


def _choices(choices: Any) -> Choices:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise GenerationError(f"choices is {choices!r:.80}, expected a list of texts")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise GenerationError(f"a choice is {choice!r:.80}, expected text")
    if len(set(choices)) < len(choices):
        raise GenerationError("two choices are equal, expected different choices")
    if len(choices) > MAX_CHOICES:
        raise GenerationError(f"found {len(choices)} choices, expected at most {MAX_CHOICES}")
    return Choices(tuple(choices))


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
            form_limits.check_patterns(form_limits.patterns_in(given, lark=True))
            text: str = matching.LLMatcher.grammar_from_lark(structure.after(self.lead))
            if structure.name == "grammar" or form_limits.needs_trial(given):
                form_limits.try_grammar(text, structure.name)
            self._check(structure.name, "", text)
            return text
        lead = f"{json.dumps(self.lead)} " if self.lead else ""
        if isinstance(structure, Regex):
            form_limits.check_patterns([structure.pattern])
            alone = matching.LLMatcher.grammar_from_regex(structure.pattern)
            self._check("regex", structure.pattern, alone)
            body = f"/{matching.regex_to_lark(structure.pattern)}/"
            lark = f"start: {lead}{body}"
        else:
            schema = guided(structure.schema)
            form_limits.check_patterns(form_limits.patterns_in(schema, lark=False))
            lark = f"start: {lead}body\nbody: %json {schema}"
        grammar: str = matching.LLMatcher.grammar_from_lark(lark)
        if isinstance(structure, Schema) and form_limits.needs_trial(schema):
            form_limits.try_grammar(grammar, "schema")
        name = "regex" if isinstance(structure, Regex) else "schema"
        self._check(name, "", grammar)
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

    def _check(self, name: str, shown: str, grammar: str) -> None:
        refused, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokens()
        )
        if refused:
            what = f"{name} {shown!r:.80}" if shown else f"the {name}"
            raise GenerationError(f"{what} is not supported: {reason_of(messages[0])}")

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
