"""How far training is: what each stage's state gets right on fonts and strings held out.

Quicker than ``evaluate.py``, and works before there is a reader: the share of character patches
that the tower names, of answer characters that follow from the true ones before them, and of
answers that are right in all of those. Weights are the averages that would be exported.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch

from training.reader.batches import DrawnBatches
from training.reader.stages import FOLDER, STAGES
from training.reader.train import Trainer


def measure(trainer: Trainer, count: int, split: str) -> dict[str, float]:
    """Mean figures of a stage over ``count`` batches of a split."""
    stage = trainer.stage
    data = DrawnBatches(
        stage.batch, count, seed=999, crowd=stage.crowd, drawn=stage.drawn, split=split
    )
    trainer.model.load_state_dict(trainer.average)
    sums: dict[str, float] = defaultdict(float)
    for index in range(count):
        with torch.no_grad():
            losses, figures = trainer.losses(data[index])
        for name, value in {
            **figures,
            **{f"loss_{k}": float(v) for k, v in losses.items()},
        }.items():
            sums[name] += value / count
    return {name: round(value, 4) for name, value in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    for stage in STAGES:
        trainer = Trainer(options.folder, stage, seed=0)
        if not trainer.state_path.is_file():
            print(f"{stage.name}: not begun")
            continue
        trainer.resume()
        for split in ("train", "held-out"):
            found = measure(trainer, options.batches, split)
            print(f"{stage.name}, step {trainer.step}, {split}: {found}", flush=True)


if __name__ == "__main__":
    main()
