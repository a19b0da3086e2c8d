"""Cache folders of benchmarks: downloads, and unfinished measurements."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache (``$XDG_CACHE_HOME/smolstack/bench/NAME``), created if
    missing.

    If no cache can be written, a folder in the system's temporary folder is used.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    places = [Path(home)] if home else []
    if not home:
        try:
            places.append(Path.home() / ".cache")
        except RuntimeError:  # there is no home directory
            places = []
    user = os.getuid() if hasattr(os, "getuid") else 0
    last = Path(tempfile.gettempdir()) / f"smolstack-{user}" / "bench" / name
    for place in places:
        folder = place / "smolstack" / "bench" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    last.mkdir(parents=True, exist_ok=True)
    return last
