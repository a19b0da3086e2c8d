"""The options of an answer, from the fields of a request: sampling, tiling, structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolstack.errors import GenerationError
from smolstack.generation.options import (
    DEFAULT_MAX_NEW_TOKENS,
    AnswerOptions,
    ValidatedOptions,
    read_options,
)
from smolstack.generation.structured_output import closed
from smolstack.generation.token_rules import NAMES as RULES
from smolstack.processor.geometry import Tiling
from smolstack.serve import functions
from smolstack.serve.admission import grammar_bytes
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.schemas import (
    ChatRequest,
    ImagePart,
    PlanRequest,
    ResponseFormat,
    VideoPart,
)
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

# Keywords that combine schemas: if one of them forbade additional properties, it would forbid the
# others' properties.
_SUMS = ("allOf", "if", "then", "else", "dependentSchemas", "unevaluatedProperties")
_STRUCTURES = ("json_schema", "response_format", "regex", "choices", "grammar")


def placed(error: GenerationError, request: ChatRequest) -> Exception:
    """Return an error that names the field of the request which is at fault, if one is known."""
    if error.option is None:
        return error
    field = error.option
    if field == "schema":
        field = "response_format" if request.json_schema is None else "json_schema"
    name = request.sent_name(field)
    return RefusedError(400, f"{name}: {error}", param=name)


def answer_options(
    vlm: VLM, request: ChatRequest, settings: ServerSettings, prompts: int = 1
) -> list[ValidatedOptions]:
    """Return the options of each of the ``n`` answers to one of ``prompts`` prompts.

    Raises:
        RefusedError, SmolstackError: an option is invalid.
    """
    _check_supported(request)
    if (size := grammar_bytes(request)) > settings.grammar_bytes:
        raise RefusedError(
            400,
            f"the schema, grammar, expression and choices have {size:,} characters, at most "
            f"{settings.grammar_bytes:,} are accepted",
        )
    count = request.n or 1
    if count * prompts > settings.answers:
        of = "" if prompts == 1 else f" and there are {prompts} prompts"
        raise RefusedError(
            400, f"n is {count}{of}, at most {settings.answers} answers are allowed", param="n"
        )
    return [read_options(_options(request, settings, i), vlm.eos_token_ids) for i in range(count)]


def tiling(request: ChatRequest | PlanRequest) -> Tiling:
    """Return a request's tiling options; "detail": "low" for all images: one tile each.

    Raises:
        RefusedError: only some images have "detail": "low", or ``split`` contradicts it.
    """
    split = request.split
    if isinstance(request, ChatRequest):
        details = {
            part.image_url.detail if isinstance(part, ImagePart) else "auto"
            for _, part in request.media_parts()
            if not isinstance(part, VideoPart)  # frames are always one tile each
        }
        if "low" in details and len(details) > 1:
            raise RefusedError(
                400,
                "some images have detail low and others do not, expected the same for all images "
                "and files of a request",
                param="messages",
            )
    else:
        details = set() if request.image_url is None else {request.image_url.detail}
    for detail, splits in (("low", False), ("high", True)):
        if detail in details and split is not None and split is not splits:
            raise RefusedError(
                400,
                f"found detail {detail} and split {str(split).lower()}, which contradict each "
                "other",
                param="split",
            )
    if details == {"low"}:
        split = False
    return {
        "split": split,
        "max_image_tokens": request.max_image_tokens,
        "upscale": request.upscale,
    }


def _options(request: ChatRequest, settings: ServerSettings, answer: int) -> AnswerOptions:
    asked = request.max_completion_tokens or request.max_tokens or DEFAULT_MAX_NEW_TOKENS
    schema = (
        _schema(request.response_format)
        if request.json_schema is None
        else _closed_where_it_can(request.json_schema)
    )
    calls = functions.answer_grammar(request, schema, _closed_function)
    chosen: dict[str, Any] = {
        "max_new_tokens": min(asked, settings.new_tokens),
        "stop": request.stop or [],
        "stop_on_repetition": request.stop_on_repetition,
        "keep_special_tokens": request.keep_special_tokens,
        "regex": request.regex,
        "choices": request.choices,
        "grammar": request.grammar if calls is None else calls,
        "schema": None if calls is not None else schema,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        **tiling(request),
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", *RULES):
        if getattr(request, name) is not None:
            chosen[name] = getattr(request, name)
    if request.seed is not None:
        # Each answer samples differently, but reproducibly.
        chosen["seed"] = (request.seed + answer) % 2**63
    return chosen  # type: ignore[return-value]


def _schema(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _closed_where_it_can(wanted.schema_) if wanted.schema_ else {"type": "object"}
    if wanted.json_schema is None and wanted.schema_ is not None:
        return _closed_where_it_can(wanted.schema_)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise RefusedError(
            400, "response_format json_schema has no json_schema.schema", param="response_format"
        )
    schema = wanted.json_schema.schema_
    return closed(schema) if wanted.json_schema.strict else _closed_where_it_can(schema)


def _closed_where_it_can(schema: Any) -> Mapping[str, Any]:
    """Forbid additional properties of objects with named properties, unless the schema allows them:
    small models add properties endlessly. Schemas that combine others are returned unchanged."""
    try:
        found: Mapping[str, Any] = schema if _is_sum(schema) else closed(schema)
        return found
    except RecursionError:
        raise RefusedError(400, "the schema is nested too deeply") from None


def _closed_function(schema: Mapping[str, Any], strict: bool | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = closed(schema) if strict else _closed_where_it_can(schema)
    return found


def _is_sum(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(_is_sum(item) for item in schema)
    if not isinstance(schema, Mapping):
        return False
    # An allOf of one schema, as pydantic 1 writes for a described reference, combines nothing.
    parts = schema.get("allOf")
    lone = isinstance(parts, list) and len(parts) == 1 and "properties" not in schema
    if any(word in schema for word in _SUMS if not (lone and word == "allOf")):
        return True
    if "properties" in schema and any(word in schema for word in ("anyOf", "oneOf", "$ref")):
        return True
    return any(_is_sum(value) for value in schema.values())


def _check_supported(request: ChatRequest) -> None:
    """Refuse options that have no effect without another one."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    given = [name for name in _STRUCTURES if getattr(request, name) is not None]
    if request.response_format is not None and request.response_format.type == "text":
        given.remove("response_format")
    names = [request.sent_name(name) for name in given]
    if len(names) > 1:
        raise RefusedError(
            400, f"found {' and '.join(names)}, expected only one of them", param=names[0]
        )
