"""Writing: complete files or none, one writer at a time, errors that name what was not written."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smolstack.errors import SmolstackError


@contextmanager
def whole_file(path: Path, *, private: bool = False, synced: bool = False) -> Iterator[Path]:
    """A new file beside ``path``, to be written; renamed to it when the block ends well.

    Readers see the old file or the new one, never half of one. The new file has the suffix of
    ``path`` and a hidden name; it is removed when the block fails.

    Args:
        private: only this user may read it.
        synced: it is on the disk before it is renamed, so that a power cut leaves no empty file.

    Raises:
        OSError: naming ``path``, not the file beside it.
    """
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        with naming(path, beside):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(beside, flags, 0o600 if private else 0o666))
            yield beside
            if synced:
                with beside.open("r+b") as file:
                    os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def only_writer(path: Path, error: type[SmolstackError]) -> Iterator[None]:
    """Keep other processes from writing ``path`` while the block runs; one that ends lets go of it.

    The lock is a hidden file beside the path, gone when the block ends.

    Raises:
        error: another process writes there.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as reason:  # of the path, not of a file that nobody knows of
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        if not take_lock(file):
            os.close(file)
            raise error(f"another process is writing {path}, expected one at most")
        if _is_at(file, lock):
            break
        os.close(file)  # its last holder removed it in between
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def take_lock(file: int) -> bool:
    """Lock an open file for this process, until it is closed; False where another one has it.

    Where there are no locks, nothing keeps two processes apart.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def naming(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Let an error of the operating system that names no file name this one: a full disk, say.

    Errors that name ``beside``, which nobody knows of, name ``path`` too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.filename not in (beside, str(beside)):
            raise
        if error.strerror is None:  # pyarrow's and safetensors': one text for all of it
            raise OSError(f"{path}: {error}") from error
        error.filename = str(path)
        raise


def check_folder(folder: Path, what: str, error: type[SmolstackError]) -> None:
    """Make a folder that is to be written to, and try it.

    Raises:
        error: it is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise error(f"{what} is {folder}, which is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as reason:
        raise error(
            f"{what} is {folder}, where nothing can be written: {reason.strerror or reason}"
        ) from None


def _is_at(file: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
