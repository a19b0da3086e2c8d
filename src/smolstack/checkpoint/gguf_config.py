"""Builds the files that a checkpoint folder would have from the metadata of a GGUF model.

The keys are those that llama.cpp's converter writes: ``llama.*`` and ``tokenizer.*`` in the
language model's file, ``clip.*`` in the vision tower's.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from smolstack.checkpoint.files import CheckpointFiles
from smolstack.checkpoint.gguf_blocks import to_floats
from smolstack.checkpoint.gguf_file import GgufFile
from smolstack.checkpoint.gguf_tokenizer import Vocabulary, read_vocabulary
from smolstack.checkpoint.hub import ModelPath
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError

IMAGE, END = "<image>", "<end_of_utterance>"
# Llama 3.1's rescaling of rotary frequencies; a file contains only the result.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192


def files_of(where: ModelPath, text: GgufFile, vision: GgufFile) -> CheckpointFiles:
    """Return settings, tokenizer and chat template of a GGUF model.

    Raises:
        CheckpointError: a key is missing or has an invalid value; the files belong to different
            models.
    """
    vocabulary = read_vocabulary(text)
    image_token = vocabulary.id_of(IMAGE)
    if image_token is None:
        raise CheckpointError(
            f"{text.path} has no token {IMAGE}: it is a language model without image input, "
            "expected one of the Idefics3 / SmolVLM family"
        )
    config = {
        "model_type": "idefics3",
        "image_token_id": image_token,
        "scale_factor": vision.value("clip.vision.projector.scale_factor", int),
        "tie_word_embeddings": "output.weight" not in text.tensors,
        "text_config": text_config(text, vocabulary),
        "vision_config": _vision(vision),
    }
    _check_pair(text, vision, config)
    image, notes = _image(vision)
    tokens_per_tile = ModelConfig.from_hf(config).tokens_per_tile
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": tokens_per_tile}
    generation = {"eos_token_id": end_ids(text, vocabulary)}
    template = text.value("tokenizer.chat_template", str, None)
    side: dict[str, Any] = {
        "preprocessor_config.json": image,
        "processor_config.json": processor,
        "generation_config.json": generation,
        "tokenizer_config.json": vocabulary.config,
    }
    contents = {name: json.dumps(data, indent=2).encode() for name, data in side.items()}
    contents["tokenizer.json"] = vocabulary.tokenizer_json
    return CheckpointFiles(
        folder=where.path,
        config=config,
        image=image,
        video={},
        processor=processor,
        generation=generation,
        tokenizer_config=vocabulary.config,
        chat_template=template,
        side=contents,
        notes=tuple(notes),
    )


def text_config(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the ``text_config`` of a language model's file."""
    hidden, heads = (
        file.value(f"llama.{key}", int) for key in ("embedding_length", "attention.head_count")
    )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix token_embd.weight")
    if len(vocabulary.tokens) > embedding.shape[0]:
        raise CheckpointError(
            f"{file.path} has {len(vocabulary.tokens)} tokens, but token_embd.weight has "
            f"{embedding.shape[0]} rows"
        )
    if heads < 1:
        raise CheckpointError(f"{file.path} has llama.attention.head_count {heads}")
    head_dim = file.value("llama.attention.key_length", int, hidden // heads)
    config = {
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.value("llama.feed_forward_length", int),
        "num_hidden_layers": file.value("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value("llama.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.value("llama.context_length", int),
        "rms_norm_eps": _short(file.value("llama.attention.layer_norm_rms_epsilon", float)),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        **_rotation(file, head_dim),
    }
    for key, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{key}_token_id"] = file.value(f"tokenizer.ggml.{theirs}_token_id", int, None)
    turned = file.value("llama.rope.dimension_count", int, head_dim)
    if turned != head_dim:
        raise CheckpointError(
            f"{file.path} rotates {turned} of the {head_dim} channels of a head, expected all"
        )
    return config


def _rotation(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """Return the RoPE settings: the base, and the rescaling of frequencies."""
    theta = _short(file.value("llama.rope.freq_base", float))
    kind = file.value("llama.rope.scaling.type", str, "none")
    if kind == "linear":
        factor = _short(file.value("llama.rope.scaling.factor", float))
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "none":
        raise CheckpointError(
            f"{file.path} has llama.rope.scaling.type {kind!r:.40}, expected none or linear"
        )
    stored = file.tensors.get("rope_freqs.weight")
    if stored is None:
        return {"rope_theta": theta}
    divisors = to_floats(file.rows(stored), stored.kind).float().flatten().numpy()
    factor = _short(float(divisors.max()))
    if len(divisors) != head_dim // 2 or not np.allclose(
        divisors, _llama3_divisors(theta, head_dim, factor), rtol=1e-4
    ):
        raise CheckpointError(
            f"{file.path} has rope_freqs.weight that are not Llama 3.1's (factor {factor}, "
            f"frequencies {_LOW:g} and {_HIGH:g}, {_CONTEXT} positions)"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _CONTEXT,
        },
    }


def _llama3_divisors(theta: float, head_dim: int, factor: float) -> list[float]:
    """Return Llama 3.1's divisor of each frequency: ``factor`` for long wavelengths, 1 for short
    ones.
    """
    found = []
    for channel in range(0, head_dim, 2):
        turns = _CONTEXT / (2 * math.pi * theta ** (channel / head_dim))
        share = min(1.0, max(0.0, (turns - _LOW) / (_HIGH - _LOW)))
        found.append(1 / ((1 - share) / factor + share))
    return found


def _vision(file: GgufFile) -> dict[str, Any]:
    kind = file.value("clip.projector_type", str, None)
    kind = kind or file.value("clip.vision.projector_type", str, None)
    if kind != "idefics3":
        raise CheckpointError(
            f"{file.path} has a projector of type {kind!r:.40}, expected 'idefics3'"
        )
    patches = file.tensors.get("v.patch_embd.weight")
    if patches is None or len(patches.shape) != 4:
        raise CheckpointError(f"{file.path} has no convolution weight v.patch_embd.weight")
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "image_size": "image_size",
        "patch_size": "patch_size",
    }
    eps = file.value("clip.vision.attention.layer_norm_epsilon", float)
    return {
        "model_type": "idefics3_vision",
        **{ours: file.value(f"clip.vision.{theirs}", int) for ours, theirs in names.items()},
        "num_channels": patches.shape[1],
        "layer_norm_eps": _short(eps),
    }


