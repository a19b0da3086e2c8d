"""Nothing is lost: killed, full, or gone wrong, a run goes on from its last good checkpoint."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import MakeRecipe

from smolstack.errors import TrainingError
from smolstack.train import Recipe, train
from smolstack.train.metrics import Metrics, read_metrics
from smolstack.train.state import checkpoints, read_state

# Runs a recipe in a process of its own and says on stdout what it is about to do.
CHILD = """
import json, sys, torch
from smolstack.train import Recipe, metrics, state, trainer
torch.set_num_threads(1)

def told(owner, name, word):
    inner = getattr(owner, name)
    def outer(*arguments, **options):
        print(word, flush=True)
        return inner(*arguments, **options)
    setattr(owner, name, outer)

told(metrics.Metrics, "write", "line")
told(state, "_write", "weights")
told(state, "_flush", "flush")
told(trainer, "save_checkpoint", "model")
recipe = Recipe.from_dict(json.loads(sys.argv[1]))
trainer.train(recipe, resume=True, quiet=True)
"""
STAGES: list[dict[str, Any]] = [
    {"train": "connector", "steps": 7, "batch": 4, "micro_batch": 2, "learning_rate": 2e-3},
    {
        "train": "lora",
        "steps": 7,
        "batch": 4,
        "micro_batch": 2,
        "learning_rate": 5e-3,
        "lora": {"dropout": 0.3, "rank": 4},
    },
]


def killed_at(recipe: Recipe, word: str, count: int) -> None:
    """Start or resume a run and kill it the moment it says ``word`` for the ``count``-th time."""
    command = [sys.executable, "-c", CHILD, json.dumps(recipe.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = 0
        for line in process.stdout:
            said += line.strip() == word
            if said == count:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL


def log(recipe: Recipe) -> list[dict[str, Any]]:
    """The run's log without its timings."""
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def placed(recipe: Recipe, name: str) -> Recipe:
    output = str(Path(recipe.output).parent / name)
    return Recipe.from_dict({**recipe.to_dict(), "output": output})


def test_a_killed_run_goes_on_to_the_same_bits(make_recipe: MakeRecipe, data: Path) -> None:
    recipe = make_recipe(
        stages=STAGES,
        checkpoint_every=3,
        vision_dtype="int8",  # quantized anew by every process, to the same bits
        data={"evaluation": str(data / "images")},
        evaluation={"answers": 2, "every": 3, "max_new_tokens": 4},
    )
    whole = placed(recipe, "whole")
    train(whole, quiet=True)
    killed_at(recipe, "line", 6)  # between checkpoints
    killed_at(recipe, "weights", 4)  # half-way through a checkpoint, in the second stage
    killed_at(recipe, "model", 1)  # with the trained checkpoint half written
    train(recipe, resume=True, quiet=True)
    assert log(recipe) == log(whole)
    for file in ("model/model.safetensors", "adapter-2/adapter_model.safetensors"):
        ours, theirs = (Path(r.output) / file for r in (recipe, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    assert not [p for p in (Path(recipe.output) / "checkpoints").iterdir() if p.name[0] == "."]


def test_a_finished_run_resumed_is_finished(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first = train(recipe, quiet=True)
    before = log(recipe)
    again = train(recipe, resume=True, quiet=True)
    assert again.model == first.model
    assert log(recipe) == before


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_intact(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe({"steps": 4, "train": "full"}, checkpoint_every=2)
    killed_at(recipe, "line", 3)
    (good,) = checkpoints(Path(recipe.output) / "checkpoints")
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(TrainingError, match=r"step-0000004 cannot be written: .*too large"):
            train(recipe, resume=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(good.parent) == [good]
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert read_state(good).place.step == 2
    assert [path for path in good.parent.iterdir() if path != good] == []
    train(recipe, resume=True, quiet=True)
    assert len(log(recipe)) == 4


@pytest.mark.parametrize("what", ["cache", "log"])
def test_a_full_disk_is_named_with_the_last_good_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe = make_recipe({"steps": 4, "batch": 2}, checkpoint_every=1)
    killed_at(recipe, "line", 2)
    folder = Path(recipe.output) / "checkpoints"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: Any, **__: Any) -> None:
        raise full

    if what == "cache":
        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        monkeypatch.setattr(Metrics, "write", refuse)
    named = r"cache/../.*safetensors" if what == "cache" else "run"
    words = rf"{named}: No space left on device; the last complete checkpoint is (.*)"
    with pytest.raises(TrainingError, match=words) as caught:
        train(recipe, resume=True, quiet=True)
    monkeypatch.undo()
    last = checkpoints(folder)[-1]
    assert str(caught.value).endswith(str(last))
    assert read_state(last).place.step in (1, 2)
    train(recipe, resume=True, quiet=True)
    assert [line["step"] for line in log(recipe)] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_stops_the_run_before_it_does_harm(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolstack.train.objective import AnswerLoss

    recipe = make_recipe({"steps": 6}, checkpoint_every=2)
    inner, calls = AnswerLoss.forward, iter(range(100))

    def forward(self: AnswerLoss, batch: Any) -> torch.Tensor:
        loss = inner(self, batch)
        return loss * float("nan") if next(calls) == 6 else loss  # in the fourth step

    monkeypatch.setattr(AnswerLoss, "forward", forward)
    with pytest.raises(TrainingError, match=r"nan at step 4 .*02"):
        train(recipe, quiet=True)
    assert [line["step"] for line in log(recipe)] == [1, 2, 3]
    train(recipe, resume=True, quiet=True)
    assert [line["step"] for line in log(recipe)] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_only_from_what_it_began_with(make_recipe: MakeRecipe, data: Path) -> None:
    recipe = make_recipe({"steps": 2})
    train(recipe, quiet=True)
    source = Path(recipe.data.train)
    shorter = Path(recipe.output).parent / "train.jsonl"
    lines = source.read_text(encoding="utf-8").replace("images/", f"{data}/images/")
    shorter.write_text(lines, encoding="utf-8")
    run = placed(make_recipe({"steps": 2}, data={"train": str(shorter)}), "other")
    train(run, quiet=True)
    shorter.write_text("\n".join(lines.splitlines()[:9]), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"has 9 examples, .* 10"):
        train(run, resume=True, quiet=True)


def test_a_damaged_checkpoint_is_named(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"steps": 2})
    train(recipe, quiet=True)
    (last,) = checkpoints(Path(recipe.output) / "checkpoints")
    weights = last / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(TrainingError, match="step-0000002 cannot be read"):
        train(recipe, resume=True, quiet=True)
