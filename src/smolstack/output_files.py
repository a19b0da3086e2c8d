"""File output: atomic writes, one writer at a time, and errors that name the output path."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smolstack.errors import SmolstackError


@contextmanager
def atomic_file(path: Path, *, private: bool = False, synced: bool = False) -> Iterator[Path]:
    """Create a new file beside ``path`` and rename it to ``path`` when the block succeeds.

    Readers see either the old file or the new one, never a partial file. The new file has the
    suffix
    of ``path`` and a hidden name; it is removed if the block fails.

    Args:
        private: only this user may read it.
        synced: flush it to disk before renaming, so that a power failure leaves no empty file.

    Raises:
        OSError: naming ``path``, not the temporary file.
    """
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        with naming_errors(path, beside):
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
def exclusive_writer(path: Path, error: type[SmolstackError]) -> Iterator[None]:
    """Keep other processes from writing ``path`` while the block runs.

    The lock is a hidden file beside the path, removed when the block ends. It is released if the
    process dies.

    Raises:
        error: another process is writing there.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as reason:  # names the path, not the hidden lock file
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        if not take_lock(file):
            os.close(file)
            raise error(f"another process is writing {path}, expected one at most")
        if _is_at(file, lock):
            break
        os.close(file)  # its last holder removed it in the meantime
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def take_lock(file: int) -> bool:
    """Lock an open file for this process, until it is closed; False if another process has it.

    Where locks are not supported, this always succeeds and gives no protection.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locking
        return True
    return True


@contextmanager
def naming_errors(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Add this file's name to an OSError that names no file, such as a full disk.

    Errors that name ``beside``, an internal temporary file, are changed to name ``path`` too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.filename not in (beside, str(beside)):
            raise
        if error.strerror is None:  # pyarrow's and safetensors' errors hold only a text
            raise OSError(f"{path}: {error}") from error
        error.filename = str(path)
        raise


def check_folder(folder: Path, what: str, error: type[SmolstackError]) -> None:
    """Create an output folder and check that it is writable.

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
