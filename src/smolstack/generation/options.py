"""The options of ask, stream and ask_many, validated before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smolstack.errors import GenerationError
from smolstack.generation.lark import Lark
from smolstack.generation.sampling import SamplingParams
from smolstack.generation.stopping import RepetitionRule, Stopping
from smolstack.generation.structured_output import Choices, Structure, blamed, read_structure
from smolstack.generation.token_rules import TokenRules, read_rules
from smolstack.option_types import (
    FLAG,
    NUMBER,
    TEXTS,
    TOKEN_IDS,
    TOKEN_NUMBERS,
    WHOLE_NUMBER,
    OptionType,
    check_option_types,
)
from smolstack.processor.inputs import IMAGE_OPTION_TYPES, ImageOptions

DEFAULT_MAX_NEW_TOKENS = 512
MAX_LOGPROBS = 20
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
# Of the options that stand for an answer's structure, structured_output.py checks the types.
_TYPES = {
    "max_new_tokens": WHOLE_NUMBER,
    "temperature": NUMBER,
    "top_k": WHOLE_NUMBER,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "seed": WHOLE_NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": TOKEN_NUMBERS,
    "min_tokens": WHOLE_NUMBER,
    "ignore_eos": FLAG,
    "stop_token_ids": TOKEN_IDS,
    "bad_words": TEXTS,
    "stop": TEXTS,
    "stop_on_repetition": OptionType(
        "True, False or a RepetitionRule", lambda value: isinstance(value, (bool, RepetitionRule))
    ),
    "keep_special_tokens": FLAG,
    "logprobs": WHOLE_NUMBER,
    **IMAGE_OPTION_TYPES,
}


class AnswerOptions(ImageOptions, total=False):
    """Keyword options of ask, stream and ask_many. See also SamplingParams, Stopping and
    ImageOptions. None stands for the default.

    Attributes:
        max_new_tokens: maximum length of the answer in tokens; default 512.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see SamplingParams; greedy
            unless temperature is given.
        presence_penalty, frequency_penalty, logit_bias, min_tokens, ignore_eos, stop_token_ids,
            bad_words: see TokenRules.
        stop: one or more strings that end the answer.
        stop_on_repetition: end an answer that repeats itself; True selects the default rule.
        keep_special_tokens: keep special tokens in the text; document models (SmolDocling,
            granite-docling) answer with them. The end token is never part of the text.
        schema: a JSON Schema or a pydantic model that the answer satisfies (extra ``structured``).
            Objects of a pydantic model have only its fields; a JSON Schema is used unchanged.
        regex: a regular expression that matches the whole answer (extra ``structured``).
        grammar: a context-free grammar that the whole answer matches, in llguidance's form of Lark
            or in llama.cpp's GBNF (extra ``structured``).
        choices: texts of which the answer is one; their probabilities are computed exactly.
        logprobs: return log-probabilities of the generated tokens, and of this many most likely
            tokens at each position (0 to 20).
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    bad_words: Sequence[str]
    stop: str | Sequence[str]
    stop_on_repetition: bool | RepetitionRule
    keep_special_tokens: bool
    schema: Any
    regex: str | None
    grammar: str | Lark | None
    choices: Sequence[str] | None
    logprobs: int | None


@dataclass(frozen=True)
class ValidatedOptions:
    """The validated options, by purpose.

    Attributes:
        continues: whether the answer continues a text, not a chat: its white space is kept, and
            nothing of the chat template precedes its structure.
    """

    sampling: SamplingParams
    stopping: Stopping
    image_options: ImageOptions
    keep_special_tokens: bool
    structure: Structure | None = None
    logprobs: int | None = None
    rules: TokenRules = field(default_factory=TokenRules)
    continues: bool = False


def read_options(options: AnswerOptions, eos_token_ids: tuple[int, ...]) -> ValidatedOptions:
    """Validate the options and group them by purpose.

    Raises:
        GenerationError: an option is unknown, or its value is invalid.
    """
    known = {*AnswerOptions.__annotations__, *ImageOptions.__annotations__}
    unknown, expected = sorted(set(options) - known), sorted(known)
    if unknown:
        raise GenerationError(f"unknown options {unknown}, expected some of {expected}")
    given = check_option_types(options, _TYPES, GenerationError)
    stop, repetition = given.get("stop", ()), given.get("stop_on_repetition", False)
    structures = ("schema", "regex", "grammar", "choices")
    named = next((name for name in structures if given.get(name) is not None), None)
    if isinstance(grammar := given.get("grammar"), Lark):
        named = grammar.name  # the option that selected it
    rules = read_rules(given, named)
    stopping = Stopping(
        max_new_tokens=given.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        eos_token_ids=(*eos_token_ids, *rules.stop_token_ids),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        repetition=RepetitionRule() if repetition is True else repetition or None,
    )
    sampling = SamplingParams(**{name: given[name] for name in _SAMPLING if name in given})
    images: Any = {name: given[name] for name in ImageOptions.__annotations__ if name in given}
    structure = read_structure(
        given.get("schema"),
        given.get("regex"),
        given.get("choices"),
        stopping.stop,
        given.get("grammar"),
    )
    logprobs = given.get("logprobs")
    if isinstance(structure, Choices):
        with blamed("choices"):
            _check_scored(sampling, logprobs)
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise GenerationError(f"logprobs is {logprobs}, expected 0 to {MAX_LOGPROBS}")
    keep = given.get("keep_special_tokens", False)
    return ValidatedOptions(sampling, stopping, images, keep, structure, logprobs, rules)


def _check_scored(sampling: SamplingParams, logprobs: int | None) -> None:
    """Refuse options that have no effect on an answer that is one of several choices."""
    drawn = sampling.temperature > 0
    ignored = {
        "repetition_penalty": sampling.repetition_penalty != 1,
        "top_k": drawn and sampling.top_k > 0,
        "top_p": drawn and sampling.top_p < 1,
        "min_p": drawn and sampling.min_p > 0,
        "logprobs": logprobs is not None,
    }
    if found := [name for name, given in ignored.items() if given]:
        raise GenerationError(
            f"found choices and {found[0]}, which cannot be combined: each choice is scored as a "
            "whole, and its log-probability is returned"
        )
