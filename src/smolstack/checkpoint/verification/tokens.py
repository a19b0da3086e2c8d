"""Checks of the tokenizer and its prompts against the model's config."""

from __future__ import annotations

from typing import Any

from smolstack.checkpoint.files import CheckpointFiles, parse_json
from smolstack.checkpoint.processor_files import end_tokens
from smolstack.checkpoint.verification.check import Check
from smolstack.config import ModelConfig, as_ids
from smolstack.errors import ConfigError
from smolstack.processor.processor import Processor
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.text import plural


def check_tokenizer(
    check: Check, files: CheckpointFiles, config: ModelConfig
) -> TextTokenizer | None:
    """Check that the vocabulary fits and that the ids in the config are the intended tokens."""
    tokenizer: TextTokenizer | None = None
    with check.collecting():
        tokenizer = TextTokenizer(files.side["tokenizer.json"], files.tokenizer_config)
    if tokenizer is None:
        return None
    vocabulary = config.text.vocab_size
    largest = max(tokenizer.backend.get_vocab().values(), default=-1)
    check.found = f"{tokenizer.size:,} tokens, vocabulary of {vocabulary:,}"
    if largest >= vocabulary:
        check.remarks.append(
            f"tokenizer.json has ids up to {largest}, past config.json's vocabulary of "
            f"{vocabulary}; a prompt that needs one of them is refused"
        )
    named = tokenizer.special_tokens
    image = named.get("image_token", "<image>")
    found = tokenizer.token_id(image)
    if found != config.image_token_id:
        check.problems.append(
            f"tokenizer.json gives {image} the id {found}, but config.json's image_token_id is "
            f"{config.image_token_id}"
        )
    for name in ("bos_token", "eos_token", "pad_token"):
        if name in named and tokenizer.token_id(named[name]) is None:
            check.problems.append(
                f"tokenizer_config.json names {named[name]} as {name}, which tokenizer.json does "
                "not hold"
            )
    _check_added(check, files, tokenizer)
    _check_templates(check, files)
    _check_ids(check, files, config, tokenizer)
    return tokenizer


def _check_added(check: Check, files: CheckpointFiles, tokenizer: TextTokenizer) -> None:
    """Note the tokens that added_tokens.json alone defines.

    transformers adds them to the vocabulary. smolstack reads tokenizer.json only: in the one
    published file of the kind, the model has no embedding for the id.
    """
    name = "added_tokens.json"
    added: dict[str, Any] = {}
    with check.collecting():
        added = parse_json(files.folder / name, files.side.get(name, b"{}"))
    if absent := [token for token in added if tokenizer.token_id(token) is None]:
        check.remarks.append(
            f"{name} has {', '.join(absent[:4])}, which tokenizer.json does not hold; "
            "smolstack reads it as plain text"
        )


def _check_templates(check: Check, files: CheckpointFiles) -> None:
    """Note chat templates that differ from the one that is used: other engines may read them."""
    others = {
        "chat_template.json": parse_json(
            files.folder / "chat_template.json", files.side.get("chat_template.json", b"{}")
        ).get("chat_template"),
        "processor_config.json": files.processor.get("chat_template"),
        "tokenizer_config.json": files.tokenizer_config.get("chat_template"),
    }
    used = (files.chat_template or "").strip()
    if different := [n for n, t in others.items() if isinstance(t, str) and t.strip() != used]:
        check.remarks.append(
            f"{' and '.join(different)} {'has' if len(different) == 1 else 'have'} another chat "
            "template than the one that smolstack and transformers use; other engines may use it"
        )


def check_prompt(
    check: Check,
    files: CheckpointFiles,
    config: ModelConfig,
    settings: ImageSettings,
    tokenizer: TextTokenizer,
) -> None:
    """Check the prompt of a question about an image: one placeholder, and the right number of
    visual tokens.
    """
    with check.collecting():
        processor = Processor(config, settings, tokenizer, files.chat_template)
        ends = end_tokens(files, config, processor)
        if not ends:
            check.remarks.append("no end token is known; only the length ends an answer")
        for token_id in ends:
            if not 0 <= token_id < config.text.vocab_size or tokenizer.token(token_id) is None:
                check.problems.append(f"the end token {token_id} is not in the vocabulary")
        edge = settings.tile_edge
        plan = processor.plan((2 * edge, edge))
        if processor.template is None:
            check.remarks.append("there is no chat template; only rendered prompts can be used")
            return
        prompt = processor.prepare(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": _blank(2 * edge, edge)},
                        {"type": "text", "text": "What does it say?"},
                    ],
                }
            ],
        )
        ids = list(prompt.token_ids)
        visual = ids.count(config.image_token_id)
        if visual != plan.visual_tokens:
            check.problems.append(
                f"the prompt of an image in {plan.tiles} tiles has {visual} image tokens, "
                f"expected {plan.visual_tokens}"
            )
        check.found = (
            f"{len(ids)} tokens for an image of {2 * edge}x{edge} in {plural(plan.tiles, 'tile')}, "
            f"{visual} visual; do_image_splitting is {str(settings.split).lower()}"
        )
        absent = [
            marker
            for marker in (processor.markers.whole, "<row_1_col_1>")
            if tokenizer.token_id(marker) is None
        ]
        if absent:
            check.remarks.append(f"{', '.join(absent)} are written as plain text")


def _check_ids(
    check: Check, files: CheckpointFiles, config: ModelConfig, tokenizer: TextTokenizer
) -> None:
    """Check that the ids of config.json and generation_config.json are tokens of the vocabulary."""
    places = {
        "config.json": files.config,
        "config.json text_config": files.config.get("text_config", {}),
        "generation_config.json": files.generation,
    }
    for place, data in places.items():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            try:
                ids = as_ids(data.get(key))
            except ConfigError as error:
                check.problems.append(f"{place} {key}: {error}")
                continue
            for token_id in ids:
                if 0 <= token_id < config.text.vocab_size and tokenizer.token(token_id):
                    continue
                message = f"{place} {key} is {token_id}, which is not a token of the vocabulary"
                # Published files have a padding id outside the vocabulary; it is never looked up.
                (check.remarks if key == "pad_token_id" else check.problems).append(message)


def _blank(width: int, height: int) -> object:
    from PIL import Image

    return Image.new("RGB", (width, height))
