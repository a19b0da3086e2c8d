"""The names of DocTags, as in docling-core, and their relations."""

from __future__ import annotations

import re

LISTS = ("ordered_list", "unordered_list")
TABLES = ("otsl", "chart", "document_index")
FIGURES = ("picture", "chart")
CONTAINERS = frozenset({*LISTS, *TABLES, *FIGURES, "inline", "key_value_region"})
# Elements that docling-core does not accept at a page's root, and their replacements.
TAKEN_AS = {
    "paragraph": "text",
    "reference": "text",
    "handwritten_text": "text",
    "smiles": "text",
    "section_header_level_0": "section_header_level_1",
}
LEAVES = frozenset(
    {
        "caption",
        "checkbox_selected",
        "checkbox_unselected",
        "code",
        "footnote",
        "formula",
        "list_item",
        "page_footer",
        "page_header",
        "text",
        "title",
        *(f"section_header_level_{level}" for level in range(1, 7)),
        *TAKEN_AS,
    }
)
# Containers of other elements, without a meaning of their own here.
PASSED_OVER = frozenset({"doctag", "form", "page_break"})
CELLS = frozenset({"ecel", "fcel", "lcel", "ucel", "xcel", "ched", "rhed", "srow", "nl"})
# Classes of images; anywhere else these words in angle brackets are text.
CLASSES = frozenset(
    {
        "bar_chart",
        "bar_code",
        "box_plot",
        "cad_drawing",
        "calendar",
        "chart",
        "chemistry_markush_structure",
        "chemistry_molecular_structure",
        "chemistry_structure",
        "crossword_puzzle",
        "decoration",
        "dot_line",
        "electrical_diagram",
        "engineering_drawing",
        "flow_chart",
        "full_page_image",
        "geographical_map",
        "hbar_categorical",
        "heatmap",
        "icon",
        "illustration",
        "infographic",
        "line",
        "line_chart",
        "logo",
        "map",
        "music",
        "natural_image",
        "other",
        "page_thumbnail",
        "person",
        "photograph",
        "image_group",
        "pie_chart",
        "qr_code",
        "remote_sensing",
        "scatter_chart",
        "scatter_plot",
        "screenshot",
        "screenshot_from_computer",
        "screenshot_from_manual",
        "signature",
        "stacked_bar_chart",
        "stamp",
        "stratigraphic_chart",
        "table",
        "topographical_map",
        "ui_element",
        "vbar_categorical",
    }
)
PAIR = re.compile(r"(?:key|value)_[0-9]+")  # in forms


def is_tag(name: str) -> bool:
    """Return whether docling-core knows a tag of this name."""
    return (
        name in CONTAINERS
        or name in LEAVES
        or name in PASSED_OVER
        or name in CELLS
        or name in CLASSES
        or re.fullmatch(r"(?:loc|key|value|link)_[0-9]+", name) is not None
    )
