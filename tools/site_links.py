"""Hook of the documentation site: links to files of the repository become their names there."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?!docs/)([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``[text](../src/file.py)`` as ``text (`src/file.py`)``: the site holds docs/ alone."""

    def named(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        return text if path in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)
