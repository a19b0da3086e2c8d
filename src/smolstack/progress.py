"""Progress of long calls whose caller did not ask for it: notebooks show bars.

The display is registered by a higher layer (smolstack.notebook), so that the packages that do the
work need not know whether they run in a notebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Tell: TypeAlias = Callable[[str, int, int], None]  # what is done, amount done, total

_new_displays: list[Callable[[], Tell]] = []  # one, or none


def show_with(new_display: Callable[[], Tell] | None) -> None:
    """Show the progress of each long call with a new display; None: show nothing."""
    _new_displays[:] = [] if new_display is None else [new_display]


def shown(given: Tell | None = None) -> Tell | None:
    """Return the given function or, if none was given, a new display's; None if there is no
    display.
    """
    return given if given is not None or not _new_displays else _new_displays[0]()
