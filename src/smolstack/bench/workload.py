"""The workload of all contenders: one checkpoint with random weights, the same inputs and
threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smolstack.batch import Batch
from smolstack.checkpoint.load import DTYPES, QUANTIZED
from smolstack.checkpoint.new import new_checkpoint
from smolstack.config import ModelConfig
from smolstack.family import Preset
from smolstack.processor.geometry import TilePlan, plan_tiles
from smolstack.vlm import load

QUESTION = "What does it say?"
NEW_TOKENS = 64
TRAIN_STEPS = 3  # of an epoch: a warm-up and two timed ones; transformers' take 6 to 11 s each
# (width, height) for a tile edge of 512, and whether they are split: 1, 5, 13 and 17 tiles.
IMAGES = (((512, 512), False), ((1600, 300), True), ((1920, 1080), True), ((1024, 1024), True))
BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.0, "int4": 4.5}


@dataclass(frozen=True)
class Scene:
    """An image file and how it is split."""

    path: Path
    split: bool
    plan: TilePlan

    @property
    def tiles(self) -> int:
        return self.plan.tiles


@dataclass
class Workload:
    """A preset's shape with random weights, in a folder that every contender loads.

    Attributes:
        dtypes: precisions of smolstack's own contenders.
        root: a folder for the checkpoint, the images, and the checkpoint in the peers' formats.
        train_steps: steps of an epoch of training, the first of which is a warm-up.
        train_dtypes: precisions of the frozen tower in training; default: ``dtypes``.
    """

    preset: Preset
    root: Path
    dtypes: tuple[str, ...] = ("float32",)
    seed: int = 0
    new_tokens: int = NEW_TOKENS
    train_steps: int = TRAIN_STEPS
    train_dtypes: tuple[str, ...] = ()
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        self.train_dtypes = self.train_dtypes or self.dtypes

    @property
    def autocast(self) -> str:
        """In which training computes products: "bfloat16", or "none" for the weights' precision."""
        return "bfloat16" if "bfloat16" in self.train_dtypes else "none"

    @property
    def config(self) -> ModelConfig:
        return self.preset.config

    @cached_property
    def folder(self) -> Path:
        """The checkpoint, in bfloat16 like the published ones."""
        path = self.root / "model"
        if not path.exists():
            new_checkpoint(self.preset, path, seed=self.seed, dtype="bfloat16")
        return path

    def saved(self, dtype: str) -> Path:
        """Return the checkpoint saved in a precision: a quantized one, or the common one."""
        if dtype not in QUANTIZED:
            return self.folder
        path = self.root / f"model-{dtype}"
        if not path.exists():
            with torch.inference_mode(False):  # may be called during a measurement
                load(self.folder, dtype=dtype).save(path)
        return path

    @cached_property
    def scenes(self) -> list[Scene]:
        """Image files (JPEG, as from a camera); all tiles of an image are different."""
        made = []
        for size, split in IMAGES:
            plan = plan_tiles(size, self.preset.settings, self.config.tokens_per_tile, split)
            path = self.root / f"{size[0]}x{size[1]}.jpg"
            noise_image(size).save(path, quality=90)
            made.append(Scene(path, split, plan))
        return made

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise, float32; the same for the same shape."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator)

    def ids(self, length: int, batch: int = 1) -> Tensor:
        """Return text tokens, (batch, length)."""
        generator = torch.Generator().manual_seed(self.seed)
        limit = min(self.config.image_token_id, 40_000)
        return torch.randint(3, limit, (batch, length), generator=generator)


@contextmanager
def workload_of(
    preset: Preset,
    dtypes: tuple[str, ...] = ("float32",),
    folder: Path | None = None,
    train_dtypes: tuple[str, ...] = (),
) -> Iterator[Workload]:
    """Yield a workload whose files last as long as the context, or stay in a folder for later
    runs.
    """
    if folder is not None:
        root = folder / preset.name
        root.mkdir(parents=True, exist_ok=True)
        yield Workload(preset, root, dtypes, train_dtypes=train_dtypes)
        return
    with TemporaryDirectory(prefix="smolstack-bench-") as temporary:
        yield Workload(preset, Path(temporary), dtypes, train_dtypes=train_dtypes)


def text_batch(ids: Tensor) -> Batch:
    """Return a batch of prompts without images."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, mask, torch.empty(0, 3, 1, 1), (), (0,) * len(ids))


def noise_image(size: tuple[int, int]) -> Image.Image:
    """Return smooth noise as an image."""
    width, height = size
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a precision's activations."""
    return DTYPES.get(name, torch.float32)


def has_bfloat16() -> bool:
    """Return whether this CPU has instructions for matrix products in bfloat16."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)
