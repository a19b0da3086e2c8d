"""Engine "ray": the same code on two workers of a local Ray, with the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bulk.conftest import Job, rows

from smolstack.bulk.tasks import Questions

pytest.importorskip("ray")


def test_two_ray_workers_give_what_one_process_gives_and_go_on_where_it_stopped(
    job: Job,
    photos: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    expected, out = tmp_path / "expected.parquet", tmp_path / "answers.parquet"
    job(photos, ["What?", "Who?"], out=expected)

    def stop(progress: object) -> None:
        if getattr(progress, "done", 0) >= 2:
            raise KeyboardInterrupt

    settings = {"model": tiny_folder, "window": 3, "batch_rows": 1}
    with pytest.raises(KeyboardInterrupt):
        job(photos, ["What?", "Who?"], on_progress=stop, **settings)

    def elsewhere(*_: object) -> None:
        raise AssertionError("the work is done by Ray's workers, not here")

    monkeypatch.setattr(Questions, "work", elsewhere)
    seen = []
    summary = job(
        photos,
        ["What?", "Who?"],
        engine="ray",
        workers=2,
        on_progress=lambda progress: seen.append((progress.kept, progress.done)),
        **settings,
    )
    assert rows(out) == rows(expected)
    assert summary.kept == 2
    assert seen[0] == (2, 2)
    assert seen[-1] == (2, 10)
    assert capfd.readouterr().err == ""


NICENESS = """
import os
from smolstack.bulk import ray_engine
ray = ray_engine._ray()
ray_engine._start(ray, 1)
@ray.remote
def niceness():
    return os.nice(0)
print(os.nice(0), ray.get(niceness.remote()))
ray.shutdown()
"""


def test_workers_do_not_stand_back_behind_the_job() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    program = [sys.executable, "-c", NICENESS]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=clean)
    own, worker = done.stdout.split()
    assert worker == own
    assert done.stderr == ""
