"""Recognizes folders that are not supported checkpoints, before anything else is read.

Folders of related models and of other tools' formats get an error that says what they are and what
to do, instead of one about the first missing key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolstack.errors import CheckpointError

READ_METHODS = ("compressed-tensors", "smolstack")  # schemes.py checks the details
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINER_STATE = ("optimizer.", "scheduler.", "scaler.", "rng_state", "training_args.")
# Keys that occur only in nanoVLM's config.
_NANOVLM = ("lm_hf_repo", "vit_model_type", "vit_hidden_dim", "lm_model_type")
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "hqq": "HQQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "modelopt": "ModelOpt",
    "eetq": "EETQ",
    "aqlm": "AQLM",
}


def refuse_other_kinds(folder: Path) -> None:
    """Raise an error if the folder is known to be of an unsupported kind.

    Raises:
        CheckpointError: one sentence that says what the folder is and what to do.
    """
    config = peek(folder / "config.json")
    if config.get("type") == "smolvla" or config.get("model_type") == "smolvla":
        raise CheckpointError(
            f"{folder} is SmolVLA, a robot policy, not a vision-language model that generates "
            "text; run it with lerobot, or load the SmolVLM2 checkpoint that it was made from"
            + _named(config, "vlm_model_name")
        )
    if is_nanovlm(config):
        raise CheckpointError(
            f"{folder} is a nanoVLM checkpoint, with other weight names and its tokenizer "
            f"elsewhere{_named(config, 'lm_tokenizer')}; smolstack convert-checkpoint {folder} "
            "OUT converts it to this family's format"
        )
    _refuse_quantized(folder, config)
    _refuse_formats(folder)


def is_nanovlm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of nanoVLM's."""
    return "model_type" not in config and any(key in config for key in _NANOVLM)


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes weights quantized by MLX."""
    if isinstance(config.get("quantization"), Mapping):
        return True
    other = config.get("quantization_config")
    return isinstance(other, Mapping) and "quant_method" not in other and "bits" in other


def peek(path: Path) -> Mapping[str, Any]:
    """Return a JSON object, or an empty one if it cannot be read."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    places = (config, text if isinstance(text, Mapping) else {})
    for place in places:
        settings = place.get("quantization_config") or place.get("compression_config")
        if not isinstance(settings, Mapping) or is_mlx(config):
            continue
        method = settings.get("quant_method")
        if method in READ_METHODS:
            continue
        name = _METHODS.get(str(method), repr(method))
        if method == "bitsandbytes":
            name += " (4 bits)" if settings.get("load_in_4bit") else " (8 bits)"
        elif isinstance(settings.get("bits"), int):
            name += f" ({settings['bits']} bits)"
        raise CheckpointError(
            f"{folder} has weights quantized by {name}, expected float weights; load the "
            f"checkpoint that they were quantized from{_named(config, '_name_or_path')}, with "
            "dtype int8 or int4 to save memory"
        )


def _refuse_formats(folder: Path) -> None:
    """Raise an error for a folder without safetensors that holds the model in another format."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    pickles = [name for name in names if name.endswith(_PICKLES) and not _is_state(name)]
    if "adapter_config.json" not in names and pickles:
        raise CheckpointError(
            f"{folder} has weights only in pickle files ({', '.join(pickles[:3])}"
            f"{' …' if len(pickles) > 3 else ''}), which are never read because they can run code; "
            "save them again with transformers' save_pretrained, which writes safetensors"
        )
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        raise CheckpointError(
            f"{folder} contains GGUF files "
            f"({', '.join(files[:4])}{' …' if len(files) > 4 else ''}); pass the language model's "
            "file, and the vision tower's as mmproj (--mmproj)"
        )
    graphs = sorted(path.name for path in folder.glob("onnx/*.onnx"))
    if graphs:
        raise CheckpointError(
            f"{folder} contains only ONNX graphs ({', '.join(graphs[:3])}"
            f"{' …' if len(graphs) > 3 else ''}); load the checkpoint that they were exported from"
        )


def _is_state(name: str) -> bool:
    """Return whether a pickle is a Trainer's state and not weights."""
    return name.startswith(_TRAINER_STATE)


def _named(config: Mapping[str, Any], key: str) -> str:
    """Return ", NAME" of the checkpoint that a config says it was made from."""
    name = config.get(key)
    return f" ({name})" if isinstance(name, str) and name else ""