def _image(file: GgufFile) -> tuple[dict[str, Any], list[str]]:
    """Return preprocessor_config.json, and notes about values that the file does not contain."""
    edge = file.value("clip.vision.image_size", int)
    longest = file.value("clip.vision.preproc_image_size", int, None)
    notes = []
    if longest is None:
        notes.append(
            f"{file.path.name} has no clip.vision.preproc_image_size; images are not split into "
            "tiles"
        )
    mean, std = (
        [_short(float(x)) for x in file.value(f"clip.vision.image_{key}", list, [0.5] * 3)]
        for key in ("mean", "std")
    )
    image = {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": longest is not None,
        "image_mean": mean,
        "image_std": std,
        "max_image_size": {"longest_edge": edge},
        "size": {"longest_edge": edge if longest is None else longest},
        "resample": 1,
    }
    return image, notes


def _check_pair(text: GgufFile, vision: GgufFile, config: dict[str, Any]) -> None:
    """Check that the vision tower's outputs have the decoder's width."""
    wide = vision.value("clip.vision.projection_dim", int, None)
    hidden = config["text_config"]["hidden_size"]
    if wide not in (None, hidden):
        raise CheckpointError(
            f"{vision.path} has visual tokens of {wide} channels, but {text.path} has {hidden}; "
            "they belong to different models"
        )


def end_ids(file: GgufFile, vocabulary: Vocabulary) -> list[int]:
    """Return the tokens that end an answer: those named in the file, and the family's end-of-turn
    token.
    """
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = [file.value(key, int, None) for key in keys]
    return list(dict.fromkeys(i for i in (*named, vocabulary.id_of(END)) if i is not None))


def _short(number: float) -> float:
    """Round a float32 number to the digits that it was written with."""
    return float(str(np.float32(number)))
