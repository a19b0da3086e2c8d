"""Hook of the documentation site: replaces links to repository files by their names."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?!docs/)([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Convert ``[text](../src/file.py)`` to ``text (`src/file.py`)``; the site has only docs/."""

    def named(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        return text if path in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)
