"""Reads conversions for MLX: other weight names, and affine group quantization.

``mlx_vlm.convert`` writes a checkpoint folder in which weights have the names of MLX's model, the
convolution has its channels last, and a quantized layer is three tensors: ``weight`` (packed in
uint32), ``scales`` and ``biases``, one of each per group of a row. They are dequantized when read:
w = scale · q + bias, as ``mx.dequantize`` computes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.weights import Entry, open_weights, read_entries
from smolstack.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PACKED = "U32"
BITS = (2, 3, 4, 5, 6, 8)
KEYS = ("quantization", "quantization_config")
# MLX's and Hugging Face's name of a part; the first match is used.
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.text_model."),
    ("language_model.", "model.text_model."),
    ("vision_model.", "model.vision_model."),
    ("connector.", "model.connector."),
)
_PATCHES = "model.vision_model.embeddings.patch_embedding.weight"


def has_names(folder: Path) -> bool:
    """Return whether a folder's weights have MLX's names; False if there are none."""
    try:
        return any(name.startswith("language_model.") for name in read_entries(folder, (PACKED,)))
    except CheckpointError:
        return False  # reading the folder reports the error


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as it was before the conversion, for a model with float weights."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in KEYS}
    return plain


def open_weights_of(folder: Path, config: Mapping[str, Any]) -> Stored:
    """Open the weights of an MLX folder under Hugging Face names, all as floats.

    Raises:
        CheckpointError: the mode or number of bits is not supported; the tensors' shapes do not
            match.
    """
    found = read_entries(folder, (PACKED,))
    settings: Mapping[str, Any] = next(
        (config[key] for key in KEYS if isinstance(config.get(key), Mapping)), {}
    )
    entries: dict[str, Entry] = {}
    layers: dict[str, _Layer] = {}
    theirs: dict[str, str] = {}
    for name, entry in found.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{layer}.weight" in found:
            continue
        ours = hf_name(name)
        theirs[ours] = name
        if entry.dtype == PACKED:
            layers[ours] = _layer(folder, name, found, settings)
            rows, columns = entry.shape[0], layers[ours].columns
            stored = f"MLX {layers[ours].bits} bits"
            entries[ours] = Entry(entry.file, (rows, columns), layers[ours].dtype, stored)
        elif ours == _PATCHES and _channels_last(entry.shape, config):
            out, high, wide, channels = entry.shape
            entries[ours] = Entry(entry.file, (out, channels, high, wide), entry.dtype)
        else:
            entries[ours] = entry

    def read(names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        for ours in entries if names is None else names:
            with open_weights(folder / entries[ours].file) as file:
                tensor = file.get_tensor(theirs[ours])
            if ours in layers:
                layer = layers[ours]
                scales, biases = (_tensor(folder, found, key) for key in layer.companions)
                yield ours, to_floats(tensor, scales, biases, layer.bits)
            elif tuple(tensor.shape) != entries[ours].shape:
                yield ours, tensor.permute(0, 3, 1, 2).contiguous()
            else:
                yield ours, tensor

    return Stored(folder, entries, read)


def hf_name(name: str) -> str:
    """Return the Hugging Face name of an MLX weight; unknown names are returned unchanged."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_floats(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Dequantize a layer's weight to float32.

    Args:
        packed: (out, in · bits / 32) uint32, a stream of bits, lowest first.
        scales, biases: (out, in / group).
        bits: bits per weight.

    Returns:
        (out, in): scale · q + bias, with the scale and bias of each group.
    """
    import torch

    numbers = _unpack(packed.view(torch.uint8).numpy(), bits)
    groups = scales.shape[1]
    q = torch.from_numpy(numbers).view(packed.shape[0], groups, -1).float()
    whole = q * scales.float()[..., None] + biases.float()[..., None]
    return whole.reshape(packed.shape[0], -1)


def _unpack(rows: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """(rows, bytes) → (rows, values) of ``bits`` bits each."""
    if bits == 8:
        return np.ascontiguousarray(rows)
    if bits == 4:
        out = np.empty((rows.shape[0], rows.shape[1] * 2), dtype=np.uint8)
        out[:, 0::2], out[:, 1::2] = rows & 15, rows >> 4
        return out
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(rows.shape[0], -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[..., 0]


class _Layer:
    """A quantized layer: bits per weight, width, and the dtype and names of its scales."""

    def __init__(self, bits: int, columns: int, dtype: str, companions: tuple[str, str]) -> None:
        self.bits, self.columns, self.dtype, self.companions = bits, columns, dtype, companions


def _layer(
    folder: Path, name: str, found: Mapping[str, Entry], settings: Mapping[str, Any]
) -> _Layer:
    path = name.removesuffix(".weight")
    own = settings.get(path)
    chosen = {**settings, **own} if isinstance(own, Mapping) else settings
    mode, group, bits = (chosen.get(key) for key in ("mode", "group_size", "bits"))
    if mode not in (None, "affine"):
        raise CheckpointError(
            f"{folder} is an MLX conversion in mode {mode!r}, expected 'affine'; convert it "
            "from the original checkpoint, or load that one"
        )
    if type(group) is not int or group < 1 or bits not in BITS:
        raise CheckpointError(
            f"{folder} has {name} as {PACKED}, and config.json's quantization has group_size "
            f"{group!r} and bits {bits!r} for it, expected whole numbers, bits one of {list(BITS)}"
        )
    names = (f"{path}.scales", f"{path}.biases")
    shapes = [found[key].shape if key in found else None for key in names]
    packed = found[name].shape
    columns = packed[1] * 32 // bits if len(packed) == 2 else 0
    if (
        columns * bits != 32 * (packed[-1] if packed else 0)
        or columns % group
        or shapes != [(packed[0], columns // group)] * 2
    ):
        raise CheckpointError(
            f"{folder} has {name} {list(packed)} with scales and biases "
            f"{[shape and list(shape) for shape in shapes]}, which is not a weight of {bits} bits "
            f"in groups of {group}"
        )
    return _Layer(bits, columns, found[names[0]].dtype, names)


def _tensor(folder: Path, found: Mapping[str, Entry], name: str) -> Tensor:
    with open_weights(folder / found[name].file) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _channels_last(shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Return whether a convolution's weight is (out, height, width, channels)."""
    vision = config.get("vision_config")
    channels = vision.get("num_channels", 3) if isinstance(vision, Mapping) else 3
    return len(shape) == 4 and shape[3] == channels and shape[1] == shape[2] != channels
