"""Processor files of a bridged model: preprocessing, tokenizer, chat template, end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolstack.bridging.templates import FAMILY_TEMPLATE, check_template, with_images
from smolstack.bridging.tokens import Vocabulary
from smolstack.checkpoint.save import complete_side_files, to_json
from smolstack.checkpoint.tower import TextSource
from smolstack.config import ModelConfig, as_ids
from smolstack.errors import ConfigError
from smolstack.processor.processor import Processor
from smolstack.processor.prompt import expand_placeholders, user_message
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import TextTokenizer


def files_alone(
    words: TextSource,
    vocabulary: Vocabulary,
    config: ModelConfig,
    settings: ImageSettings,
    chat_template: str | Path | None,
) -> dict[str, bytes]:
    """Return the processor's files for a plain language model."""
    template = _template(words, vocabulary.special_tokens, chat_template)
    ends = as_ids(words.generation.get("eos_token_id")) or words.config.eos_token_ids
    generation = {
        "bos_token_id": config.text.bos_token_id,
        **words.generation,
        "eos_token_id": list(dict.fromkeys((*ends, vocabulary.end_id))),
        "pad_token_id": config.text.pad_token_id,
    }
    return {
        **_processing(config, settings, "Idefics3Processor"),
        **_templates(template, vocabulary.config),
        "tokenizer.json": vocabulary.tokenizer_json,
        "generation_config.json": to_json(generation).encode(),
    }


def files_of_family(
    words: TextSource,
    config: ModelConfig,
    settings: ImageSettings,
    chat_template: str | Path | None,
) -> dict[str, bytes]:
    """Return the text checkpoint's files, with its new vision tower's preprocessing."""
    assert words.family is not None
    side = dict(complete_side_files(words.family, config, settings))
    processor_class = words.family.processor.get("processor_class", "Idefics3Processor")
    side |= _processing(config, settings, str(processor_class))
    if chat_template is not None and str(chat_template) != "text":
        named = TextTokenizer(words.tokenizer_json, words.tokenizer_config).special_tokens
        template = _template(words, named, chat_template)
        side |= _templates(template, words.tokenizer_config)
    return side


def _processing(
    config: ModelConfig, settings: ImageSettings, processor_class: str
) -> dict[str, bytes]:
    tokens = (settings.tile_edge // config.vision.patch_size // config.scale) ** 2
    processor = {"processor_class": processor_class, "image_seq_len": tokens}
    return {
        "preprocessor_config.json": to_json(settings.to_hf(processor_class)).encode(),
        "processor_config.json": to_json(processor).encode(),
    }


def _templates(template: str, tokenizer_config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the chat template in all files in which readers look for it."""
    return {
        "chat_template.jinja": template.encode(),
        "chat_template.json": to_json({"chat_template": template}).encode(),
        "tokenizer_config.json": to_json({**tokenizer_config, "chat_template": template}).encode(),
    }


def _template(
    words: TextSource, special_tokens: Mapping[str, str], wanted: str | Path | None
) -> str:
    if wanted is None:
        wanted = "family" if words.chat_template is None else "text"
    if str(wanted) == "text":
        if words.chat_template is None:
            raise ConfigError(
                f"{words.where} has no chat template; expected chat_template 'family' or a file"
            )
        found = with_images(words.chat_template, special_tokens)
        name = f"the chat template of {words.where}"
    elif str(wanted) == "family":
        found, name = FAMILY_TEMPLATE, "the family's chat template"
    else:
        path = Path(wanted)
        if not path.is_file():
            raise ConfigError(
                f"chat_template is {str(wanted)!r}, expected 'text', 'family' or a Jinja file"
            )
        try:
            found, name = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read as text: {error}") from None
    check_template(found, special_tokens, name)
    return found


def check_files(
    config: ModelConfig, settings: ImageSettings, side: Mapping[str, bytes]
) -> tuple[str, ...]:
    """Check that prompts have as many image tokens as the tower has visual tokens.

    Returns:
        differences from the plain language model, one sentence each.

    Raises:
        CheckpointError, ConfigError, PromptError: before anything is written.
    """
    named = json.loads(side.get("tokenizer_config.json", b"{}"))
    template = side.get("chat_template.jinja")
    tokenizer = TextTokenizer(side["tokenizer.json"], named)
    source = None if template is None else template.decode()
    processor = Processor(config, settings, tokenizer, source)
    if source is None:
        return ()
    plan = processor.plan((settings.longest_edge, settings.longest_edge))
    text = expand_placeholders(processor.render([user_message(1, "?")]), [plan], processor.markers)
    found = tokenizer.encode(text).count(config.image_token_id)
    if found != plan.visual_tokens:
        raise ConfigError(
            f"the tokenizer finds {found} image tokens in a prompt with {plan.visual_tokens} "
            "visual tokens, expected equal numbers"
        )
    asked = processor.render([user_message(0, "?")])
    ids, plain = tokenizer.encode(asked), tokenizer.encode(asked, special=False)
    if ids[0] == plain[0]:
        return ()
    first = tokenizer.token(ids[0])
    return (
        f"chats begin with {first}, which the tokenizer puts before every text, as transformers' "
        "processors have it; apply_chat_template of the language model's tokenizer alone, whose "
        "template does not write it, leaves it out",
    )
