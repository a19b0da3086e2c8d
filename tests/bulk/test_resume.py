"""A job that is cut off, however that happens, goes on: nothing is lost, nothing done twice."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.bulk.conftest import Job, rows

import smolstack
from smolstack.bulk.partial_results import Journal, Parts
from smolstack.bulk.tasks import Questions
from smolstack.errors import BulkError

OUT = "answers.parquet"
# A job that says after each batch how many images are done.
PROGRAM = """
import sys
from smolstack.bulk import map_images
map_images(
    sys.argv[1], "What?", out=sys.argv[2], model=sys.argv[3], max_new_tokens=4,
    batch_rows=1, window=3, on_progress=lambda progress: print(progress.done, flush=True),
)
"""
OPTIONS: dict[str, Any] = {"batch_rows": 1, "window": 3}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that were put to the model in this process, in that order."""
    places: list[int] = []
    work = Questions.work

    def noting(task: Questions, loaded: Any) -> Any:
        places.extend(row.index for row in loaded.rows)
        places.extend(row.index for row, _ in loaded.errors)
        return work(task, loaded)

    monkeypatch.setattr(Questions, "work", noting)
    return places


@pytest.fixture
def interrupted(job: Job, photos: Path) -> Callable[..., None]:
    """Begin the job and cut it off by Ctrl-C once so many images are done."""

    def run(after: int, **options: Any) -> None:
        def stop(progress: Any) -> None:
            if progress.done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job(photos, on_progress=stop, **{**OPTIONS, **options})

    return run


def kept(parts: Path) -> list[int]:
    """The rows of the input that a job's folder holds results of, each as often as it does."""
    found = [row["row"] for path in parts.glob("rows-*.parquet") for row in rows(path)]
    for path in parts.glob("*.journal"):
        if not path.with_suffix(".parquet").exists():
            found += [row for batch in Journal(path).read() for row in batch["row"].to_pylist()]
    return sorted(found)


