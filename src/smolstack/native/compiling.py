"""Compiles the C files in this folder for this machine's processor, once per user.

The library is cached per user under a name derived from the sources, the compiler and the
processor's features, so machines that share a home directory each compile their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from smolstack.native.cpu_features import features
from smolstack.native.instruction_sets import KernelError, architecture, cap, usable
from smolstack.output_files import atomic_file, remove_leftovers

# cpu_features.c contains no kernels: it detects which of them can run.
SOURCES = tuple(
    sorted(path.name for path in Path(__file__).parent.glob("*.c") if path.name != "cpu_features.c")
)
HEADERS = tuple(sorted(path.name for path in Path(__file__).parent.glob("*.h")))
# Not -ffast-math: it would change denormal handling for the whole process.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_EXACT = ("-ffp-contract=off",)
_COMPILE_SECONDS = 300


def compiled() -> Path:
    """Return the library's path, compiling it if it is not cached.

    Raises:
        KernelError: there is no compiler, it fails, or the cap on instructions is unknown.
    """
    if sys.platform == "win32":
        raise KernelError("building the kernels is not supported on Windows")
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    for folder in cache_folders():
        if is_own_file(folder / name):
            return folder / name
    return _build(compiler, name)


def _build(compiler: str, name: str) -> Path:
    failure = "no folder can be written to"
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_leftovers(folder)
            with atomic_file(folder / name) as beside:  # concurrent processes write the same
                failure = _compile(compiler, beside)
                if failure:
                    raise KernelError(failure)
            return folder / name
        except KernelError:
            continue
        except OSError as error:
            failure = str(error)
    raise KernelError(failure)


def _compile(compiler: str, target: Path) -> str:
    """Compile with OpenMP, else without; if both fail, report the first error."""
    here = Path(__file__).parent
    complaint = ""
    for parallel in (("-fopenmp",), ()):
        command = [compiler, *_FLAGS, *_EXACT, *_machine(), *parallel]
        command += [str(here / source) for source in SOURCES]
        try:
            done = subprocess.run(
                [*command, "-o", str(target), "-lm"],
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{compiler} took more than {_COMPILE_SECONDS} s"
        if done.returncode == 0:
            return ""
        complaint = done.stderr.strip().partition("\n")[0]
    return f"{compiler} failed: {complaint}"


def _machine() -> tuple[str, ...]:
    """Compiler flags for this processor, limited by the cap."""
    if cap():
        found = usable(features())
        if found:
            return found[0].flags
    return ("-mcpu=native" if architecture() == "aarch64" else "-march=native",)


def _compiler() -> str:
    named = os.environ.get("CC", "").split()
    for candidate in (*named[:1], "cc", "gcc", "clang"):
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise KernelError("found no C compiler (cc, gcc or clang)")


def fingerprint_of_sources() -> str:
    """SHA-256 of the sources' SHA-256s, in hexadecimal, computed as in CMakeLists.txt."""
    here = Path(__file__).parent
    each = (hashlib.sha256((here / name).read_bytes()) for name in (*SOURCES, *HEADERS))
    return hashlib.sha256("".join(one.hexdigest() for one in each).encode()).hexdigest()


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(fingerprint_of_sources().encode())
    real = Path(compiler).resolve()
    digest.update(f"{real} {real.stat().st_size} {_FLAGS} {_EXACT}".encode())
    digest.update(f"{platform.machine()} {_machine()} {_features()}".encode())
    return digest.hexdigest()[:20]


def _features() -> str:
    """The processor's model and instruction set features, which -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def cache_folders() -> list[Path]:
    """Candidate cache folders, in order of preference; all belong to the user."""
    home = os.environ.get("XDG_CACHE_HOME")
    folders = []
    if home:
        folders.append(Path(home) / "smolstack")
    else:
        with contextlib.suppress(RuntimeError):  # the home directory cannot be determined
            folders.append(Path.home() / ".cache" / "smolstack")
    user = os.getuid() if hasattr(os, "getuid") else 0
    folders.append(Path(tempfile.gettempdir()) / f"smolstack-{user}")
    return folders


def is_own_file(path: Path) -> bool:
    """Whether a library exists that only this user (or root) could have written."""
    if not path.is_file():
        return False
    for place in (path, path.parent):
        status = place.stat()
        if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
            return False
        if status.st_mode & 0o022:
            return False
    return True
