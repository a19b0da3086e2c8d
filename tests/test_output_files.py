"""One writer of an output at a time, and errors that name what could not be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import smolstack
from smolstack.errors import BulkError, CheckpointError, ConfigError
from smolstack.output_files import check_folder, exclusive_writer, naming_errors

HOLD = """
import sys
from pathlib import Path
from smolstack.errors import CheckpointError
from smolstack.output_files import exclusive_writer
with exclusive_writer(Path(sys.argv[1]), CheckpointError):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_second_writer_is_told_and_the_next_one_let_in(held: Path, tiny_folder: Path) -> None:
    program = [sys.executable, "-c", HOLD, str(held)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        vlm = smolstack.load(tiny_folder)
        with pytest.raises(CheckpointError, match=rf"another process is writing {held}"):
            vlm.save(held)
        with pytest.raises(BulkError, match="another process"), exclusive_writer(held, BulkError):
            pass
        other.kill()  # however a process ends, it lets go
        other.wait()
    vlm.save(held)
    assert sorted(path.name for path in held.parent.iterdir()) == ["out"]


def test_an_error_without_a_name_gets_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming_errors(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="b: no room"), naming_errors(tmp_path / "b"):
        raise OSError("no room")
    with pytest.raises(OSError, match="mine") as caught, naming_errors(tmp_path / "c"):
        raise OSError(errno.ENOSPC, "full", "mine")
    assert caught.value.filename == "mine"


def _small_files() -> None:
    """A disk that is full after 20 kB of a file, as far as a process can tell."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits of files")
def test_a_full_disk_names_the_path(tmp_path: Path, tiny_folder: Path) -> None:
    program = (
        "import sys, smolstack; from smolstack.cli.app import main\n"
        "sys.argv[1:] = ['new', 'smolvlm-256m', sys.argv[1], '--vision-layers', '1', "
        "'--text-layers', '1']\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "made")],
        capture_output=True,
        text=True,
        preexec_fn=_small_files,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert str(tmp_path) in line
    assert "made" in line
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_as_the_user_did(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"File exists|Not a directory") as caught:
        smolstack.load().save(tmp_path / "file" / "model")
    assert "lock" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is a file, expected a folder"):
        check_folder(tmp_path / "file", "--image-cache", ConfigError)
    with pytest.raises(ConfigError, match="Not a directory"):
        check_folder(tmp_path / "file" / "inside", "--image-cache", ConfigError)
    check_folder(tmp_path / "new" / "one", "--image-cache", ConfigError)
    assert list((tmp_path / "new" / "one").iterdir()) == []
