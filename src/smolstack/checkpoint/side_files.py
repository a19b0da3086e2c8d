"""The meaning of a checkpoint's small files, independent of the transformers version.

transformers 5 moves keys (``rope_theta`` into ``rope_parameters``, preprocessor_config.json into
processor_config.json), drops redundant keys, writes class defaults explicitly and changes the
layout of tokenizer.json. None of that changes a result, so none of it counts as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from smolstack.checkpoint.files import RETRIEVAL_TEMPLATE, CheckpointFiles
from smolstack.config import ModelConfig
from smolstack.errors import SmolstackError
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import named_tokens

# Versions, class names, and dtypes, which the weights determine.
BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "_from_model_config",
        "_attn_implementation_autoset",
        "_commit_hash",
        "architectures",
        "backend",
        "dtype",
        "torch_dtype",
        "image_processor_type",
        "video_processor_type",
        "feature_extractor_type",
        "is_local",
        "local_files_only",
        "name_or_path",
        "processor_class",
        "tokenizer_class",
        "transformers_version",
    }
)
# Class defaults of transformers 5.24 that it writes and other programs leave out.
DEFAULTS: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "do_convert_rgb": True,
    "do_pad": True,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "return_metadata": False,
    "use_cache": True,
    "clean_up_tokenization_spaces": False,
    "default_to_square": True,
}
# In tokenizer_config.json: repeated in tokenizer.json, or compared separately.
_TOLD_ELSEWHERE = frozenset(
    {
        "added_tokens_decoder",
        "additional_special_tokens",
        "chat_template",
        "extra_special_tokens",
        "model_specific_special_tokens",
    }
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_MISSING = object()


def meaning(files: CheckpointFiles) -> dict[str, Any]:
    """Return all settings by "FILE KEY" in one form for all versions; nulls count as absent."""
    found: dict[str, Any] = {}
    for name, values in (
        ("config.json", _config(files.config)),
        ("preprocessor_config.json", _image(files.image)),
        ("video_preprocessor_config.json", files.video),
        ("processor_config.json", _processor(files.processor)),
        ("generation_config.json", files.generation),
        ("tokenizer_config.json", _tokenizer_config(files.tokenizer_config)),
        ("tokenizer.json", _tokenizer(files.side.get("tokenizer.json", b""))),
    ):
        for key, value in _leaves(values, ""):
            last = key.rsplit(".", 1)[-1]
            if value is None or last in BOOKKEEPING:
                continue
            if value != DEFAULTS.get(last, _MISSING):
                found[f"{name} {key}"] = value
    if files.chat_template is not None:
        found["chat template"] = files.chat_template
    if RETRIEVAL_TEMPLATE in files.side:
        found[RETRIEVAL_TEMPLATE] = files.side[RETRIEVAL_TEMPLATE]
    return found


def _config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json with the values that smolstack reads, in the form that smolstack
    writes.
    """
    try:
        known = ModelConfig.from_hf(raw).to_hf()
    except SmolstackError:
        return raw
    found = {**raw, **known}
    for part in ("vision_config", "text_config"):
        own = {key: value for key, value in raw[part].items() if key not in _ROPE}
        found[part] = {**own, **known[part]}
    # rope_parameters contains everything.
    found["text_config"] = {
        key: value
        for key, value in found["text_config"].items()
        if key not in ("rope_theta", "rope_scaling", "tie_word_embeddings")
    }
    padding = raw.get("pad_token_id", raw.get("_pad_token_id"))
    found["pad_token_id"] = known["pad_token_id"] if padding is None else padding
    found.pop("_pad_token_id", None)
    return found


def _image(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return {**raw, **ImageSettings.from_hf(raw).to_hf()}
    except SmolstackError:
        return raw


def _processor(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    elsewhere = ("image_processor", "video_processor", "chat_template")
    return {key: value for key, value in raw.items() if key not in elsewhere}


def _tokenizer_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rest = {key: value for key, value in raw.items() if key not in _TOLD_ELSEWHERE}
    return {**rest, **named_tokens(raw)}


def _tokenizer(content: bytes) -> Mapping[str, Any]:
    """Return the parts of tokenizer.json, each as one value."""
    try:
        raw = json.loads(content)
        parts = {**raw, **{f"model.{key}": value for key, value in raw["model"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"text": content}
    for name in ("model", "version", "truncation", "padding"):
        parts.pop(name, None)
    merges = parts.get("model.merges")
    if isinstance(merges, list):  # "a b" of old files is ["a", "b"] in new ones
        parts["model.merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    after = parts.get("post_processor")
    if isinstance(after, Mapping) and not after.get("special_tokens", True):
        parts["post_processor"] = None  # a template that adds no token
    # Values are not split further: a tokenizer has tens of thousands of entries.
    return {key: json.dumps(value) for key, value in parts.items() if value not in (None, False)}


def _leaves(values: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values
