"""From the C files beside this one to a library for this machine's processor, once per user.

The library is kept in the user's cache under a name that holds the sources, the compiler and the
processor's features, so that another machine that shares the home directory compiles its own.
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

SWITCH = "SMOLSTACK_NATIVE"  # 0 switches the kernels off
SOURCES = (
    "activations.c",
    "floats.c",
    "panels.c",
    "layers.c",
    "attend.c",
    "towers.c",
    "attention.c",
    "decode.c",
    "resize.c",
    "rounding.c",
    "stored.c",
)
HEADERS = ("smolstack.h", "simd.h", "vector.h")
CAP = "SMOLSTACK_MAX_ISA"  # the most that may be used of a processor's instructions
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
# Each cap: what a processor needs for it, and how a compiler is told to use no more.
CAPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "generic": ((), ("-march=x86-64",)),
    "avx2": (("avx2", "fma", "f16c"), ("-march=haswell",)),
    "avx2_vnni": (("avx2", "fma", "f16c", "avx_vnni"), ("-march=haswell", "-mavxvnni")),
    "avx512_vnni": (_AVX512, ("-march=cascadelake",)),
    "avx512_bf16": ((*_AVX512, "avx512_bf16"), ("-march=cooperlake",)),
}
# VNNI on vectors of 256 bits, where AVX-512 brought it.
_OLDER_VNNI = (
    ("avx2", "fma", "f16c", "avx512vl", "avx512_vnni"),
    ("-march=haswell", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"),
)
# Not -ffast-math: it would change how the whole process treats small numbers.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_EXACT = ("-ffp-contract=off",)
_COMPILE_SECONDS = 300


class CompileError(RuntimeError):
    """The kernels cannot be had on this machine; the message says why."""


def compiled() -> Path:
    """The library, compiled if it is not there yet.

    Raises:
        CompileError: kernels are switched off, there is no compiler, or it fails.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise CompileError(f"{SWITCH}=0")
    if sys.platform == "win32":
        raise CompileError("kernels are not built on Windows")
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    for folder in _folders():
        if _ours(folder / name):
            return folder / name
    return _build(compiler, name)


def _build(compiler: str, name: str) -> Path:
    failure = "no folder can be written to"
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / name
                failure = _compile(compiler, made)
                if made.is_file():
                    os.replace(made, folder / name)  # whoever comes second replaces like by like
                    return folder / name
        except OSError as error:
            failure = str(error)
    raise CompileError(failure)


def _compile(compiler: str, target: Path) -> str:
    """Compile with OpenMP, else without; the compiler's first complaint when both fail."""
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
    """The compiler's words for this processor, or for the cap on its instructions.

    A cap beyond what the processor has leaves it all that it has.
    """
    arm = platform.machine() in ("arm64", "aarch64")
    native = "-mcpu=native" if arm else "-march=native"
    cap = os.environ.get(CAP, "")
    if not cap:
        return (native,)
    if cap not in CAPS:
        raise CompileError(f"{CAP} is {cap!r}, expected one of {list(CAPS)}")
    choices = [CAPS[cap], *([_OLDER_VNNI] if cap == "avx2_vnni" else [])]
    for needed, flags in choices:
        if not arm and set(needed) <= instruction_flags():
            return flags
    return (native,)


def instruction_flags() -> set[str]:
    """What the processor says that it can do, in Linux's words; empty where that is not told."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


def _compiler() -> str:
    named = os.environ.get("CC", "").split()
    for candidate in (*named[:1], "cc", "gcc", "clang"):
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise CompileError("there is no C compiler (cc, gcc or clang)")


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((Path(__file__).parent / name).read_bytes())
    real = Path(compiler).resolve()
    digest.update(f"{real} {real.stat().st_size} {_FLAGS} {_EXACT}".encode())
    digest.update(f"{platform.machine()} {_machine()} {_features()}".encode())
    return digest.hexdigest()[:20]


def _features() -> str:
    """The processor's model and instructions, which -march=native compiles for."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folders() -> list[Path]:
    """Where libraries are kept, the best place first; all of them the user's own."""
    home = os.environ.get("XDG_CACHE_HOME")
    folders = []
    if home:
        folders.append(Path(home) / "smolstack")
    else:
        with contextlib.suppress(RuntimeError):  # no home directory can be found
            folders.append(Path.home() / ".cache" / "smolstack")
    user = os.getuid() if hasattr(os, "getuid") else 0
    folders.append(Path(tempfile.gettempdir()) / f"smolstack-{user}")
    return folders


def _ours(path: Path) -> bool:
    """Whether a library is there that this user (or root) alone could have put there."""
    if not path.is_file():
        return False
    for place in (path, path.parent):
        status = place.stat()
        if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
            return False
        if status.st_mode & 0o022:
            return False
    return True
