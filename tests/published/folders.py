"""Folders of published checkpoints: their own files, with random weights and narrow layers.

Every key and value is written as it is published, vocabularies and special ids included, except
widths (a head has 8 numbers instead of 64, or 4 in the tower) and, where a file gives them, numbers
of layers. What a file leaves out stays left out, and is the library's default in these folders too.
The weights are made by transformers' own model of that config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tests.published.forms import Json, Published, Vocabulary
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smolstack.interop.reference import BASE_MODELS

TEXT_HEAD, VISION_HEAD, LAYERS, EMBEDDING = 8, 4, 2, 16
# Enough merges for some words to be one token and others not.
_MERGES = """h e|i n|r e|t he|Ġ the|a t|h at|W hat|Ġ i|Ġi t|o n|in g|Ġ s|s a|sa y|Ġ d|o e|oe s"""


def small_config(config: Json) -> Json:
    """The same config.json with narrow layers, and few of them where it says how many."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    _narrow(text, text.get("num_attention_heads", 32) * TEXT_HEAD)
    _narrow(vision, vision.get("num_attention_heads", 16) * VISION_HEAD)
    if "head_dim" in text:
        text["head_dim"] = TEXT_HEAD
    return {**config, "text_config": text, "vision_config": vision}


def _narrow(part: Json, width: int) -> None:
    part["hidden_size"] = width
    if "intermediate_size" in part:
        part["intermediate_size"] = 2 * width
    if "num_hidden_layers" in part:
        part["num_hidden_layers"] = LAYERS


def write(published: Published, folder: Path) -> Path:
    """The folder of a repository; its weights are the same whenever its sizes are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(published.config)
    write_files(published, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config, published.head), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_files(published: Published, folder: Path) -> None:
    """All files but config.json and the weights."""
    given: dict[str, Any] = {
        "preprocessor_config.json": published.preprocessor,
        "processor_config.json": published.processor,
        "generation_config.json": published.generation,
        "tokenizer_config.json": tokenizer_config(published),
        **published.files,
    }
    for name, content in given.items():
        if content:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(published.vocabulary))


def tokenizer_config(published: Published) -> Json:
    """tokenizer_config.json with its list of added tokens."""
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, number in published.vocabulary.ids.items()
    }
    return {**published.tokenizer, "added_tokens_decoder": added} if published.tokenizer else {}


_MADE: dict[int, bytes] = {}


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """Byte-level BPE with every special token at its id."""
    if vocabulary.size not in _MADE:
        _MADE[vocabulary.size] = _tokenizer_json(vocabulary)
    return _MADE[vocabulary.size]


def _tokenizer_json(vocabulary: Vocabulary) -> bytes:
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _MERGES.split("|"))]
    ordinary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    special = {number: token for token, number in vocabulary.ids.items()}
    supply = iter(ordinary)
    table = {special.get(i) or next(supply, f"<|ordinary_{i}|>"): i for i in range(vocabulary.size)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=table, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([digits, byte_level]) if vocabulary.digits else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in vocabulary.ids]
    )
    if (bos := vocabulary.add_bos) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary.ids[bos])],
        )
    text: str = tokenizer.to_str()
    return text.encode()


def weights(config: Json, head: str) -> dict[str, Tensor]:
    """Random bfloat16 weights under published names, with a spread of about one at every stage."""
    # Parsing changes the object that it is given.
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    automatic: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        if head == "linear":
            model: Any = BASE_MODELS[config["model_type"]](parsed)
            model.linear = nn.Linear(parsed.text_config.hidden_size, EMBEDDING)
        else:
            model = automatic.from_config(parsed)
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=head != "lm_head.weight"):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.1
        elif "norm" in name.rsplit(".", 2)[-2]:
            noise = 1 + 0.1 * noise
        elif name.endswith("embed_tokens.weight"):
            noise *= noise.shape[1] ** -0.5 if head == "tied" else 1
        elif "embedding" not in name or "patch" in name:
            noise /= parameter[0].numel() ** 0.5
        own = f"model.{name}" if head == "linear" and not name.startswith("linear.") else name
        state[own] = noise.bfloat16()
    return state
