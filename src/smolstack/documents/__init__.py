"""Converts pages to documents: Markdown, HTML, docling's JSON, or DocTags as generated."""

from smolstack.documents.convert import (
    FORMATS,
    LONGEST,
    QUESTION,
    Converted,
    convert,
)
from smolstack.documents.pages import Page, Remark

__all__ = ["FORMATS", "LONGEST", "QUESTION", "Converted", "Page", "Remark", "convert"]
