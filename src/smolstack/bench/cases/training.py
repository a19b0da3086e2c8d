"""Steps of training with a frozen vision tower: the connector alone, and adapters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.peers.training_run import BATCH, FIRST, LATER, MEMORY, TrainingTask
from smolstack.bench.timing import Case
from smolstack.bench.workload import QUESTION, Workload

STAGES = ("connector", "lora")
_UNITS = {FIRST: "s", LATER: "s", MEMORY: "B"}
MOST_ROUNDS = 3  # a run takes up to a minute


def train(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Seconds per step of BATCH images, one tile each, and the process's peak memory.

    All three come out of the same run. The peak is that of loading, two epochs and, of smolstack,
    saving.
    """
    rows = _draw(workload, BATCH * workload.train_steps)
    for stage in STAGES:
        task = TrainingTask(stage, rows, workload.train_steps)
        runs = [run for implementation in implementations for run in implementation.train(task)]
        yield Case(
            f"train {stage}",
            [run.contender() for run in runs],
            rounds=MOST_ROUNDS,
            usual_rounds=1,
            quantities={task.quantity(what): unit for what, unit in _UNITS.items()},
        )


def _draw(workload: Workload, count: int) -> list[dict[str, str]]:
    """Images of numbers with questions and answers, as rows of training data."""
    folder = workload.root / "training"
    folder.mkdir(exist_ok=True)
    rng, edge = random.Random(0), workload.config.vision.image_size
    rows = []
    for number in range(count):
        answer = str(rng.randrange(10 ** rng.randint(1, 6)))
        path = folder / f"{number}.png"
        image = Image.new("RGB", (edge, edge), tuple(rng.randrange(200, 256) for _ in range(3)))
        place = (rng.randrange(edge // 4), rng.randrange(edge // 2))
        ImageDraw.Draw(image).text(place, answer, "black", ImageFont.load_default(edge / 9))
        image.save(path)
        rows.append({"image": str(path), "question": QUESTION, "text": answer})
    return rows
