"""Seconds per epoch with and without the cache of a frozen tower's outputs.

    python -m smolstack.train.epoch_timing [MODEL] --images 128 --train connector

Images are drawn for the measurement. Runs with and without the cache alternate; the fastest of each
kind is reported.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from smolstack.train.metrics import METRICS, read_metrics
from smolstack.train.recipe import Data, Evaluation, Recipe, Stage
from smolstack.train.trainer import train

STAGES = ("connector", "connector+text", "lora")


@dataclass(frozen=True)
class Epochs:
    """Seconds per epoch.

    Attributes:
        without: the tower runs in every epoch.
        first, later: the tower runs in the first epoch; later ones read its cached outputs.
        cache_bytes: size of the cache on disk.
    """

    without: float
    first: float
    later: float
    cache_bytes: int


def measure_epochs(
    model: str | None,
    *,
    stage: str = "connector",
    images: int = 128,
    batch: int = 16,
    size: tuple[int, int] = (400, 300),
    split: bool | None = None,
    rounds: int = 2,
    seed: int = 0,
) -> Epochs:
    """Train for a few epochs with and without the cache, alternating ``rounds`` times.

    Args:
        model: a checkpoint folder or hub id; None is the bundled reader.
        stage: what is trained; the vision tower is frozen in all of STAGES.
        images: number of drawn images, ``size`` pixels each.
        batch: examples per step.
        split: whether images are split into tiles; None: the checkpoint's setting.
        rounds: runs of each kind; the fastest counts.
    """
    kept: list[list[float]] = []
    bare: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="smolstack-") as place:
        rows = _draw(Path(place), images, size, seed)
        cache = Path(place) / "cache"
        for number in range(rounds):
            for cached in (True, False):
                output = Path(place) / f"run-{number}-{cached}"
                recipe = Recipe(
                    output=str(output),
                    model=model or "",
                    data=Data(train="images", split=split, check=False),
                    evaluation=Evaluation(answers=0),
                    stages=(
                        Stage(stage, epochs=2 if cached else 1, batch=batch, micro_batch=batch),
                    ),
                    cache=cached,
                    cache_folder=str(cache / str(number)),
                    checkpoint_every=10**9,
                )
                train(recipe, rows=rows, quiet=True)
                seconds = [line["seconds"] for line in read_metrics(output / METRICS)]
                steps = -(-images // batch)
                epochs = [sum(seconds[i : i + steps]) for i in range(0, len(seconds), steps)]
                (kept if cached else bare).append(epochs)
        entries = (cache / "0").rglob("*.safetensors")
        held = sum(path.stat().st_size for path in entries)
    first, later = (min(run[i] for run in kept) for i in (0, 1))
    return Epochs(min(run[0] for run in bare), first, later, held)


def _draw(folder: Path, count: int, size: tuple[int, int], seed: int) -> list[dict[str, str]]:
    """Draw different images of numbers, as rows of training data."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        text = str(rng.randrange(10**6))
        image = Image.new("RGB", size, tuple(rng.randrange(200, 256) for _ in range(3)))
        place = (rng.randrange(size[0] // 4), rng.randrange(size[1] // 2))
        font = ImageFont.load_default(size[0] / 9)
        ImageDraw.Draw(image).text(place, text, "black", font)
        image.save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "text": text})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one row per stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder; default: the bundled reader")
    parser.add_argument("--train", nargs="+", choices=STAGES, default=["connector"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--no-split", action="store_true", help="one tile per image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("stage             without  first epoch  later epochs    cache")
    for stage in options.train:
        found = measure_epochs(
            options.model,
            stage=stage,
            images=options.images,
            batch=options.batch,
            split=False if options.no_split else None,
            rounds=options.rounds,
        )
        print(
            f"{stage:<15}{found.without:>8.1f} s{found.first:>11.1f} s{found.later:>12.1f} s"
            f"{found.cache_bytes / 2**20:>7.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
