"""LoRA adapters as peft saves them: a folder that changes another checkpoint's weights.

Loading adds each adapter to its weight, W + scale · B·A (Hu et al. 2021): the model is as fast as
any other, and ``VLM.save`` writes a whole checkpoint. peft itself is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolstack.checkpoint.files import ADAPTER_CONFIG, CheckpointFiles, read_files, read_json
from smolstack.checkpoint.hub import BUNDLED, find
from smolstack.checkpoint.weights import INDEX, SINGLE, Entry, open_weights
from smolstack.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the name that the base checkpoint has
LOW, HIGH = "lora_A", "lora_B"  # (rank, in), (out, rank)
# Settings that change what an adapter computes, and the values that are understood.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Other beginnings (PiSSA, OLoRA, CorDA, LoftQ …) take from the base's weights what they put
    # into the adapter, so that W + B·A would count it twice.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Attributes:
        folder: where it is.
        base: the folder of the checkpoint that it changes.
        settings: adapter_config.json.
    """

    folder: Path
    base: Path
    settings: Mapping[str, Any]

    def scale(self, layer: str, rank: int) -> float:
        """What a layer's product B·A is multiplied by."""
        alpha = self.settings.get("lora_alpha", 8)  # peft's own default
        patterns = self.settings.get("alpha_pattern") or {}
        try:
            named = (key for key in patterns if re.match(rf"(.*\.)?({key})$", layer))
            alpha = patterns.get(next(named, None), alpha)
        except (re.error, AttributeError, TypeError):
            alpha = patterns
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(
                f"{self.folder / ADAPTER_CONFIG} has lora_alpha or alpha_pattern {alpha!r:.80}, "
                "expected a number, or one for each pattern of layers"
            )
        return float(alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank))


@dataclass(frozen=True)
class Changes:
    """What an adapter does to which of its base's weights, by checkpoint name.

    Attributes:
        low_rank: the names of A and B, and the scale.
        whole: the name of the tensor that stands in a weight's place.
    """

    path: Path
    low_rank: Mapping[str, tuple[str, str, float]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A base weight as the adapter wants it: computed in float32, in the weight's dtype.

        A weight that is used in float32 should be given so: it is not rounded again then.
        """
        if name not in self.low_rank and name not in self.whole:
            return weight
        with open_weights(self.path) as file:
            if name in self.whole:
                changed: Tensor = file.get_tensor(self.whole[name])
            else:
                low, high, scale = self.low_rank[name]
                product = file.get_tensor(high).float() @ file.get_tensor(low).float()
                changed = torch.add(weight.float().cpu(), product, alpha=scale)
        return changed.to(device=weight.device, dtype=weight.dtype)


def find_adapter(folder: Path) -> Adapter | None:
    """The adapter that a folder is; None where it holds whole weights, or no adapter.

    Raises:
        CheckpointError: its base cannot be found, or is an adapter itself; an adapter of a kind
            that is not understood.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or any(
        (folder / name).is_file() for name in (SINGLE, INDEX)
    ):
        return None
    path = folder / ADAPTER_CONFIG
    settings = read_json(path)
    for name, expected in PLAIN.items():
        found = settings.get(name, expected[0])
        if found not in expected:
            raise CheckpointError(f"{path} has {name} {found!r:.40}, expected {expected[0]!r}")
    base_name = settings.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise CheckpointError(
            f"{path} has base_model_name_or_path {base_name!r:.80}, expected the checkpoint that "
            "it changes: a folder or a hub id"
        )
    try:
        base = find(None if base_name == BUNDLED else base_name, settings.get("revision"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is an adapter, and its base (base_model_name_or_path in {path.name}) is not "
            f"there: {error}"
        ) from error
    if (
        not any((base / name).is_file() for name in (SINGLE, INDEX))
        and (base / ADAPTER_CONFIG).is_file()
    ):
        raise CheckpointError(f"{folder} is an adapter of {base}, which is an adapter itself")
    return Adapter(folder, base, settings)


def read_files_of(folder: Path) -> CheckpointFiles:
    """The files of a checkpoint, or of an adapter: its own, and its base's where it has none."""
    adapter = find_adapter(folder)
    return read_files(folder, None if adapter is None else adapter.base)


def read_changes(adapter: Adapter, entries: Mapping[str, Entry]) -> Changes:
    """What an adapter changes, from the headers alone.

    Args:
        entries: its base's weights.

    Raises:
        CheckpointError: no safetensors file; a tensor that is no low-rank matrix of a layer that
            the base has, and none of its weights either; matrices that do not fit.
    """
    path = adapter.folder / WEIGHTS
    if not path.is_file():
        pickle = (adapter.folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle file, which is never read" if pickle else ""
        raise CheckpointError(f"{adapter.folder} has no {WEIGHTS}{hint}")
    with open_weights(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        layer, kind = _parted(name)
        target = name if kind is None else f"{layer}.weight"
        entry = entries.get(target)
        if not key.startswith(PREFIX) or entry is None or (kind and len(entry.shape) != 2):
            raise CheckpointError(
                f"{path} holds {key}, expected {PREFIX}, a weight of {adapter.base} or one of its "
                f"layers, and {LOW} or {HIGH}"
            )
        if kind is not None:
            pairs.setdefault(target, {})[kind] = key
        elif shape != entry.shape:
            raise CheckpointError(
                f"{path} holds {key} as {list(shape)}, the base has {list(entry.shape)}"
            )
        else:
            whole[name] = key
    if not pairs and not whole:
        raise CheckpointError(f"{path} is empty")
    low_rank = {
        name: _checked(adapter, name, pair, shapes, entries[name].shape)
        for name, pair in pairs.items()
    }
    return Changes(path, low_rank, whole)


def _parted(name: str) -> tuple[str, str | None]:
    """A tensor's layer and which of the two matrices it is, None for a whole weight."""
    found = re.fullmatch(rf"(.+)\.({LOW}|{HIGH})\.weight", name)
    return (name, None) if found is None else (found[1], found[2])


def _checked(
    adapter: Adapter,
    name: str,
    pair: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: tuple[int, ...],
) -> tuple[str, str, float]:
    """The names of a layer's two matrices and their scale."""
    found = [list(shapes[pair[kind]]) if kind in pair else None for kind in (LOW, HIGH)]
    low, high = found
    fits = low and high and len(low) == len(high) == 2 and low[0] == high[1] > 0
    if not fits or (high[0], low[1]) != wanted:  # type: ignore[index]
        raise CheckpointError(
            f"{adapter.folder / WEIGHTS} has {LOW} {low} and {HIGH} {high} for {name} "
            f"{list(wanted)}, expected [rank, {wanted[1]}] and [{wanted[0]}, rank]"
        )
    layer = name.removesuffix(".weight")
    return pair[LOW], pair[HIGH], adapter.scale(layer, low[0])  # type: ignore[index]
