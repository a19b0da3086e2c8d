"""Finds layers in an adapter's ``target_modules`` that its base does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def unmatched_targets(targets: Any, names: Iterable[str]) -> list[str]:
    """Return the layer names in ``target_modules`` that occur in no weight's name.

    Args:
        targets: a list of layer names, or a regular expression over them. Recipes are often written
            for several models and name layers that only some of them have.
        names: the base's weights.
    """
    if isinstance(targets, str):
        # An escape such as \d or \w is not a name; "all-linear" means every layer.
        parts = (
            [] if targets == "all-linear" else _WORD.findall(re.sub(r"\\[A-Za-z]", " ", targets))
        )
    elif isinstance(targets, list):
        parts = [part for part in targets if isinstance(part, str)]
    else:
        parts = []
    known = list(names)
    absent = (part for part in parts if not any(part in name for name in known))
    return list(dict.fromkeys(absent))
