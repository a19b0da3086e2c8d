"""Processes that are killed (SIGKILL) while they write: nothing is lost, nothing stays for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

import smolstack
from smolstack.errors import CheckpointError
from smolstack.output_files import atomic_file, remove_leftovers, replaced_folder
from smolstack.quantization_job.state import State

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and SIGKILL")

# Kills itself instead of the renaming with this number.
KILLED = """
import os, signal, sys
from contextlib import closing
from pathlib import Path
last, out = int(sys.argv[1]), Path(sys.argv[2])
renames = 0
replace = os.replace
def counted(*names):
    global renames
    if renames == last:
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    replace(*names)
os.replace = counted
"""
FOLDER = """
from smolstack.output_files import replacing_folder
with replacing_folder(out) as new:
    (new / "name").write_text("new")
"""
FILE = """
from smolstack.output_files import atomic_file
with atomic_file(out) as new:
    new.write_text("new")
"""
SAVE = """
import smolstack
smolstack.load(sys.argv[3]).save(out, overwrite=True)
"""
# Says that it writes, and goes on when its input ends.
SLOW = """
import sys
from contextlib import closing
from pathlib import Path
from smolstack.output_files import atomic_file
with atomic_file(Path(sys.argv[1])) as new:
    new.write_text("slow")
    print("writing", flush=True)
    sys.stdin.read()
"""


def _kill(program: str, *arguments: str | Path | int) -> None:
    command = [sys.executable, "-c", KILLED + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "name").write_text(text)
    return path


@pytest.mark.parametrize("renames", [0, 1])
def test_a_folder_whose_replacement_was_killed_is_the_old_one(tmp_path: Path, renames: int) -> None:
    out = _folder(tmp_path / "out", "old")
    _kill(FOLDER, renames, out)
    assert len(_names(tmp_path)) == 2 - renames  # with one renaming done, there is no output
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == ["out"]
    assert (out / "name").read_text() == "old"


def test_a_newer_folder_stays(tmp_path: Path) -> None:
    out = _folder(tmp_path / "out", "old")
    _kill(FOLDER, 1, out)
    _folder(out, "newer")
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == ["out"]
    assert (out / "name").read_text() == "newer"


def test_saving_again_puts_the_old_folder_back(tmp_path: Path, tiny_folder: Path) -> None:
    vlm = smolstack.load(tiny_folder)
    out = vlm.save(tmp_path / "out")
    _kill(SAVE, 1, out, tiny_folder)
    assert not out.exists()
    kept = replaced_folder(out)
    assert kept is not None
    with pytest.raises(CheckpointError, match=f"is missing, because .* its content is in {kept}"):
        smolstack.load(out)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        vlm.save(out)
    smolstack.load(out)
    assert _names(tmp_path) == ["out"]
    _kill(SAVE, 1, out, tiny_folder)
    vlm.save(out, overwrite=True)
    smolstack.load(out)
    assert _names(tmp_path) == ["out"]


def test_a_killed_file_is_the_old_one_and_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for old in (None, "old"):
        if old is not None:
            out.write_text(old)
        _kill(FILE, 0, out)
        assert len(_names(tmp_path)) == 1 + (old is not None)
        with atomic_file(out) as new:
            new.write_text("newer")
        assert _names(tmp_path) == ["out.json"]
        assert out.read_text() == "newer"


def test_what_a_living_writer_holds_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    program = [sys.executable, "-c", SLOW, str(out)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        remove_leftovers(tmp_path)
        with atomic_file(out) as new:  # as two processes do that share a cache
            new.write_text("fast")
        assert out.read_text() == "fast"
        other.stdin.close()
        assert other.wait() == 0
    assert out.read_text() == "slow"
    assert _names(tmp_path) == ["out.json"]


def test_a_cache_clears_what_writers_of_other_entries_left(
    tmp_path: Path, tiny_folder: Path
) -> None:
    _kill(FILE, 0, tmp_path / f"{'0' * 64}.safetensors")
    (tmp_path / ".mine").write_text("not smolstack's")
    vlm = smolstack.load(tiny_folder)
    vlm.image_cache.folder = tmp_path
    vlm.encode(Path("examples/number.png"))
    assert ".mine" in _names(tmp_path)
    assert len(_names(tmp_path)) == 2


def test_a_file_keeps_its_link_and_devices_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with atomic_file(tmp_path / "link") as new:
        new.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="is a device or a pipe"), atomic_file(path):
            pass
    assert _names(tmp_path) == ["file", "link", "pipe"]


def test_saved_state_without_its_job_is_not_used(tmp_path: Path) -> None:
    """A process was killed while it removed the state of another job."""
    job = {"bits": 4.0}
    with closing(State(tmp_path / "out", {"bits": 8.0})) as state:
        state.put("block", {"weight": torch.zeros(1)}, 0.5)
        (state.folder / "job.json").unlink()
    with closing(State(tmp_path / "out", job)) as state:
        assert state.get("block") is None
