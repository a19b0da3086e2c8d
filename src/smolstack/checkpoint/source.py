"""Opens a checkpoint in any supported file format: settings, entries and tensors.

Loading, ``verify``, ``inspect`` and ``diff`` all read checkpoints through :func:`open_source`: a
folder, an adapter on its base, an MLX conversion, or GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from smolstack.checkpoint import mlx
from smolstack.checkpoint.adapter import Adapter, Changes, find_adapter, read_changes
from smolstack.checkpoint.compressed import open_compressed
from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import CheckpointFiles, read_files
from smolstack.checkpoint.gguf_source import open_gguf
from smolstack.checkpoint.hub import GGUF, ModelPath
from smolstack.checkpoint.unsupported import is_mlx, peek, refuse_other_kinds
from smolstack.checkpoint.weights import Entry, WeightFiles, read_entries
from smolstack.errors import CheckpointError, ConfigError

BARE = ("vision_model.", "text_model.", "connector.")  # prefixes of names in a model without a head


@dataclass(frozen=True)
class Source:
    """An opened checkpoint; weights stay on disk until they are read.

    Attributes:
        where: location of the files.
        files: settings, and the tokenizer's and processor's files.
        weights: weights under Hugging Face names, without the adapter's changes.
        kind: "safetensors", "MLX" or "GGUF".
        changes: what an adapter does to them.
        notes: derived values and unusual but valid findings, one sentence each.
    """

    where: ModelPath
    files: CheckpointFiles
    weights: Stored
    kind: str = "safetensors"
    changes: Changes | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All weights by Hugging Face name."""
        return self.weights.entries

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) pairs of all or the given weights, on the CPU.

        Weights that no adapter changes are memory-mapped, in the dtype of their entry if the file
        stores them so. Weights that an adapter changes are computed in float32.
        """
        for name, tensor in self.weights.read(names):
            if self.changes is None or not self.changes.touch(name):
                yield name, tensor
            else:
                yield name, self.changes.apply(name, tensor.float())

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by weight file."""
        files = {entry.file: self.weights.folder / entry.file for entry in self.entries.values()}
        if self.where.mmproj is not None:
            files[self.where.mmproj.name] = self.where.mmproj
        if self.changes is not None:
            files[self.changes.path.name] = self.changes.path
        return {name: files[name].stat().st_size for name in sorted(files)}


def open_source(where: Path | ModelPath, *, floats: bool = False) -> Source:
    """Open a checkpoint: reads JSON and headers, not the weights.

    Args:
        where: anything that can be loaded.
        floats: dequantize integers instead of reading quantized layers.

    Raises:
        CheckpointError, ConfigError: naming file, key, what was found and what was expected.
    """
    if isinstance(where, Path):
        where = ModelPath(where)
    if where.path.suffix.lower() == GGUF and where.path.is_file():
        files, weights = open_gguf(where)
        return Source(where, files, weights, "GGUF", notes=files.notes)
    if where.mmproj is not None:
        raise CheckpointError(
            f"{where.path} is not a GGUF file, but a vision tower file was given: {where.mmproj}"
        )
    if where.path.is_dir():
        refuse_other_kinds(where.path)
    adapter = find_adapter(where.path, where.base)
    files = read_files(where.path, None if adapter is None else adapter.base)
    place = where.path if adapter is None else adapter.base
    return _with_weights(where, files, place, adapter, floats=floats)


def _with_weights(
    where: ModelPath,
    files: CheckpointFiles,
    place: Path,
    adapter: Adapter | None,
    *,
    floats: bool,
) -> Source:
    config, kind = files.config, "safetensors"
    if is_mlx(config) or mlx.has_names(place):
        kind, weights = "MLX", mlx.open_weights_of(place, config)
        config = mlx.without_quantization(config)
        files = replace(files, config=config)
    else:
        weights = open_compressed(open_folder(place), config, None, floats=floats)
        _refuse_integers(adapter, weights)
    changes = None if adapter is None else read_changes(adapter, weights.entries)
    notes = [
        *files.notes,
        *weights.notes,
        *weights.losses,
        *(() if changes is None else changes.notes),
    ]
    return Source(where, files, weights, kind, changes, tuple(notes))


def _refuse_integers(adapter: Adapter | None, weights: Stored) -> None:
    held = [entry.stored for entry in weights.entries.values() if entry.format is not None]
    if adapter is not None and held:
        raise ConfigError(
            f"{adapter.folder} is an adapter of {weights.folder}, which has {held[0]} weights, "
            "expected float weights; merge it with the float checkpoint first, then quantize"
        )


def kind_of_files(where: ModelPath) -> str:
    """Return the format of a checkpoint: "GGUF", "adapter", "MLX" or "folder"."""
    if not where.path.is_dir():
        return "GGUF"
    if find_adapter(where.path, where.base) is not None:
        return "adapter"
    config = peek(where.path / "config.json")
    return "MLX" if is_mlx(config) or mlx.has_names(where.path) else "folder"


def open_folder(folder: Path) -> Stored:
    """Open the weights of a folder of safetensors files; names of a base model get its prefix."""
    found = read_entries(folder)
    if not found or not all(name.startswith(BARE) for name in found):
        files = WeightFiles(folder)
        return Stored(folder, found, lambda names: files.tensors(chosen(found, names)))
    named = {f"model.{name}": entry for name, entry in found.items()}
    note = (
        "the weights are those of the model without its head (vision_model, connector, "
        "text_model); the token embedding stands in for lm_head"
    )
    return Stored(folder, named, _renamed(folder, found), (note,))


def _renamed(
    folder: Path, found: Mapping[str, Entry]
) -> Callable[[Collection[str] | None], Iterator[tuple[str, Tensor]]]:
    files = WeightFiles(folder)

    def read(names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        wanted = None if names is None else [name.removeprefix("model.") for name in names]
        for name, tensor in files.tensors(chosen(found, wanted)):
            yield f"model.{name}", tensor

    return read


def chosen(entries: Mapping[str, Entry], names: Collection[str] | None) -> Mapping[str, Entry]:
    """Return the entries with the given names, or all."""
    return entries if names is None else {name: entries[name] for name in names}
