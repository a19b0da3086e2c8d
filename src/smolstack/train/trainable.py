"""Which weights a stage trains, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.recipe import Lora, Stage

BASE = ".base_layer"  # what peft inserts into the name of a layer that it adapts


def part_of(name: str) -> str:
    """ "vision", "connector" or "text": the part that a weight belongs to."""
    first = name.partition(".")[0]
    return first if first in ("vision", "connector") else "text"


def trained_parts(stage: Stage) -> tuple[str, ...]:
    """The parts that a stage trains whole."""
    if stage.train == "lora":
        return ("connector",) if stage.lora.connector else ()
    return {
        "connector": ("connector",),
        "connector+text": ("connector", "text"),
        "full": ("vision", "connector", "text"),
    }[stage.train]


def adapted_layers(model: nn.Module, lora: Lora) -> list[str]:
    """Names of the linear layers that the patterns name, in the model's order.

    Raises:
        ConfigError: a pattern that names no linear layer, or one that cannot be adapted.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The head's weight is used without its module, which an adapter would never notice.
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
                f"the recipe's lora.modules has {pattern!r}, which names no linear layer; "
                f"there are {', '.join(sorted({_pattern(name) for name in linear}))}"
            )
        chosen.update(found)
    if lora.connector and "connector.proj" in chosen:
        raise ConfigError("the recipe trains connector.proj whole and by an adapter; choose one")
    return [name for name in linear if name in chosen]


def _pattern(name: str) -> str:
    """A layer's name with a star for its number."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def changed_weights(model: VisionLanguageModel, stage: Stage) -> set[str]:
    """Names of the weights that differ once the stage is over, adapters merged."""
    parts = trained_parts(stage)
    names = {name for name, _ in model.named_parameters() if part_of(name) in parts}
    if stage.train == "lora":
        names.update(f"{layer}.weight" for layer in adapted_layers(model, stage.lora))
    return names


def plain_name(name: str) -> str:
    """A weight's name without what peft inserted."""
    return name.replace(BASE, "")


def freeze(model: VisionLanguageModel, stage: Stage) -> None:
    """Let gradients reach the stage's weights alone; adapters keep theirs."""
    parts = trained_parts(stage)
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        parameter.requires_grad_(adapter or (part_of(name) in parts and BASE not in name))
