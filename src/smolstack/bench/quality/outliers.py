"""Adds outlier channels, as in trained towers, to a model without changing its function.

A few channels of trained transformers are tens of times larger than the others (Dettmers et al.
2022, LLM.int8(); Xiao et al. 2023, SmoothQuant), which is what makes their activations hard to
quantize. They are added to a model with random weights: a norm's channel is multiplied, and the
columns that read it are divided (the scaling of Nagel et al. 2019, cross-layer equalization, in
reverse). Channels of the attention values are treated likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.vlm import VLM, load

SHARE = 0.01  # of the channels, at least one
FACTORS = (20.0, 60.0)
TOWERS = ("vision", "text")


@dataclass(frozen=True)
class _Link:
    """Layers that write channels, and layers that read them.

    Attributes:
        name: name of the writers, for messages.
        writers: modules whose weight (rows, or entries of a norm) and bias hold a channel.
        readers: linear layers of these inputs.
        columns: for each channel the readers' columns that it feeds, (channels, feeds).
    """

    name: str
    writers: tuple[Any, ...]
    readers: tuple[nn.Linear, ...]
    columns: Tensor


def outlier_folder(
    folder: str | Path,
    out: str | Path,
    *,
    towers: Sequence[str] = TOWERS,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint's function with outlier channels, in float32.

    Args:
        folder: a checkpoint with float weights.
        out: must not exist or be empty, unless ``overwrite``.
        towers, seed: as for :func:`plant_outliers`.

    Raises:
        ConfigError: the weights are quantized, or a tower is not one of TOWERS.
        CheckpointError: a folder cannot be read or written.
    """
    vlm = load(folder, dtype="float32", device="cpu")
    plant_outliers(vlm, towers=towers, seed=seed)
    return vlm.save(out, overwrite=overwrite)


def plant_outliers(
    vlm: VLM,
    *,
    towers: Sequence[str] = TOWERS,
    share: float = SHARE,
    factors: tuple[float, float] = FACTORS,
    seed: int = 0,
) -> VLM:
    """Add outlier channels to a model in place; its function is unchanged except for rounding.

    In every norm, ``share`` of the channels (one at least) of weight and bias are multiplied by
    factors between the two given, and the columns of the linear layers that read them divided by
    the same; so are ``share`` of the channels of the values and the columns of the output
    projection. With grouped-query attention one channel of the values feeds a column of each query
    head of its group. The vision tower's last norm is read by the connector, s² columns a channel;
    the decoder's by the head, which gets weights of its own where it was tied.

    Args:
        towers: some of TOWERS.
        seed: which channels, and how large; the same on every machine.

    Returns:
        The same object.

    Raises:
        ConfigError: the weights are not float32, or a tower is none of TOWERS.
    """
    for tower in towers:
        if tower not in TOWERS:
            raise ConfigError(f"tower is {tower!r}, expected some of {list(TOWERS)}")
    model = vlm.model
    if model.scheme is not None or model.dtype != torch.float32:
        found = model.scheme or str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"the weights are {found}, outliers are planted in float32")
    if "text" in towers and model.head is None:
        _untie(model)
        vlm.config = model.config
    generator = torch.Generator().manual_seed(seed)
    owned: set[int] = set()
    with torch.inference_mode(False), torch.no_grad():
        for tower in towers:
            for link in _links(model, tower):
                _scale(link, _factors(link, share, factors, generator), owned)
    return vlm


def _links(model: VisionLanguageModel, tower: str) -> Iterator[_Link]:
    config = model.config
    layers: Any = model.vision.layers if tower == "vision" else model.decoder.layers
    for index, layer in enumerate(layers):
        attention, name = layer.attention, f"{tower}.layers.{index}"
        first = (attention.query, attention.key, attention.value)
        yield _plain(f"{name}.attention_norm", layer.attention_norm, first)
        second = (layer.up,) if tower == "vision" else (layer.gate, layer.up)
        yield _plain(f"{name}.mlp_norm", layer.mlp_norm, second)
        yield _values(f"{name}.attention.value", attention, config, tower)
    if tower == "text":
        yield _plain("text.norm", model.decoder.norm, (model.head,))
        return
    width = config.vision.hidden_size
    blocks = torch.arange(config.scale**2) * width  # feature (dy·s + dx)·C + c of the connector
    columns = torch.arange(width)[:, None] + blocks
    yield _Link("vision.norm", (model.vision.norm,), (model.connector.proj,), columns)


def _plain(name: str, norm: Any, readers: tuple[Any, ...]) -> _Link:
    return _Link(name, (norm,), readers, torch.arange(len(norm.weight))[:, None])


def _values(name: str, attention: Any, config: Any, tower: str) -> _Link:
    if tower == "vision":
        heads = groups = config.vision.num_heads
        width = config.vision.hidden_size // heads
    else:
        text = config.text
        heads, groups, width = text.num_heads, text.num_kv_heads, text.head_dim
    # Query head h reads the values of group h // (heads / groups).
    columns = torch.arange(heads * width).view(groups, heads // groups, width)
    columns = columns.transpose(1, 2).reshape(groups * width, heads // groups)
    return _Link(name, (attention.value,), (attention.out,), columns)


def _factors(
    link: _Link, share: float, bounds: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Return the factor of each channel: 1 for most of them."""
    channels = len(link.columns)
    chosen = torch.randperm(channels, generator=generator)[: max(1, round(share * channels))]
    low, high = bounds
    drawn = low + (high - low) * torch.rand(len(chosen), generator=generator)
    factors = torch.ones(channels)
    factors[chosen] = drawn
    return factors


def _scale(link: _Link, factors: Tensor, owned: set[int]) -> None:
    for module in link.writers:
        weight = _own(module, "weight", owned)
        weight.mul_(factors if weight.dim() == 1 else factors[:, None])
        if getattr(module, "bias", None) is not None:
            _own(module, "bias", owned).mul_(factors)
    per_column = torch.ones(link.columns.numel())
    per_column[link.columns.flatten()] = factors.repeat_interleave(link.columns.shape[1])
    for module in link.readers:
        _own(module, "weight", owned).div_(per_column)


def _own(module: nn.Module, name: str, owned: set[int]) -> Tensor:
    """Return a parameter that can be written to: loaded ones are pages of a file."""
    parameter = getattr(module, name)
    if id(parameter) not in owned:
        parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(module, name, parameter)
        owned.add(id(parameter))
    data: Tensor = parameter.data
    return data


def _untie(model: VisionLanguageModel) -> None:
    """Make the head a separate copy of the token embedding."""
    table = model.decoder.embedding.weight
    model.head = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
    model.head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    model.config = replace(model.config, tied=False)
