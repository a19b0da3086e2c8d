"""A progress bar in a notebook, for calls that take longer than a second."""

from __future__ import annotations

import time
from html import escape
from typing import Any

AFTER = 1.0  # seconds before a call is long
_EVERY = 0.1  # seconds between updates


class ProgressBar:
    """Shows what a long call does; called with that, the amount done and the total."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._began, self._shown = time.monotonic(), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._handle is None and now - self._began < AFTER:
            return
        if done < total and now - self._shown < _EVERY:
            return
        self._shown = now
        from IPython import display as module  # untyped

        ipython: Any = module
        bar = ipython.HTML(
            f"<progress value='{done}' max='{total}'></progress> "
            f"{escape(what)}: {done:,} of {total:,}"
        )
        if self._handle is None:
            self._handle = ipython.display(bar, display_id=True)
        else:
            self._handle.update(bar)
