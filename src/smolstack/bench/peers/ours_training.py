"""smolstack's training run in a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from smolstack.bench.peers.training_run import BATCH, TrainingRun, TrainingTask
from smolstack.bench.timing import OURS
from smolstack.bench.workload import Workload
from smolstack.train.metrics import METRICS, read_metrics
from smolstack.train.recipe import VISION, Data, Evaluation, Recipe, Stage
from smolstack.train.trainer import train


def runs(workload: Workload, task: TrainingTask) -> list[TrainingRun]:
    """Return one run for each precision of the frozen tower, all of them under autocast where
    bfloat16 is among them, as transformers' are.
    """
    autocast = workload.autocast
    return [
        TrainingRun(
            OURS,
            dtype,
            "" if autocast == "none" else "autocast",
            task,
            f"{__name__}:training",
            workload.threads,
            {"folder": str(workload.folder), "vision_dtype": dtype, "autocast": autocast},
        )
        for dtype in workload.train_dtypes
        if dtype in VISION
    ]


def training(
    folder: str,
    task: dict[str, Any],
    vision_dtype: str,
    autocast: str,
    threads: int,
) -> Callable[[], list[list[float]]]:
    """A worker's work: two epochs, the second of which reads cached outputs of the frozen tower."""
    torch.set_num_threads(threads)
    given = TrainingTask(**task)

    def run() -> list[list[float]]:
        with TemporaryDirectory(prefix="smolstack-bench-") as place:
            recipe = Recipe(
                output=place,
                model=folder,
                data=Data(train="images", split=False, check=False),
                evaluation=Evaluation(answers=0),
                stages=(Stage(given.stage, epochs=2, batch=BATCH),),
                vision_dtype=vision_dtype,
                autocast=autocast,
                checkpoint_every=10**9,
            )
            train(recipe, rows=given.rows, quiet=True, overwrite=True)
            seconds = [line["seconds"] for line in read_metrics(Path(place) / METRICS)]
        return [seconds[: given.steps], seconds[given.steps :]]

    return run