def test_a_killed_process_loses_nothing_and_nothing_is_asked_twice(
    job: Job, photos: Path, tiny_folder: Path, tmp_path: Path, asked: list[int]
) -> None:
    expected = tmp_path / "expected.parquet"
    job(photos, out=expected)
    asked.clear()
    out, parts = tmp_path / OUT, tmp_path / f"{OUT}.parts"
    command = [sys.executable, "-c", PROGRAM, str(photos), str(out), str(tiny_folder)]
    before: list[int] = []
    for moment in ("2", "5"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert moment in (line.strip() for line in process.stdout)  # until it says so
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = kept(parts)
        assert len(now) == len(set(now)) >= int(moment)
        assert set(before) <= set(now)
        before = now
    summary = job(photos, **OPTIONS)
    assert summary.kept == len(before)
    assert sorted([*asked, *before]) == list(range(10))
    assert rows(out) == rows(expected)
    assert not parts.exists()


def test_a_record_torn_anywhere_is_cut_off_and_its_rows_are_asked_again(
    job: Job, photos: Path, tmp_path: Path, interrupted: Callable[..., None], asked: list[int]
) -> None:
    interrupted(5)
    (journal,) = (tmp_path / f"{OUT}.parts").glob("*.journal")
    whole = journal.read_bytes()
    first = len(Journal(journal).read()) - 1
    lengths = [0, 5, 12, len(whole) // 2, len(whole) - 1]
    for length in lengths:
        journal.write_bytes(whole[:length])
        done = Journal(journal).done
        assert len(done) <= first
        assert journal.stat().st_size <= length
    journal.write_bytes(whole + b"\x07" * 40)
    assert len(Journal(journal).done) == first + 1
    assert journal.read_bytes() == whole
    journal.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit has changed
    asked.clear()
    assert job(photos, **OPTIONS).rows == 10
    assert len(asked) == 10 - 5 + 1


def test_ctrl_c_keeps_what_is_done(
    job: Job, photos: Path, interrupted: Callable[..., None], asked: list[int]
) -> None:
    interrupted(4)
    done, asked[:] = len(asked), []
    summary = job(photos, **OPTIONS)
    assert summary.kept == done == 4
    assert len(asked) == 6


def test_a_job_that_ended_between_its_last_two_steps_asks_nothing_again(
    job: Job,
    photos: Path,
    tmp_path: Path,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(parts: Parts) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            job(photos)
    assert len(rows(tmp_path / OUT)) == 10
    asked.clear()
    assert job(photos).kept == 10
    assert asked == []
    assert len(rows(tmp_path / OUT)) == 10


def test_a_folder_that_grew_since_the_job_began_gives_the_same_rows(
    job: Job, photos: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    interrupted(4)
    late = photos / "0-late.png"
    late.write_bytes((photos / "1.png").read_bytes())
    try:
        job(photos, **OPTIONS)
    finally:
        late.unlink()
    assert "0-late.png" not in [row["id"] for row in rows(tmp_path / OUT)]


def test_another_job_is_not_mixed_with_what_was_begun(
    job: Job,
    photos: Path,
    tied_folder: Path,
    tmp_path: Path,
    interrupted: Callable[..., None],
    asked: list[int],
) -> None:
    interrupted(4)
    asked.clear()
    changed: list[tuple[dict[str, Any], str]] = [
        (
            {"questions": "Who?"},
            r'contains a job with questions \["What\?"\], this one has \["Who\?"',
        ),
        ({"max_new_tokens": 5}, "max_new_tokens 4, this one has 5"),
        ({"max_image_tokens": 20}, "max_image_tokens not given, this one has 20"),
        ({"model": tied_folder}, "with model"),
        ({"window": 4}, "window 3, this one has 4"),
        ({"embed": "mean"}, "with"),
    ]
    for options, sentence in changed:
        with pytest.raises(BulkError, match=sentence) as refusal:
            job(photos, **{**OPTIONS, **options})
        assert "restart" in str(refusal.value)
    with pytest.raises(BulkError, match="with images"):
        job(photos / "more", **OPTIONS)
    assert asked == []
    assert len(kept(tmp_path / f"{OUT}.parts")) == 4
    # How the work is done, and an option at its default, are no other job.
    assert job(photos, window=3, batch_rows=4, temperature=0.0, stop=[]).kept == 4


def test_restart_forgets_what_was_begun_and_replaces_what_is_there(
    job: Job, photos: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    interrupted(4)
    assert job(photos, "Who?", restart=True).kept == 0
    with pytest.raises(BulkError, match=r"answers\.parquet exists already"):
        job(photos)
    (tmp_path / f"{OUT}.parts-done").mkdir()  # of a process that was killed while removing it
    job(photos, restart=True)
    assert not (tmp_path / f"{OUT}.parts-done").exists()
    assert {row["question"] for row in rows(tmp_path / OUT)} == {"What?"}


def test_a_table_that_has_changed_since_is_refused(
    job: Job, photos: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    table = tmp_path / "images.csv"
    table.write_text("path\n" + "\n".join(str(p) for p in sorted(photos.glob("*.png"))) + "\n")

    def stop(progress: Any) -> None:
        if progress.done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(table, on_progress=stop, **OPTIONS)
    table.write_text("path\n" + str(photos / "1.png") + "\n")
    with pytest.raises(BulkError, match="state of the tables"):
        job(table, **OPTIONS)


def test_two_processes_do_not_work_on_one_job(job: Job, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        Parts(tmp_path / f"{OUT}.parts").locked(),
        pytest.raises(BulkError, match="another process"),
    ):
        job(photos)


def test_a_full_disk_ends_in_a_sentence_and_keeps_what_is_done(
    job: Job, photos: Path, tiny_vlm: smolstack.VLM, tmp_path: Path, asked: list[int]
) -> None:
    """A limit on the size of files stands in for the full disk: both fail while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(progress: Any) -> None:
        if progress.done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))

    try:
        with pytest.raises(BulkError, match="4 of 10 images are done and kept") as error:
            job(photos, on_progress=fill, **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.strerror(27) in str(error.value)
    asked.clear()
    assert job(photos, **OPTIONS).kept == 4
    assert len(asked) == 6
