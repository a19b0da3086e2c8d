"""In a notebook things show themselves, and the tour runs from the first cell to the last."""

from __future__ import annotations

import inspect
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


def test_a_bulk_job_shows_a_bar(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for number in range(3):
        Image.new("RGB", (60, 60), (number, 90, 9)).save(tmp_path / f"{number}.png")
    code = """
        from smolstack.bulk import map_images
        from smolstack.notebook import progress_bar
        progress_bar.AFTER = 0.0  # a short job counts as long
        made = map_images(".", "What?", out="answers.jsonl", max_new_tokens=2)
    """
    cells = [nbformat.v4.new_code_cell(inspect.cleandoc(code))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    bars = shown([notebook.cells[0].outputs], "text/html")
    assert bars[-1] == "<progress value='3' max='3'></progress> images: 3 of 3"
