"""The tokenizer of a checkpoint."""

from __future__ import annotations

import json

import pytest
import tokenizers

import smolstack
from smolstack.checkpoint.new import train_tokenizer
from smolstack.errors import CheckpointError
from smolstack.family import PRESETS
from smolstack.processor.tokenizer import TextTokenizer


def test_special_tokens_keep_their_published_ids() -> None:
    tokens = PRESETS["smolvlm-256m"].tokens
    tokenizer = TextTokenizer(train_tokenizer(tokens, 49280), {})
    assert tokenizer.encode("<row_6_col_6><image><end_of_utterance>") == [49188, 49190, 49279]
    assert tokenizer.size == 49280
    assert tokenizer.decode(tokenizer.encode("Héllo, wörld! 你好 42")) == "Héllo, wörld! 你好 42"


def test_a_prompt_that_begins_with_bos_gets_no_second_one() -> None:
    tokens = PRESETS["idefics3-8b"].tokens
    tokenizer = TextTokenizer(train_tokenizer(tokens, 128259), {"bos_token": tokens.bos})
    assert tokenizer.encode("Hi")[0] == 128000
    assert tokenizer.encode("<|begin_of_text|>Hi") == tokenizer.encode("Hi")


def test_a_saved_truncation_or_padding_is_not_obeyed(tiny_vlm: smolstack.VLM) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_vlm.processor.tokenizer.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = TextTokenizer(backend.to_str().encode(), {})
    text = "What does it say?"
    assert tokenizer.encode(text) == tiny_vlm.processor.tokenizer.encode(text)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", json.dumps({"model": 1}).encode()])
def test_a_broken_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(content, {})


def test_named_tokens_may_be_text_objects_or_nested(tiny_vlm: smolstack.VLM) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<image>"},
        "add_bos_token": False,
    }
    backend = tiny_vlm.processor.tokenizer.backend.to_str().encode()
    named = TextTokenizer(backend, config).special_tokens
    assert named == {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
