"""Randomly initialized checkpoints in published shapes, with a newly trained tokenizer.

Their answers are meaningless; their files, shapes, token counts and speed are those of the real
models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from smolstack.checkpoint.load import DTYPES
from smolstack.checkpoint.save import save_checkpoint, to_json
from smolstack.config import ModelConfig
from smolstack.errors import ConfigError
from smolstack.family import Preset, SpecialTokens
from smolstack.model.vlm import VisionLanguageModel

# Enough text for a few hundred merges, so that prompts tokenize into words and not bytes.
_CORPUS = """What does it say? What is written in this picture? Describe the image in detail.
Can you read the text on the sign? How many lines are there? Read line two of the document.
User: Assistant: The image shows a page with a table, a title and three paragraphs of text.
Convert this page to docling. Compare the two images. Which one is larger, and why?
There is nothing written here. The answer is 42. A quick brown fox jumps over the lazy dog."""

_NAMED_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def new_checkpoint(
    preset: Preset,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    vision_layers: int | None = None,
    text_layers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face folder of a preset's shape with random weights.

    Args:
        preset: the published shape.
        folder: must not exist, or be empty, unless ``overwrite``.
        seed: seed of the weights; the same seed results in the same bytes.
        dtype: "float32", "bfloat16" or "float16".
        vision_layers, text_layers: number of layers, instead of the published one.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {list(DTYPES)}")
    config = preset.config.with_layers(vision_layers, text_layers)
    model = random_model(config, seed=seed, dtype=DTYPES[dtype])
    return save_checkpoint(
        folder,
        model,
        side_files(preset, config),
        overwrite=overwrite,
        config_keys=preset.config_keys,
    )


def random_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """Return a model whose outputs differ clearly between inputs.

    Matrices are scaled by their input width, so that signals neither vanish nor saturate with
    depth. Norms and biases differ from their neutral values, so that tests detect a missing one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model = model.to_empty(device="cpu").to(dtype)
    norms = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # In place if possible: an embedding of 128k tokens is 2 GB.
            noise = parameter if dtype == torch.float32 else torch.empty(parameter.shape)
            noise.normal_(generator=generator)
            if id(parameter) in norms:
                noise.mul_(0.1).add_(1)
            elif name.endswith("bias"):
                noise.mul_(0.1)
            elif name.endswith("embedding.weight") and "patch" not in name:
                # A tied embedding is also the head: logits then have a standard deviation of about
                # 1.
                noise.mul_(config.text.hidden_size**-0.5 if config.tied else 1)
            else:
                noise.div_(math.sqrt(parameter[0].numel()))
            if noise is not parameter:
                parameter.copy_(noise)
    return model.eval()


def side_files(preset: Preset, config: ModelConfig) -> dict[str, bytes]:
    """Return the processor's files: preprocessing, tokenizer, chat template, generation
    defaults.
    """
    family = "SmolVLM" if config.model_type.startswith("smol") else "Idefics3"
    tokens = preset.tokens
    ends = [tokens.ids[token] for token in (*tokens.ends, tokens.eos)]
    image = preset.settings.to_hf(f"{family}Processor")
    if preset.video_edge is not None:
        size = {"longest_edge": preset.video_edge}
        image["video_sampling"] = {"fps": 1, "max_frames": 64, "video_size": size}
    image = {key: value for key, value in image.items() if key not in preset.leaves_out}
    files: dict[str, Any] = {
        "preprocessor_config.json": image,
        "processor_config.json": {
            "processor_class": f"{family}Processor",
            "image_seq_len": config.tokens_per_tile,
        },
        "generation_config.json": {
            "bos_token_id": tokens.ids[tokens.start or tokens.bos],
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": tokens.ids[tokens.pad],
        },
        "tokenizer_config.json": _tokenizer_config(preset, family, config),
        "special_tokens_map.json": {
            "bos_token": tokens.bos,
            "eos_token": tokens.eos,
            "pad_token": tokens.pad,
        },
        "chat_template.json": {"chat_template": preset.template},
    }
    if preset.added_tokens:
        files["added_tokens.json"] = dict(preset.added_tokens)
    contents = {
        name: to_json(data).encode()
        for name, data in files.items()
        if name not in preset.leaves_out
    }
    contents["chat_template.jinja"] = preset.template.encode()
    contents["tokenizer.json"] = train_tokenizer(tokens, config.text.vocab_size)
    return contents


def train_tokenizer(tokens: SpecialTokens, vocab_size: int) -> bytes:
    """Return tokenizer.json: byte-level BPE with every special token at its published id.

    Unused ids are filled with tokens that no text produces, so that the vocabulary has its
    published size.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS.splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    ordinary = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    taken = {token_id: token for token, token_id in tokens.ids.items()}
    supply = iter(ordinary)
    vocabulary = {
        taken.get(i) or next(supply, None) or f"<|unused_{i}|>": i for i in range(vocab_size)
    }
    merges = [(left, right) for left, right in map(_pair, model["merges"])]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in tokens.ids]
    )
    if tokens.add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens.bos} $A",
            pair=f"{tokens.bos} $A {tokens.bos} $B",
            special_tokens=[(tokens.bos, tokens.ids[tokens.bos])],
        )
    text: str = tokenizer.to_str()
    return text.encode()


def _pair(merge: str | list[str]) -> list[str]:
    """Return the two tokens of a merge; files of older versions join them with a space."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _tokenizer_config(preset: Preset, family: str, config: ModelConfig) -> dict[str, Any]:
    tokens = preset.tokens
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": f"{family}Processor",
        "model_max_length": config.text.max_positions,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "bos_token": tokens.bos,
        "eos_token": tokens.eos,
        "pad_token": tokens.pad,
        # A token named here that the vocabulary lacks would be added by transformers, at an id
        # that the embedding does not have.
        "extra_special_tokens": {
            name: token for name, token in _NAMED_TOKENS.items() if token in tokens.ids
        },
        "chat_template": preset.template,
    }
