"""Tokenizer, chat template and processor files of a converted nanoVLM checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolstack.checkpoint.save import to_json
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError, ConfigError
from smolstack.processor.settings import ImageSettings

_ENDS = ("<|im_end|>", "<|endoftext|>")  # of SmolLM2's chat models and bases


def extra_tokens(folder: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    """Return ``vlm_extra_tokens``: roles and tokens.

    Raises:
        ConfigError: there is no image token.
    """
    extra = raw.get("vlm_extra_tokens")
    if not isinstance(extra, Mapping) or not isinstance(extra.get("image_token"), str):
        raise ConfigError(
            f"{folder / 'config.json'} has no image_token in vlm_extra_tokens; models of nanoVLM's "
            "first version, which put an image before the prompt without tokens for it, are not "
            "converted"
        )
    return {str(name): str(token) for name, token in extra.items()}


def tokenizer_json(
    folder: Path, raw: Mapping[str, Any], extra: Mapping[str, str]
) -> tuple[bytes, int]:
    """Return tokenizer.json with nanoVLM's tokens added at its end, and the image token's id.

    Raises:
        CheckpointError: there is no readable tokenizer.json, or it has another number of tokens.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, expected the tokenizer that the checkpoint names "
            f"(lm_tokenizer {raw.get('lm_tokenizer')!r})"
        )
    try:
        words = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    words.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in extra.values()]
    )
    size, rows = words.get_vocab_size(with_added_tokens=True), raw.get("lm_vocab_size")
    if size != rows:
        raise CheckpointError(
            f"{path} and vlm_extra_tokens have {size} tokens together, but the model has "
            f"lm_vocab_size {rows!r}"
        )
    image = words.token_to_id(extra["image_token"])
    assert image is not None  # it was just added
    text: str = words.to_str()
    return text.encode(), image


def side_files(
    raw: Mapping[str, Any],
    config: ModelConfig,
    extra: Mapping[str, str],
    words: bytes,
    ending: str | None,
) -> dict[str, bytes]:
    """Return the processor's files. Pixels are divided by 255 and not normalized further.

    Images are not split into tiles: only then do both layouts have the same prompt. nanoVLM puts
    the whole image before its tiles, this family after them.

    Args:
        ending: the token that ends an answer, if the tokenizer's own config names it.
    """
    settings = ImageSettings(
        longest_edge=config.vision.image_size,
        tile_edge=config.vision.image_size,
        split=False,
        resample=3,
        mean=None,
        std=None,
    )
    ids = {token["content"]: token["id"] for token in json.loads(words)["added_tokens"]}
    end = next((token for token in (ending, *_ENDS) if token in ids), None)
    named = {
        "image_token": extra["image_token"],
        "fake_image_token": "",  # it has none
        "global_image_token": extra.get("global_image_token", ""),
    }
    template = raw.get("lm_chat_template")
    files: dict[str, Any] = {
        "preprocessor_config.json": settings.to_hf(),
        "processor_config.json": {
            "processor_class": "Idefics3Processor",
            "image_seq_len": config.tokens_per_tile,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Idefics3Processor",
            "model_max_length": config.text.max_positions,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            **({} if end is None else {"eos_token": end, "pad_token": end}),
            "extra_special_tokens": {**extra, **named},
        },
    }
    if end is not None:
        files["generation_config.json"] = {"eos_token_id": ids[end], "pad_token_id": ids[end]}
    made = {name: to_json(data).encode() for name, data in files.items()}
    if isinstance(template, str):
        made["chat_template.jinja"] = _with_parts(template, extra["image_token"]).encode()
    return {**made, "tokenizer.json": words}


def _with_parts(template: str, image_token: str) -> str:
    """Extend nanoVLM's template to accept contents that are lists of parts."""
    return (
        "{%- macro words(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
        "{%- for part in content -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        f"{{%- else -%}}{{{{- '{image_token}' -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}"
        "{%- endmacro -%}"
    ) + template.replace("message['content']", "words(message['content'])")
