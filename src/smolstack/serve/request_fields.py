"""Request fields under the names that OpenAI's API, vLLM and llama.cpp give them.

Fields that correspond to an option of smolstack are converted to it. Fields that do not affect the
answer, and fields whose value is a default, are removed. All other fields would change the answer
in a way that is not supported; they are refused, with the most similar known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from smolstack.serve import strict_json
from smolstack.serve.error_responses import RefusedError

# Fields that do not affect the answer.
HARMLESS = frozenset(
    {
        "cache_prompt",
        "cache_salt",
        "guided_decoding_backend",
        "id_slot",
        "metadata",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "return_progress",
        "return_token_ids",
        "safety_identifier",
        "service_tier",
        "slot_id",
        "store",
        "timings_per_token",
        "user",
        "verbosity",
    }
)
# Unsupported fields → values that have no effect; empty lists, objects and strings have none.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "documents": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": (),
    "ignore_eos": (False,),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": (),
    "min_keep": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "n_keep": (0,),
    "n_probs": (0,),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (0, False),
    "repeat_last_n": (-1,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": (),
    "tools": (),
    "top_n_sigma": (-1,),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}
# Other servers' names → the names here.
ALIASES: Mapping[str, str] = {
    "guided_choice": "choices",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_json": "json_schema",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
_STRUCTURED = {"choice": "choices", "regex": "regex", "json": "json_schema", "grammar": "grammar"}
_NEWER = {"functions": "tools", "function_call": "tool_choice and tools"}
_OLDER = frozenset(_NEWER)
# Fields with JSON schemas, in which null is a value.
_WHOLE = frozenset({"schema", "json_schema", "guided_json", "json", "parameters"})
_MESSAGE_HARMLESS = frozenset({"name", "annotations", "reasoning_content", "reasoning", "id"})
_PART_HARMLESS = frozenset({"cache_control", "annotations", "uuid"})


def normalize_fields(data: Any, own: Collection[str] = ()) -> Any:
    """Return a request's body with smolstack's field names; anything but an object is unchanged.

    Args:
        own: fields that this route supports although chats do not.

    Raises:
        RefusedError: two fields contradict each other, or a value has an unknown form.
    """
    if not isinstance(data, Mapping):
        return data
    found = without_nulls(data)
    for name in (HARMLESS & set(found)).difference(own):
        del found[name]
    for name in (set(NEUTRAL) & set(found)).difference(own):
        if found[name] in ([], {}, "") or _is_one_of(found[name], NEUTRAL[name]):
            del found[name]
    for name in _OLDER & set(found):
        raise RefusedError(
            400, f"{name} is the deprecated form of tool calling; send {_NEWER[name]}", param=name
        )
    _read_structured(found)
    for theirs, ours in ALIASES.items():
        if theirs in found:
            _put(found, ours, found.pop(theirs), theirs)
    _read_values(found, sent_names(data))
    messages = found.get("messages")
    if isinstance(messages, list):
        found["messages"] = [_message(message) for message in messages]
    return found


def sent_names(data: Any) -> dict[str, str]:
    """Return the names under which a body has fields that are named differently here: the name
    here → the path in the body."""
    if not isinstance(data, Mapping):
        return {}
    found = {ours: theirs for theirs, ours in ALIASES.items() if data.get(theirs) is not None}
    if isinstance(wanted := data.get("structured_outputs"), Mapping):
        for kind, ours in _STRUCTURED.items():
            if wanted.get(kind) is not None:
                found.setdefault(ours, f"structured_outputs.{kind}")
    return {ours: theirs for ours, theirs in found.items() if data.get(ours) is None}


def without_nulls(data: Any) -> Any:
    """Return a body without the null values of its objects, which clients send for absent fields.

    Raises:
        RefusedError: the body is nested too deeply, or a text contains a lone surrogate.
    """
    try:
        return _without_nulls(data)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None


def _without_nulls(data: Any, key: str = "", *, whole: bool = False) -> Any:
    """Remove nulls from one value; ``whole`` keeps them, for JSON schemas."""
    if isinstance(data, Mapping):
        named = (
            key == "json_schema" and "schema" in data
        )  # OpenAI's object that contains the schema
        whole = whole or (key in _WHOLE and not named)
        return {
            _without_nulls(name): _without_nulls(value, name, whole=whole)
            for name, value in data.items()
            if whole or value is not None
        }
    if isinstance(data, list):
        return [_without_nulls(value, whole=whole) for value in data]
    if isinstance(data, str):
        try:
            data.encode()
        except UnicodeEncodeError:
            raise RefusedError(
                400, f"{key or 'a text'} is not valid Unicode: it contains a lone surrogate"
            ) from None
    return data


def nearest(name: str, known: Collection[str]) -> str:
    """Return text that names the most similar known field; empty if none is similar."""
    close = difflib.get_close_matches(name[:100], sorted(known), 1)
    return f"; the nearest known field is {close[0]}" if close else ""


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of the given ones, with booleans distinct from numbers."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )


def _put(found: dict[str, Any], name: str, value: Any, origin: str) -> None:
    if name in found and found[name] != value:
        raise RefusedError(400, f"{origin} and {name} have different values", param=origin)
    found[name] = value


def _read_structured(found: dict[str, Any]) -> None:
    """Convert vLLM's ``structured_outputs``."""
    wanted = found.get("structured_outputs")
    if not isinstance(wanted, Mapping):
        return
    del found["structured_outputs"]
    for kind, value in wanted.items():
        place = f"structured_outputs.{kind}"
        if kind in _STRUCTURED:
            _put(found, _STRUCTURED[kind], value, place)
        elif kind == "json_object" and value is True:
            _put(found, "response_format", {"type": "json_object"}, place)
        elif value not in (False, "", [], {}):
            raise RefusedError(
                400,
                f"{place} is not supported, expected choice, regex, json, json_object or grammar",
                param=place,
            )


