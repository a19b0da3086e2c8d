"""Search folders for images, and report the files that were skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NAMED = 3  # maximum links and suffixes named in messages


@dataclass
class SkippedFiles:
    """Files skipped by a folder search.

    Attributes:
        suffixes: files of other kinds, counted by suffix.
        dangling: broken links.
        special: named pipes, sockets and devices.
        linked: links to folders, which are not followed because they may form cycles.
        closed: folders that cannot be read.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    dangling: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.suffixes, self.dangling, self.linked, self.special, self.closed))

    def sentence(self, folder: Path) -> str:
        """Describe the skipped files in a sentence."""
        parts = []
        if self.suffixes:
            count = sum(self.suffixes.values())
            kinds = ", ".join(f"{n} {name}" for name, n in self.suffixes.most_common(_NAMED))
            more = " …" if len(self.suffixes) > _NAMED else ""
            parts.append(f"{_count(count, 'file')} of other kinds ({kinds}{more})")
        for found, what, several in (
            (self.dangling, "link to nothing", "links to nothing"),
            (self.linked, "link to a folder", "links to a folder"),
            (self.special, "pipe or device", "pipes or devices"),
            (self.closed, "folder that cannot be read", "folders that cannot be read"),
        ):
            if found:
                more = " …" if len(found) > _NAMED else ""
                kind = what if len(found) == 1 else several
                parts.append(f"{len(found):,} {kind} ({', '.join(found[:_NAMED])}{more})")
        return f"{folder}: passed over {', '.join(parts)}"


def search(
    folder: Path, suffixes: Collection[str], over: SkippedFiles, beside: Collection[str] = ()
) -> Iterator[str]:
    """The files of a folder and its subfolders with one of the suffixes, ordered by name.

    Hidden files and folders are skipped.

    Args:
        folder: the folder to search.
        suffixes: lowercase, with their dots.
        over: collects what is skipped.
        beside: suffixes of files that accompany images of the same name.
    """
    root = str(folder)
    for path in _walk(root, suffixes, over, root):
        yield path
        for suffix in beside:
            own = os.path.splitext(path)[0] + suffix
            if os.path.isfile(own):
                over.suffixes[suffix] -= 1
    over.suffixes = +over.suffixes  # without those of which none is left


def _walk(folder: str, suffixes: Collection[str], over: SkippedFiles, root: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")),
                             key=lambda entry: entry.name)  # fmt: skip
    except OSError:
        if folder == root:
            raise
        over.closed.append(os.path.relpath(folder, root))
        return
    for entry in entries:
        name = os.path.relpath(entry.path, root)
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, suffixes, over, root)
        elif not os.path.exists(entry.path):  # first: is_dir raises an error for a link to itself
            over.dangling.append(name)
        elif entry.is_dir():
            over.linked.append(name)
        elif not entry.is_file():
            over.special.append(name)
        elif suffix in suffixes:
            yield entry.path
        else:
            over.suffixes[suffix or "without a suffix"] += 1


def _count(number: int, one: str) -> str:
    return f"{number:,} {one if number == 1 else one + 's'}"
