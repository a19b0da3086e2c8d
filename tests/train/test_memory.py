"""Frozen weights are read where the checkpoint file is mapped; only trained ones are copied."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import MakeRecipe

from smolstack.train import train
from smolstack.train.stage import RunningStage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def mappings(file: Path) -> Iterator[tuple[range, int]]:
    """Addresses of every mapping of a file, and its bytes that were copied on writing."""
    addresses = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *_, last = line.split()
        if not first.endswith(":"):
            begin, _, end = first.partition("-")
            addresses = range(int(begin, 16), int(end, 16)) if last == str(file) else None
        elif first == "Anonymous:" and addresses is not None:
            yield addresses, int(line.split()[1]) * 1024


@pytest.fixture
def own_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that nothing else in this process has mapped."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def test_frozen_weights_stay_in_the_checkpoint_file(
    make_recipe: MakeRecipe, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[set[str], int]] = []
    own = RunningStage._train

    def watched(self: RunningStage, batches: Any) -> dict[str, float]:
        line = own(self, batches)
        mapped = list(mappings(own_folder / "model.safetensors"))
        outside = {
            name
            for name, parameter in self.run.vlm.model.named_parameters()
            if not any(parameter.data_ptr() in addresses for addresses, _ in mapped)
        }
        found.append((outside, sum(copied for _, copied in mapped)))
        return line

    monkeypatch.setattr(RunningStage, "_train", watched)
    train(make_recipe(model=str(own_folder)), quiet=True)
    assert found == [({"connector.proj.weight"}, 0)] * 3


def test_training_does_not_write_into_the_checkpoint_file(
    make_recipe: MakeRecipe, own_folder: Path
) -> None:
    """Merged adapters and trained weights are written to memory, not through the mapping."""
    before = (own_folder / "model.safetensors").read_bytes()
    stages: list[dict[str, Any]] = [
        {"train": "lora", "lora": {"modules": ["decoder", "vision"]}},
        {"train": "full"},
    ]
    length: dict[str, Any] = {"steps": 1, "batch": 2, "micro_batch": 2, "warmup": 0}
    length |= {"learning_rate": 1e-2}
    trained = train(
        make_recipe(model=str(own_folder), stages=[{**stage, **length} for stage in stages]),
        quiet=True,
    )
    assert (own_folder / "model.safetensors").read_bytes() == before
    assert (trained.model / "model.safetensors").read_bytes() != before