def _read_values(found: dict[str, Any], names: Mapping[str, str]) -> None:
    """Convert values that other servers write differently; ``names``: from sent_names."""
    skip = found.pop("skip_special_tokens", None)
    if isinstance(skip, bool):
        _put(found, "keep_special_tokens", not skip, "skip_special_tokens")
    elif skip is not None:
        raise RefusedError(
            400, f"skip_special_tokens is {skip!r:.50}, expected true or false",
            param="skip_special_tokens",
        )  # fmt: skip
    if found.get("top_k") == -1:
        found["top_k"] = 0
    for name in ("max_tokens", "min_p", "seed"):
        if found.get(name) == -1:  # llama.cpp's value for the default
            del found[name]
    if isinstance(schema := found.get("json_schema"), str):
        try:
            found["json_schema"] = strict_json.read_text(schema)
        except (ValueError, RecursionError) as error:
            name = names.get("json_schema", "json_schema")
            raise RefusedError(400, f"{name} is not valid JSON: {error}", param=name) from None


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    found = {key: value for key, value in message.items() if key not in _MESSAGE_HARMLESS}
    for name in ("tool_calls", "refusal", "audio", "function_call"):
        if found.get(name) in ([], {}, ""):
            del found[name]
    if "function_call" in found or found.get("role") == "function":
        older, newer = (
            ("function_call", "tool_calls") if "function_call" in found
            else ("the role function", "the role tool and a tool_call_id")
        )  # fmt: skip
        raise RefusedError(
            400, f"{older} in a message is the deprecated form of tool calling; send {newer}",
            param="messages",
        )  # fmt: skip
    if found.get("role") == "assistant":
        found.setdefault("content", "")  # null in turns that only contain calls
    if isinstance(found.get("content"), list):
        found["content"] = [_part(part) for part in found["content"]]
    return found


def _part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    found = {key: value for key, value in part.items() if key not in _PART_HARMLESS}
    for name in ("image_url", "video_url"):
        if isinstance(found.get(name), str):
            found[name] = {"url": found[name]}
    if isinstance(file := found.get("file"), Mapping) and "file_id" in file:
        raise RefusedError(
            400, "found file_id, but this server does not store files; send file_data",
            param="messages",
        )  # fmt: skip
    return found
