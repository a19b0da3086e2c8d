"""File output: atomic writes, one writer at a time, and errors that name the output path.

A new file or folder is made in a temporary folder beside the output, ``.NAME.<12 digits>.tmp``:

    lock    locked by the writer while it lives
    new     the new file (with the output's suffix) or folder
    old     the folder that is being replaced, between two renames

A killed writer leaves this folder. The next writer of the same output puts ``old`` back, unless
there is a newer output, and removes the rest; what a living writer has locked is not touched.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smolstack.errors import SmolstackError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)
_LOCK, _NEW, _OLD = "lock", "new", "old"


@contextmanager
def atomic_file(path: Path, *, private: bool = False, synced: bool = False) -> Iterator[Path]:
    """Create a new file in a temporary folder beside ``path`` and rename it to ``path`` when the
    block succeeds.

    Readers see either the old file or the new one, never a partial file. The new file has the
    suffix of ``path``; it is removed if the block fails. A symbolic link stays, and the file that
    it refers to is replaced.

    Args:
        private: only this user may read it.
        synced: flush it to disk before renaming, so that a power failure leaves no empty file.

    Raises:
        OSError: naming ``path``, not the temporary file; also if ``path`` is a device or a pipe,
            which renaming would replace by a file.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    with suppress(FileNotFoundError), naming_errors(path):
        if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISDIR(kind):
            problem = "is a device or a pipe, expected the name of a file"
            raise OSError(errno.EINVAL, problem, str(path))
    with _temporary_folder(target, path) as folder:
        beside = folder / f"{_NEW}{path.suffix}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(beside, flags, 0o600 if private else 0o666))
        yield beside
        if synced:
            with beside.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(beside, target)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Create a new folder in a temporary one beside ``folder`` that replaces it when the block
    succeeds.

    Use it as the only writer (:func:`exclusive_writer`).

    Raises:
        OSError: naming ``folder``, not the temporary folder.
    """
    with _temporary_folder(folder, folder) as temporary:
        new = temporary / _NEW
        new.mkdir()
        yield new
        if folder.is_symlink() or folder.exists():
            os.replace(folder, temporary / _OLD)
        os.replace(new, folder)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder, and put replaced folders back.

    Nothing is done where locks are not supported: a living writer could not be told apart.

    Args:
        folder: the folder of the outputs; it need not exist.
        name: only those of this output.
    """
    for temporary, output in _temporary_folders(folder, name):
        lock = _lock_temporary(temporary, sure=True)
        if lock is not None:
            try:
                _settle(temporary, output)
            finally:
                os.close(lock)


def replaced_folder(folder: Path) -> Path | None:
    """Return where a missing folder is if its replacement was interrupted, or None."""
    if not folder.exists():
        for temporary, _ in _temporary_folders(folder.parent, folder.name):
            if (temporary / _OLD).is_dir():
                return temporary / _OLD
    return None


def _temporary_folders(folder: Path, name: str | None) -> list[tuple[Path, Path]]:
    """Return the temporary folders in a folder, each with its output."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match and name in (None, match["name"]) and entry.is_dir(follow_symlinks=False):
                found.append((folder / entry.name, folder / match["name"]))
    return found


@contextmanager
def _temporary_folder(output: Path, shown: Path) -> Iterator[Path]:
    """Yield a new, locked temporary folder; errors in it are named as ``shown``."""
    if output.name in ("", ".."):
        raise OSError(errno.EINVAL, "is not a name, expected the name of the output", str(shown))
    with naming_errors(shown):
        remove_leftovers(output.parent, output.name)
    lock = None
    while lock is None:  # another writer may take it for a leftover before it is locked
        temporary = output.with_name(f".{output.name}.{secrets.token_hex(6)}.tmp")
        with naming_errors(shown, temporary):
            temporary.mkdir()
            lock = _lock_temporary(temporary)
    try:
        with naming_errors(shown, temporary):
            try:
                yield temporary
            finally:
                _settle(temporary, output)
    finally:
        os.close(lock)


def _lock_temporary(folder: Path, *, sure: bool = False) -> int | None:
    """Lock a temporary folder; None if it has another owner or is gone.

    Args:
        sure: also return None where locks are not supported.
    """
    path = folder / _LOCK
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        if sure or not folder.exists():
            return None
        raise
    locked = _lock(file)
    if locked is False or (locked is None and sure) or not _is_at(file, path):
        os.close(file)
        return None
    return file


def _settle(temporary: Path, output: Path) -> None:
    """Put the replaced folder back if there is no output, and remove the temporary folder."""
    old = temporary / _OLD
    if (old.is_symlink() or old.exists()) and not (output.is_symlink() or output.exists()):
        os.replace(old, output)
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive_writer(
    path: Path, error: type[SmolstackError], shown: Path | None = None
) -> Iterator[None]:
    """Keep other processes from writing ``path`` while the block runs.

    The lock is a hidden file beside the path, removed when the block ends. It is released if the
    process dies.

    Args:
        shown: the output to name in errors, if ``path`` is its saved state.

    Raises:
        error: another process is writing there, or the path has no name (``.``, ``..``).
    """
    if path.name in ("", ".."):
        raise error(f"{path} is not a name, expected the name of the output")
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as reason:  # names the path, not the hidden lock file
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        if _lock(file) is False:
            os.close(file)
            raise error(f"another process is writing {shown or path}, expected one at most")
        if _is_at(file, lock):
            break
        os.close(file)  # its last holder removed it in the meantime
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _lock(file: int) -> bool | None:
    """Lock an open file for this process, until it is closed.

    Returns:
        False if another process has it, None where locks are not supported.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locking
        return None
    return True


@contextmanager
def naming_errors(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Add this file's name to an OSError that names no file, such as a full disk.

    Errors that name ``beside``, an internal temporary file or folder, or something in it, are
    changed to name ``path`` too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _is_in(error.filename, beside):
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


def check_new_folder(folder: Path, error: type[SmolstackError], *, overwrite: bool) -> None:
    """Check that an output folder does not exist or is empty, before any work.

    A folder whose replacement was interrupted is put back first.

    Raises:
        error: there is something, and not ``overwrite``.
    """
    remove_leftovers(folder.parent, folder.name)
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise error(f"{folder} exists and is not empty; overwrite=True (--overwrite) replaces it")


def _is_in(found: object, beside: Path | None) -> bool:
    """Return whether an error's file name is ``beside`` or in it."""
    if beside is None or not isinstance(found, (str, bytes, os.PathLike)):
        return False
    name = Path(os.fsdecode(found))
    return name == beside or beside in name.parents


def _is_at(file: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
