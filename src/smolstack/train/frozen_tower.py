"""Caches the outputs of a frozen vision tower on disk, by image content.

The connector concatenates s² patches before the projection. The tower's output is cached in this
form, which has the same size, and in the dtype of the projection's input (bfloat16 under bfloat16
autocast, which is half the size and exact). If the connector is frozen too, its smaller outputs are
cached instead.

The tower may compute in another precision than the rest of the model (tower_precision.py), which is
part of an entry's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from smolstack.model.connector import Idefics3Connector
from smolstack.model.digest import weights_digest
from smolstack.model.tile_passes import in_passes
from smolstack.model.vision import VisionTower
from smolstack.model.vlm import VisionLanguageModel
from smolstack.output_files import atomic_file, remove_leftovers
from smolstack.processor.geometry import TilePlan
from smolstack.processor.image_hash import content_digest
from smolstack.processor.inputs import ImageInput
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import ImageSource
from smolstack.train.batches import as_source
from smolstack.train.tower_precision import tower_in

FORMAT = b"2"  # changes when the meaning of the stored tensors changes


class FrozenTower:
    """Outputs of a frozen vision tower (and connector) for images.

    Every image is encoded separately, so its outputs do not depend on other images and are the same
    with and without a cache.

    Args:
        model: its vision tower is frozen.
        processor: cuts images.
        projected: the connector is frozen too, and its outputs are cached.
        autocast: compute in bfloat16 (the tower too, if its precision is float32).
        precision: of the tower, one of tower_precision.PRECISIONS.
        cache: the folder of the cache, or None to compute every time.

    Attributes:
        computed, read: number of images encoded, and of those found in the cache.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        *,
        projected: bool,
        autocast: bool = False,
        precision: str = "float32",
        cache: Path | None = None,
    ) -> None:
        self.model, self.processor, self.cache = model, processor, cache
        self.projected, self.autocast, self.precision = projected, autocast, precision
        self.computed = self.read = 0
        self._tower: VisionTower | None = None  # made when the first image is computed
        for folder in [] if cache is None or not cache.is_dir() else cache.iterdir():
            remove_leftovers(folder)  # of killed processes
        modules: list[nn.Module] = [model.vision, *([model.connector] if projected else [])]
        self._constant = b"|".join(
            (
                FORMAT,
                weights_digest(p for module in modules for p in module.parameters()),
                repr((processor.settings, model.config.vision, model.config.scale)).encode(),
                repr((projected, autocast, model.device.type)).encode(),
                *([] if precision == "float32" else [precision.encode()]),
            )
        )

    def __call__(self, images: Sequence[tuple[ImageInput, TilePlan]]) -> Tensor | None:
        """Return the outputs of all images' tiles, (N, S, s²·C), or (N, S, D) if projected; None
        without images.
        """
        if not images:
            return None
        return torch.cat([self.states(as_source(image), plan) for image, plan in images])

    def states(self, image: ImageSource, plan: TilePlan) -> Tensor:
        """Return the outputs of one image's tiles, on the model's device."""
        path = None if self.cache is None else self._path(self.cache, image, plan)
        stored = None if path is None else _load(path)
        if stored is None:
            stored = self._compute(self.processor.pixels(image, plan))
            self.computed += 1
            if path is not None:
                _store(path, stored)
        else:
            self.read += 1
        states, copies = stored["states"], stored["copies"]
        return states.to(self.model.device)[copies.long()]

    @torch.no_grad()
    def _compute(self, tiles: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the distinct tiles, and the index of each tile among them."""
        model = self.model
        if self._tower is None:
            self._tower = tower_in(model, self.precision)
        tower = self._tower
        grid = tower.grid_of(tiles)
        number = torch.bfloat16 if self.precision == "bfloat16" else model.dtype
        rounds = self.autocast and self.precision == "float32"

        def encode(some: Tensor, parts: Sequence[tuple[int, int]] | None) -> Tensor:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=rounds):
                patches = tower(some.to(model.device, number), parts).to(model.dtype)
            if self.projected:
                visual: Tensor = model.connector(patches, grid)
                return visual
            folded = Idefics3Connector.pixel_unshuffle(patches, model.config.scale, grid)
            return folded.to(torch.bfloat16) if self.autocast else folded

        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.autocast):
            made, copies = in_passes(tiles, encode)
        return {"states": torch.cat(made).contiguous(), "copies": torch.tensor(copies)}

    def _path(self, cache: Path, image: ImageSource, plan: TilePlan) -> Path:
        digest = hashlib.sha256(self._constant)
        digest.update(content_digest(image))
        digest.update(repr((plan.source, plan.resized, plan.canvas, plan.rows, plan.cols)).encode())
        name = digest.hexdigest()
        return cache / name[:2] / f"{name}.safetensors"


def _load(path: Path) -> dict[str, Tensor] | None:
    """Return a cache entry, or None if it is missing or incomplete."""
    if not path.is_file():
        return None
    try:
        return load_file(str(path))
    except (SafetensorError, OSError):
        return None  # e.g. after a power failure: computed again


def _store(path: Path, entry: dict[str, Tensor]) -> None:
    """Write a temporary file, then rename it: several processes may write the same entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.cpu() for name, tensor in entry.items()})
    with atomic_file(path) as beside:
        beside.write_bytes(content)
