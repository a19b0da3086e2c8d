"""Selects the weights that a stage trains, by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.recipe import Lora, Stage

BASE = ".base_layer"  # inserted by peft into the name of an adapted layer


def part_of(name: str) -> str:
    """Return the part of a weight: "vision", "connector" or "text"."""
    first = name.partition(".")[0]
    return first if first in ("vision", "connector") else "text"


def trained_parts(stage: Stage) -> tuple[str, ...]:
    """Return the parts that a stage trains fully."""
    if stage.train == "lora":
        return ("connector",) if stage.lora.connector else ()
    return {
        "connector": ("connector",),
        "connector+text": ("connector", "text"),
        "full": ("vision", "connector", "text"),
    }[stage.train]


def adapted_layers(model: nn.Module, lora: Lora) -> list[str]:
    """Return the names of the linear layers that match the patterns, in the model's order.

    Raises:
        ConfigError: a pattern matches no linear layer, or one that cannot be adapted.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The head's weight is used without its module, so an adapter would have no effect.
    linear = [name for name in linear if name != "head"]
    chosen: set[str] = set()
    for pattern in lora.modules:
        found = [
            name
            for name in linear
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        ]
        if not found:
            raise ConfigError(
                f"the recipe's lora.modules has {pattern!r}, which matches no linear layer; "
                f"available: {', '.join(sorted({_pattern(name) for name in linear}))}"
            )
        chosen.update(found)
    if lora.connector and "connector.proj" in chosen:
        raise ConfigError(
            "the recipe trains connector.proj both fully and with an adapter; choose one"
        )
    return [name for name in linear if name in chosen]


def _pattern(name: str) -> str:
    """Return a layer's name with ``*`` in place of its index."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def changed_weights(model: VisionLanguageModel, stage: Stage) -> set[str]:
    """Return the names of the weights that a stage changes, with adapters merged."""
    parts = trained_parts(stage)
    names = {name for name, _ in model.named_parameters() if part_of(name) in parts}
    if stage.train == "lora":
        names.update(f"{layer}.weight" for layer in adapted_layers(model, stage.lora))
    return names


def plain_name(name: str) -> str:
    """Return a weight's name without peft's insertions."""
    return name.replace(BASE, "")


def freeze(model: VisionLanguageModel, stage: Stage) -> None:
    """Enable gradients for the stage's weights only; adapters keep theirs.

    Weights with gradients get memory of their own. The others stay in the memory-mapped checkpoint,
    which the system can drop and read again. (The mapping is copy-on-write: adapters that are
    merged into mapped weights do not change the file.)
    """
    parts = trained_parts(stage)
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        whole = part_of(name) in parts and BASE not in name and not adapter
        if whole:
            parameter.data = parameter.data.clone()
        parameter.requires_grad_(whole or adapter)
