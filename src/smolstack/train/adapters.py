"""LoRA through peft: adding, merging and saving adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smolstack.checkpoint import keys
from smolstack.checkpoint.save import atomic_folder
from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.recipe import Lora
from smolstack.train.trainable import adapted_layers

NAME = "default"


@dataclass(frozen=True)
class Adapters:
    """The peft wrapper of a model whose layers it has replaced."""

    tuner: Any
    layers: tuple[str, ...]
    lora: Lora

    def merge(self) -> None:
        """Merge every adapter into its layer's weight and restore the original layers."""
        self.tuner.merge_and_unload()


def add_adapters(model: VisionLanguageModel, lora: Lora, seed: int) -> Adapters:
    """Add adapters to the layers that the recipe selects; initially they change nothing.

    Raises:
        ConfigError: peft is not installed, or a pattern names no layer.
    """
    layers = check_adapters(model, lora)
    import peft

    torch.manual_seed(seed)
    return Adapters(peft.LoraModel(model, _config(lora, layers), NAME), tuple(layers), lora)


def check_adapters(model: VisionLanguageModel, lora: Lora) -> list[str]:
    """Return the layers to which adapters are added.

    Raises:
        ConfigError: peft is not installed, or a pattern names no layer.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError(
            "adapters need the package peft (pip install 'smolstack[train]')"
        ) from None
    return adapted_layers(model, lora)


def save_adapters(model: VisionLanguageModel, adapters: Adapters, folder: Path, base: str) -> Path:
    """Save adapters in peft's format, under transformers' module names.

    ``PeftModel.from_pretrained(model, folder)`` then loads them on transformers' model.
    """
    embedding = model.config.embedding_dim is not None

    def theirs(layer: str) -> str:
        name = keys.to_hf(f"{layer}.weight", embedding_head=embedding)
        return name.removesuffix(".weight")

    tensors = {}
    for layer in adapters.layers:
        module = model.get_submodule(layer)
        for kind in ("lora_A", "lora_B"):
            weight = getattr(module, kind)[NAME].weight
            name = f"base_model.model.{theirs(layer)}.{kind}.weight"
            tensors[name] = weight.detach().cpu().contiguous()
    config = _config(adapters.lora, [theirs(layer) for layer in adapters.layers])
    if adapters.lora.connector:
        name = theirs("connector.proj")
        config.modules_to_save = [name.removeprefix("model.")]
        whole = model.connector.proj.weight.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.weight"] = whole
    config.inference_mode = True
    config.base_model_name_or_path = base
    with atomic_folder(folder, overwrite=True) as temporary:
        config.save_pretrained(str(temporary))
        weights = temporary / "adapter_model.safetensors"
        save_file(tensors, str(weights), {"format": "pt"})
        weights.chmod(0o644)  # safetensors makes files readable by the owner only
    return folder


def _config(lora: Lora, layers: list[str]) -> Any:
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
