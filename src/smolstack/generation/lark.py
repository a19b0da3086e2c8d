"""Grammars for structured output: user-provided ones, and function calls.

Grammars are in llguidance's form of Lark; llama.cpp's GBNF is converted to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolstack.errors import GenerationError

MAX_CALLS = 8
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
# Contexts in which the word "start" is not the rule's name.
_WORDS = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/|(?<![\w.$%-])start(?![\w-])'
)


@dataclass(frozen=True)
class Lark:
    """A grammar that the whole answer must match.

    Attributes:
        grammar: Lark text whose rule ``start`` is the answer.
        trigger: the grammar applies only to answers that begin with this text; others are
            unconstrained. Empty: it always applies.
        name: its name in error messages.
        schemas: what each JSON Schema in it is, in error messages, and its JSON text.
    """

    grammar: str
    trigger: str = ""
    name: str = "grammar"
    schemas: tuple[tuple[str, str], ...] = ()

    def after(self, lead: str) -> str:
        """Return the grammar of the lead followed by an answer."""
        if not lead:
            return self.grammar
        body = _WORDS.sub(lambda m: "the_answer" if m[0] == "start" else m[0], self.grammar)
        maybe = "?" if self.trigger else ""
        return f"start: {json.dumps(lead)}{maybe} the_answer\n{body}"


def read_grammar(grammar: Any) -> Lark:
    """Return a user's grammar, given in Lark or GBNF.

    Raises:
        GenerationError: it is not text, or cannot be converted.
    """
    if isinstance(grammar, Lark):
        return grammar
    if not isinstance(grammar, str) or not grammar.strip():
        raise GenerationError(f"grammar is {grammar!r:.80}, expected Lark or GBNF rules")
    if re.search(r"^\s*[\w-]+\s*::=", grammar, re.MULTILINE):
        grammar = _from_gbnf(grammar)
    if not re.search(r"^\s*\??start\s*:", grammar, re.MULTILINE):
        raise GenerationError("grammar has no rule start, expected one for the whole answer")
    return Lark(grammar)


def _from_gbnf(grammar: str) -> str:
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError:
        raise GenerationError(
            "grammar= needs llguidance: pip install 'smolstack[structured]'"
        ) from None
    try:
        made: str = gbnf_to_lark(grammar)
    except Exception as error:
        raise GenerationError(f"grammar cannot be read as GBNF: {error}") from None
    return made


def calls_grammar(
    functions: Mapping[str, str], *, several: bool, free: bool = False, text: str | None = None
) -> Lark:
    """Return the grammar of an answer that calls functions: ``<tool_call>{"name": …, "arguments":
    …}``.

    Args:
        functions: name → the JSON Schema of its arguments, as JSON text.
        several: whether up to eight calls in a row are allowed.
        free: whether an answer may also be arbitrary text.
        text: with ``free``, the JSON Schema of such text, as JSON text.
    """
    rules = []
    schemas = [(f"arguments of {name}: ", schema) for name, schema in functions.items()]
    for number, (name, schema) in enumerate(functions.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {schema}")
    one = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules += [f"one: {one}", r'blank: (" " | "\n")?']
    begin, end = json.dumps(CALL_BEGIN), json.dumps(CALL_END)
    rules.append(f"call: {begin} blank one blank {end}")
    calls = f"call (blank call){{0,{MAX_CALLS - 1}}}" if several else "call"
    if free and text is not None:
        rules.append(f"body: %json {text}")
        rules.insert(0, f"start: {calls} | body")
        schemas.append(("schema of the text: ", text))
        return Lark("\n".join(rules), name="tools", schemas=tuple(schemas))
    rules.insert(0, f"start: {calls}")
    return Lark("\n".join(rules), CALL_BEGIN if free else "", "tools", tuple(schemas))


def written(calls: Sequence[tuple[str, Any]]) -> str:
    """Return the text that represents calls in a prompt and in an answer."""
    return "\n".join(
        f'{CALL_BEGIN}{{"name": {json.dumps(name)}, "arguments": '
        f"{arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}"
        f"}}{CALL_END}"
        for name, arguments in calls
    )
