"""Structured output: the options that constrain an answer's text, validated.

A JSON Schema, a regular expression, a grammar, or a list of choices. grammar.py compiles them;
choices are scored instead (choices.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from smolstack.errors import GenerationError
from smolstack.generation.lark import Lark, read_grammar

MAX_CHOICES = 1000


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


def option_of(structure: Structure) -> str:
    """Return the name of the option that a structure was given as."""
    if isinstance(structure, Lark):
        return structure.name
    return {Schema: "schema", Regex: "regex", Choices: "choices"}[type(structure)]


@contextmanager
def blamed(option: str) -> Iterator[None]:
    """Tell the callers of what runs inside that its errors are those of this option."""
    try:
        yield
    except GenerationError as error:
        error.option = error.option or option
        raise


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
    with blamed(grammar.name if isinstance(grammar, Lark) else names[0]):
        return _read(given, names, stop)


def _read(given: Mapping[str, Any], names: Sequence[str], stop: Sequence[str]) -> Structure:
    schema, regex, grammar = given["schema"], given["regex"], given["grammar"]
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
    return _choices(given["choices"])


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
