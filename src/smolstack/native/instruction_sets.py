"""The instruction sets that have kernels, and which of them a processor may use.

The table is instruction_sets.txt, which CMakeLists.txt also reads.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

CAP = "SMOLSTACK_MAX_ISA"  # limits the instruction sets in use
# The system's names → names in instruction_sets.txt.
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class KernelError(RuntimeError):
    """The kernels are unavailable on this machine; the message gives the reason."""


@dataclass(frozen=True)
class InstructionSet:
    """One line of instruction_sets.txt.

    Attributes:
        architecture: x86_64 or aarch64.
        cap: its name in ``SMOLSTACK_MAX_ISA``.
        library: its library's name; two may share a cap.
        needs: required processor features, named as in Linux's /proc/cpuinfo.
        flags: for the compiler.
    """

    architecture: str
    cap: str
    library: str
    needs: frozenset[str]
    flags: tuple[str, ...]


def _read() -> tuple[InstructionSet, ...]:
    table = Path(__file__).with_name("instruction_sets.txt")
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [[field.strip() for field in line.split("|")] for line in lines if line[:1].isalpha()]
    return tuple(
        InstructionSet(architecture, cap, library, frozenset(needs.split()), tuple(flags.split()))
        for architecture, cap, library, needs, flags in rows
    )


SETS = _read()


def architecture() -> str:
    """This machine's architecture as in instruction_sets.txt: x86_64, aarch64, or the system's own
    name."""
    found = platform.machine().lower()
    return _ARCHITECTURES.get(found, found)


def supported_sets() -> list[InstructionSet]:
    """The sets of this machine's architecture, most basic first."""
    return [one for one in SETS if one.architecture == architecture()]


def cap() -> str:
    """The cap set in the environment; empty if not set.

    Raises:
        KernelError: this architecture has no such set.
    """
    found = os.environ.get(CAP, "")
    expected = list(dict.fromkeys(one.cap for one in supported_sets()))
    if found and found not in expected:
        raise KernelError(f"{CAP} is {found!r}, expected one of {expected}")
    return found


def usable(features: Set[str]) -> list[InstructionSet]:
    """The sets that a processor with these features supports and the cap allows, best first.

    A cap beyond the processor's features has no effect.

    Raises:
        KernelError: the cap is unknown.
    """
    most, own = cap(), supported_sets()
    if most:
        last = max(at for at, one in enumerate(own) if one.cap == most)
        own = own[: last + 1]
    return [one for one in reversed(own) if one.needs <= features]
