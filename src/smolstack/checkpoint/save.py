"""Saving: writes a temporary folder and renames it, so that the result is always complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smolstack.checkpoint import compressing, keys
from smolstack.checkpoint.files import CheckpointFiles
from smolstack.checkpoint.weights import INDEX, SINGLE
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.output_files import check_new_folder, exclusive_writer, replacing_folder
from smolstack.processor.settings import ImageSettings

MAX_SHARD_BYTES = 5 * 10**9


def save_checkpoint(
    folder: str | Path,
    model: VisionLanguageModel,
    side: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_keys: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face folder, for transformers, vLLM, llama.cpp's converter and smolstack.

    A quantized model is written in compressed-tensors' form (compressing.py).

    Args:
        folder: must not exist, or be empty, unless ``overwrite``.
        model: its weights are written to safetensors in their dtype, under Hugging Face names.
        side: the processor's files by name (see checkpoint.files.SIDE_FILES).
        overwrite: replace an existing folder, once the new one is complete.
        max_shard_bytes: larger weights are split into several files with an index.
        config_keys: top-level keys of config.json, instead of those that the model implies.

    Returns:
        The folder.
    """
    with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
        for name, content in side.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        config = config_json(model.config, model.dtype) | dict(config_keys or {})
        state = compressing.stored_state(model)
        if (quantization := compressing.to_config(model, state)) is not None:
            config["quantization_config"] = quantization
        (temporary / "config.json").write_text(to_json(config), encoding="utf-8")
        _write_weights(temporary, _named(model, state), max_shard_bytes)
    return Path(folder)


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json, with the dtype under its old and its new key."""
    name = str(dtype).removeprefix("torch.")
    out = {**config.to_hf(), "dtype": name, "torch_dtype": name}
    for part in ("text_config", "vision_config"):
        out[part] = {**out[part], "dtype": name, "torch_dtype": name}
    return out


def hf_state_dict(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return the model's weights under their Hugging Face names; storage is shared, not copied."""
    return _named(model, compressing.stored_state(model))


def _named(model: VisionLanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    embedding = model.config.embedding_dim is not None
    return {keys.to_hf(name, embedding_head=embedding): tensor for name, tensor in state.items()}


def to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def complete_side_files(
    files: CheckpointFiles, config: ModelConfig, settings: ImageSettings
) -> dict[str, bytes]:
    """Return a folder's side files unchanged, plus those that other transformers versions need.

    transformers 5 keeps preprocessing inside processor_config.json and the chat template in
    chat_template.jinja; older readers look for preprocessor_config.json and chat_template.json.
    """
    family = "SmolVLM" if config.model_type.startswith("smol") else "Idefics3"
    side = dict(files.side)
    own = files.processor.get("processor_class")
    processor_class = own if isinstance(own, str) else f"{family}Processor"
    made: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": settings.to_hf(processor_class),
        "processor_config.json": {
            "processor_class": processor_class,
            "image_seq_len": (settings.tile_edge // config.vision.patch_size // config.scale) ** 2,
        },
    }
    if files.chat_template is not None:
        made["chat_template.json"] = {"chat_template": files.chat_template}
        side.setdefault("chat_template.jinja", files.chat_template.encode())
    for name, data in made.items():
        side.setdefault(name, to_json(data).encode())
    return side


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder`` that replaces it if the block succeeds.

    Raises:
        CheckpointError: the folder exists and is not empty, unless ``overwrite``; or another
            process is writing it.
    """
    with exclusive_writer(folder, CheckpointError):
        check_new_folder(folder, CheckpointError, overwrite=overwrite)
        with replacing_folder(folder) as temporary:
            yield temporary


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if sizes[-1] and sizes[-1] + size > max_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor.detach().contiguous()
        sizes[-1] += size
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX).write_text(to_json(index), encoding="utf-8")


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    try:
        save_file(shard, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # e.g. a full disk
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(0o644)  # safetensors makes files readable by the owner only
