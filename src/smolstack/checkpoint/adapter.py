"""LoRA and DoRA adapters as peft saves them: a folder that changes another checkpoint's weights.

Loading adds each adapter to its weight, V = W + scale · B·A (Hu et al. 2021), and with a DoRA
magnitude m (Liu et al. 2024) scales each row to that length, m · V / ‖V‖. The merged model is as
fast as any other, and ``VLM.save`` writes a complete checkpoint. peft is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.checkpoint.adapter_targets import unmatched_targets
from smolstack.checkpoint.files import ADAPTER_CONFIG, read_json
from smolstack.checkpoint.hub import BUNDLED, find
from smolstack.checkpoint.weights import INDEX, SINGLE, Entry, open_weights
from smolstack.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's prefix of the base checkpoint's names
PICKLE = "adapter_model.bin"
LOW, HIGH = "lora_A", "lora_B"  # (rank, in), (out, rank)
MAGNITUDE = "lora_magnitude_vector"  # (out,): DoRA
ROWS = "token_adapter.trainable_tokens_delta"  # (tokens, hidden): new rows of an embedding
# Settings that change what an adapter computes, and the supported values.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Other initializations (PiSSA, OLoRA, CorDA, LoftQ …) subtract from the base weights what they
    # put into the adapter, so W + B·A would count it twice.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Attributes:
        folder: the adapter's folder.
        base: the folder of the checkpoint that it applies to.
        settings: adapter_config.json.
        notes: unusual but valid findings, one sentence each.
    """

    folder: Path
    base: Path
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def scale(self, layer: str, rank: int) -> float:
        """Return the factor of a layer's product B·A."""
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
class LowRank:
    """One layer's adapter: the names of its tensors, and the factor of B·A."""

    low: str
    high: str
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True)
class Changes:
    """The weights of the base checkpoint that an adapter changes, by checkpoint name.

    Attributes:
        low_rank: the low-rank update of a weight.
        whole: the name of the tensor that replaces a weight.
        rows: the name of the tensor that replaces some rows of a weight, and the row numbers.
        notes: unusual but valid findings, one sentence each.
    """

    path: Path
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of weights that the adapter changes."""
        return len({*self.low_rank, *self.whole, *self.rows})

    def touch(self, name: str) -> bool:
        """Return whether the adapter changes this weight."""
        return name in self.low_rank or name in self.whole or name in self.rows

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Return the base weight with the adapter applied: computed in float32, in the weight's
        dtype.

        Pass a weight that is used in float32 as float32, so that the result is not rounded again.
        """
        import torch

        if not self.touch(name):
            return weight
        changed = weight.float().cpu()
        with open_weights(self.path) as file:
            if name in self.whole:
                changed = file.get_tensor(self.whole[name])
            if name in self.low_rank:
                layer = self.low_rank[name]
                product = file.get_tensor(layer.high).float() @ file.get_tensor(layer.low).float()
                changed = torch.add(changed, product, alpha=layer.scale)
                if layer.magnitude is not None:
                    lengths = torch.linalg.norm(changed, dim=1, keepdim=True)
                    changed = changed * (
                        file.get_tensor(layer.magnitude).float()[:, None] / lengths
                    )
            if name in self.rows:
                key, numbers = self.rows[name]
                changed = changed.clone()
                changed[list(numbers)] = file.get_tensor(key).to(changed.dtype)
        return changed.to(device=weight.device, dtype=weight.dtype)


def find_adapter(folder: Path, base: Path | None = None) -> Adapter | None:
    """Return the adapter in a folder; None if it holds complete weights, or no adapter.

    An adapter folder that also contains model.safetensors is read as an adapter on the base that it
    names, as transformers does; ``base=folder`` applies it to the weights in the folder.

    Args:
        base: the checkpoint that the adapter applies to, instead of the one that it names.

    Raises:
        CheckpointError: the base cannot be found, or is an adapter itself; the adapter's type is
            not supported.
    """
    path = folder / ADAPTER_CONFIG
    whole = _has_weights(folder)
    held = (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()
    if not path.is_file() or (whole and not held):
        if base is not None:
            raise CheckpointError(
                f"{folder} is not an adapter (it has no {path.name} with {WEIGHTS}), but a base "
                f"was given for it: {base}"
            )
        return None
    settings = read_json(path)
    for name, expected in PLAIN.items():
        found = settings.get(name, expected[0])
        if found not in expected:
            raise CheckpointError(f"{path} has {name} {found!r:.40}, expected {expected[0]!r}")
    notes = [f"{SINGLE} beside the adapter is not read"] if whole and base != folder else []
    if base is None:
        base = _named_base(folder, settings, whole)
    else:
        named = settings.get("base_model_name_or_path")
        notes.append(f"{path.name} names the base {named}, {base} is used in its place")
    if not _has_weights(base) and (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is an adapter of {base}, which is an adapter itself")
    return Adapter(folder, base, settings, tuple(notes))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def _named_base(folder: Path, settings: Mapping[str, Any], whole: bool) -> Path:
    """Return the base that an adapter names: a hub id, or a path relative to the working directory
    or the adapter.
    """
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} has base_model_name_or_path {name!r:.80}, expected the "
            "folder or hub id of its base; or pass base (--base)"
        )
    if not Path(name).is_dir() and (folder / name).is_dir():
        return folder / name
    try:
        return find(None if name == BUNDLED else name, settings.get("revision"))
    except CheckpointError as error:
        beside = f" next to {SINGLE}" if whole else ""
        raise CheckpointError(
            f"{folder} is an adapter{beside}, and its base (base_model_name_or_path in "
            f"{ADAPTER_CONFIG}) cannot be found: {error}; pass another with base (--base)"
        ) from error


