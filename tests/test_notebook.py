"""In a notebook things show themselves, and the tour runs from the first cell to the last."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def outputs() -> list[Any]:
    """What the code cells of examples/tour.ipynb put out, run in its folder."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def shown(outputs: list[Any], kind: str) -> list[Any]:
    return [out.data[kind] for cell in outputs for out in cell if kind in out.get("data", {})]


def test_an_answer_shows_its_text_and_its_times(outputs: list[Any]) -> None:
    answer, stream, choice = shown(outputs, "text/html")
    for html in (answer, stream, choice):
        assert ">4711</div>" in html
        assert "tokens/s" in html
    assert "4717" in choice
    assert "▌" not in stream


def test_a_plan_and_visual_tokens_are_images(outputs: list[Any]) -> None:
    import base64

    plan, visual = (
        Image.open(io.BytesIO(base64.b64decode(png))) for png in shown(outputs, "image/png")
    )
    assert min(plan.size) > 200
    assert visual.size == (4 * 164, 2 * 164)  # three columns and the whole image, two rows


def test_every_stage_of_the_tour_has_its_shape(outputs: list[Any]) -> None:
    said = "".join(out.get("text", "") for cell in outputs for out in cell)
    assert "tiles (7, 3, 128, 128) patches (7, 256, 224)" in said
    assert "visual tokens (7, 64, 192)" in said
