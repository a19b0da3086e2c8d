"""Weight files: their contents (from headers) and their tensors (memory-mapped)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from smolstack.checkpoint.files import read_json
from smolstack.config.quantization import Format
from smolstack.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "BF16", "F16")
INTEGER_TYPES = ("I8", "I32", "I64")  # quantized weights, and their shapes
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Entry:
    """A tensor of a weight file, as described in its header.

    Attributes:
        file: the weight file.
        shape: shape of the tensor when read.
        dtype: dtype of the tensor when read, as named in safetensors.
        stored: the number format in the file, if it differs: "Q4_1", "MLX 4 bits".
        format: for the integers of a quantized layer, their meaning.
        parameters: the number of weights that it represents; None: one per value.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    stored: str = ""
    format: Format | None = None
    parameters: int | None = None

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def weights(self) -> int:
        """The number of model weights that it represents."""
        return self.elements if self.parameters is None else self.parameters

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype, 8)


def read_entries(folder: Path, also: tuple[str, ...] = ()) -> dict[str, Entry]:
    """Read every tensor's name, shape and dtype from the headers.

    Args:
        also: accepted number formats besides floats and quantized integers.

    Raises:
        CheckpointError: there is no safetensors file, a file is truncated or malformed, or an index
            names a missing file, a file outside the folder, or tensors that its files do not
            contain.
    """
    entries: dict[str, Entry] = {}
    promised: Mapping[str, str] | None = None
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        promised = _weight_map(folder / INDEX)
        names = sorted(set(promised.values()))
    else:
        other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {other} are pickle files, which are never read" if other else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    for name in names:
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                part = file.get_slice(key)
                entries[key] = Entry(name, tuple(part.get_shape()), str(part.get_dtype()))
    if promised is not None and set(promised) != set(entries):
        missing = sorted(set(promised) - set(entries))[:5]
        extra = sorted(set(entries) - set(promised))[:5]
        raise CheckpointError(
            f"{folder / INDEX} and its files disagree: only in the index {missing}, only in the "
            f"files {extra}"
        )
    known = (*FLOAT_TYPES, *INTEGER_TYPES, *also)
    wrong = sorted(key for key, entry in entries.items() if entry.dtype not in known)
    if wrong:
        raise CheckpointError(
            f"{folder} has {entries[wrong[0]].dtype} weights ({wrong[0]}), expected one of "
            f"{list(FLOAT_TYPES)}"
        )
    return entries


def read_tensors(folder: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) pairs, memory-mapped: values are read when used."""
    return WeightFiles(folder).tensors(entries)


class WeightFiles:
    """The safetensors files of a folder, each opened once, when a tensor of it is first read: a
    quantized checkpoint is read layer by layer, and its header would be parsed for every layer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, open_weights] = {}

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) pairs, memory-mapped: values are read when used."""
        for name in sorted({entry.file for entry in entries.values()}):
            if name not in self._files:
                self._files[name] = open_weights(self.folder / name)
            for key, entry in entries.items():
                if entry.file == name:
                    yield key, self._files[name].handle.get_tensor(key)


class open_weights:  # noqa: N801 - used like a function, as open() is
    """Opens a safetensors file; an invalid one raises a CheckpointError that names it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            self.handle: Any = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}"
            ) from error

    def __enter__(self) -> Any:
        return self.handle.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.handle.__exit__(*exception)


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map object")
    for name in weight_map.values():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index} names {name!r}, expected a .safetensors file in its folder"
            )
    return weight_map