def read_changes(adapter: Adapter, entries: Mapping[str, Entry]) -> Changes:
    """Return what an adapter changes, from the file headers alone.

    Args:
        entries: the base's weights.

    Raises:
        CheckpointError: there is no safetensors file; a tensor is neither a low-rank matrix of a
            layer of the base nor one of its weights; the matrices' shapes do not match.
    """
    path = adapter.folder / WEIGHTS
    if not path.is_file():
        pickle = (adapter.folder / PICKLE).is_file()
        hint = f"; {PICKLE} is a pickle file, which is never read" if pickle else ""
        raise CheckpointError(f"{adapter.folder} has no {WEIGHTS}{hint}")
    with open_weights(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        layer, kind = _parted(name)
        target = name if kind is None else f"{layer}.weight"
        entry = entries.get(target)
        if not key.startswith(PREFIX) or entry is None or (kind and len(entry.shape) != 2):
            raise CheckpointError(
                f"{path} contains {key}, expected {PREFIX}, a weight of {adapter.base} or one of "
                f"its layers, and {LOW} or {HIGH}"
            )
        if kind == ROWS:
            rows[target] = (key, _row_numbers(adapter, layer, shape, entry.shape))
        elif kind is not None:
            pairs.setdefault(target, {})[kind] = key
        elif shape != entry.shape:
            raise CheckpointError(
                f"{path} has {key} of shape {list(shape)}, but the base has {list(entry.shape)}"
            )
        else:
            whole[name] = key
    if not pairs and not whole and not rows:
        raise CheckpointError(f"{path} is empty")
    low_rank = {
        name: _checked(adapter, name, pair, shapes, entries[name].shape)
        for name, pair in pairs.items()
    }
    absent = unmatched_targets(adapter.settings.get("target_modules"), entries)
    notes = [f"target_modules names {word}, which the base has nowhere" for word in absent]
    return Changes(path, low_rank, whole, rows, (*adapter.notes, *notes))


def _parted(name: str) -> tuple[str, str | None]:
    """Split a tensor's name into its layer and its role in the adapter (None: a complete
    weight).
    """
    found = re.fullmatch(rf"(.+)\.(?:({LOW}|{HIGH})\.weight|({MAGNITUDE})(?:\.weight)?)", name)
    if found is not None:
        return found[1], found[2] or found[3]
    if name.endswith(f".{ROWS}"):
        return name.removesuffix(f".{ROWS}"), ROWS
    return name, None


def _row_numbers(
    adapter: Adapter, layer: str, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the rows of an embedding that ``trainable_token_indices`` replaces."""
    found = adapter.settings.get("trainable_token_indices")
    if isinstance(found, Mapping):
        named = (value for key, value in found.items() if layer == key or layer.endswith(f".{key}"))
        found = next(named, None)
    fits = isinstance(found, list) and all(
        type(number) is int and 0 <= number < wanted[0] for number in found
    )
    if not fits or shape != (len(found or ()), wanted[1]):
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG} has trainable_token_indices {found!r:.60} for "
            f"{layer}, and {WEIGHTS} {list(shape)}; expected rows of {list(wanted)}"
        )
    return tuple(found or ())


def _checked(
    adapter: Adapter,
    name: str,
    pair: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: tuple[int, ...],
) -> LowRank:
    """Return a layer's tensor names and factor, after checking the tensors' shapes."""
    found = [list(shapes[pair[kind]]) if kind in pair else None for kind in (LOW, HIGH)]
    low, high = found
    fits = low and high and len(low) == len(high) == 2 and low[0] == high[1] > 0
    if not fits or (high[0], low[1]) != wanted:  # type: ignore[index]
        raise CheckpointError(
            f"{adapter.folder / WEIGHTS} has {LOW} {low} and {HIGH} {high} for {name} "
            f"{list(wanted)}, expected [rank, {wanted[1]}] and [{wanted[0]}, rank]"
        )
    layer, dora = name.removesuffix(".weight"), bool(adapter.settings.get("use_dora"))
    magnitude = shapes[pair[MAGNITUDE]] if MAGNITUDE in pair else None
    if magnitude != ((wanted[0],) if dora else None):
        raise CheckpointError(
            f"{adapter.folder / WEIGHTS} has {MAGNITUDE} {magnitude and list(magnitude)} for "
            f"{layer}, and {ADAPTER_CONFIG} use_dora {dora}; expected "
            f"{[wanted[0]] if dora else 'none'}"
        )
    scale = adapter.scale(layer, low[0])  # type: ignore[index]
    return LowRank(pair[LOW], pair[HIGH], scale, pair.get(MAGNITUDE))
