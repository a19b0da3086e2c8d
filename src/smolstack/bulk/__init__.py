"""Bulk jobs: process a folder or a table of images into a table of answers or embeddings.

>>> from smolstack.bulk import map_images
>>> map_images("photos", "What does it say?", out="answers.parquet")

Needs the extra ``bulk`` (pyarrow), and ``ray`` for ``engine="ray"``.
"""

from __future__ import annotations

try:
    import pyarrow as _pyarrow  # noqa: F401 - every module of this package needs it
except ImportError:
    raise ImportError("bulk work needs pyarrow; pip install 'smolstack[bulk]'") from None

from smolstack.bulk.job import Progress, Summary, map_images
from smolstack.bulk.search import Hit, search_pages

__all__ = ["Hit", "Progress", "Summary", "map_images", "search_pages"]
