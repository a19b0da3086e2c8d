"""The reader's files beside its weights: tokenizer, chat template, processor settings."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from smolstack.checkpoint.save import to_json
from training.reader import shape


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte and no merges, so that every character of an answer is its own token.

    A byte's id is the byte; special tokens follow.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in shape.SPECIAL_TOKENS]
    )
    return tokenizer


def side_files() -> dict[str, bytes]:
    """Contents of every file of the checkpoint folder but config.json and the weights."""
    named = {"bos_token": shape.START, "eos_token": shape.END, "pad_token": shape.PAD}
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Idefics3Processor",
        "model_max_length": shape.CONFIG.text.max_positions,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **named,
        "extra_special_tokens": {
            "image_token": shape.IMAGE,
            "fake_image_token": shape.AROUND,
            "global_image_token": shape.WHOLE,
            "end_of_utterance_token": shape.END,
        },
    }
    files = {
        "preprocessor_config.json": shape.SETTINGS.to_hf(),
        "processor_config.json": {
            "processor_class": "Idefics3Processor",
            "image_seq_len": shape.TOKENS_PER_TILE,
        },
        "generation_config.json": {
            "bos_token_id": shape.IDS[shape.START],
            "eos_token_id": shape.IDS[shape.END],
            "pad_token_id": shape.IDS[shape.PAD],
            "pointing_token_ids": [shape.FIRST_CELL, shape.IDS[shape.POINT]],
        },
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": named,
    }
    contents = {name: to_json(data).encode() for name, data in files.items()}
    contents["chat_template.jinja"] = shape.CHAT_TEMPLATE.encode()
    text: str = build_tokenizer().to_str()
    contents["tokenizer.json"] = text.encode()
    return contents
