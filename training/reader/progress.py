"""How far training is: what its state gets right on fonts and strings held out.

Quicker than ``evaluate.py``, and works before there is a reader: the share of character patches
that the tower names, of answer characters that follow from the true ones before them, and of
answers that are right in all of those. Weights are the averages that would be exported.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch

from training.reader.drawn import DrawnBatches
from training.reader.plan import FOLDER, Plan
from training.reader.train import Trainer


def measure(trainer: Trainer, count: int, split: str) -> dict[str, float]:
    """Mean figures over ``count`` batches of a split."""
    data = DrawnBatches(1, trainer.plan.size, count, seed=999, tiles=32, split=split)
    trainer.model.load_state_dict(trainer.average)
    found: dict[str, list[float]] = defaultdict(list)
    for index in range(count):
        with torch.no_grad():
            losses, figures = trainer.losses(data[index].to(trainer.device))
        of_losses = {f"loss_{name}": loss for name, loss in losses.items()}
        for name, value in {**figures, **of_losses}.items():
            found[name] += [] if value.isnan() else [float(value)]  # a share of nothing
    return {name: round(mean(values), 4) for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    trainer = Trainer(options.folder, Plan(apart=0.0))
    if not trainer.state_path.is_file():
        parser.error(f"there is no {trainer.state_path}; run python -m training.reader.train first")
    trainer.resume()
    for split in ("train", "held-out"):
        found = measure(trainer, options.batches, split)
        print(f"step {trainer.step}, {split}: {found}", flush=True)


if __name__ == "__main__":
    main()
