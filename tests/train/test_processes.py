"""Two processes on one machine train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import MakeRecipe

from smolstack.checkpoint.weights import read_entries, read_tensors
from smolstack.errors import ConfigError
from smolstack.train import Recipe, train
from smolstack.train.metrics import read_metrics

CHILD = """
import json, sys, torch
from smolstack.train import Recipe, train
torch.set_num_threads(1)
for text in sys.argv[1:]:
    train(Recipe.from_dict(json.loads(text)), resume=True, quiet=True)
"""


def in_two_processes(folder: Path, *recipes: Recipe) -> None:
    """Run recipes under torchrun, with gloo."""
    script = folder / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [json.dumps(recipe.to_dict()) for recipe in recipes]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def log(recipe: Recipe) -> list[tuple[float, ...]]:
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    keys = ("loss", "gradient_norm", "evaluation_loss")
    return [tuple(line[key] for key in keys if key in line) for line in lines]


def test_two_processes_train_as_one_does(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"steps": 3, "batch": 8, "micro_batch": 2, "learning_rate": 2e-3}
    options: dict[str, Any] = {
        "stages": [
            {"train": "connector+text", **common},
            {"train": "lora", "lora": {"modules": ["decoder", "vision"]}, **common},
            {"train": "full", **common},
        ],
        "checkpoint_every": 2,
        "data": {"evaluation": str(data / "images")},
    }
    one, ddp, fsdp = (
        make_recipe(**options, output=str(tmp_path / name), parallel=parallel)
        for name, parallel in (("one", "ddp"), ("ddp", "ddp"), ("fsdp", "fsdp"))
    )
    train(one, quiet=True)
    in_two_processes(tmp_path, ddp, fsdp)
    assert len(log(one)) == 12
    model = Path(one.output) / "model"
    expected = dict(read_tensors(model, read_entries(model)))
    for two in (ddp, fsdp):
        for ours, theirs in zip(log(two), log(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        model = Path(two.output) / "model"
        for name, tensor in read_tensors(model, read_entries(model)):
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3)

    # The last checkpoint but one is of the full stage: shards are put together and taken apart.
    shutil.rmtree(max((Path(fsdp.output) / "checkpoints").iterdir()))
    before = log(fsdp)
    in_two_processes(tmp_path, fsdp)
    for ours, theirs in zip(log(fsdp), before, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def test_a_batch_that_processes_cannot_share_is_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolstack.train import processes, trainer
    from smolstack.train.progress import Display

    recipe = make_recipe({"batch": 5})
    with pytest.raises(ConfigError, match=r"batch .*5.* 2 processes"):
        trainer.Trainer(recipe, processes.Processes(0, 2), Display(False), None)
