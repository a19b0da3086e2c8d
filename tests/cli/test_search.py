"""smolstack search: from a folder of pages to the one that was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import smolstack

Run = Callable[..., Any]


@pytest.fixture
def index(run: Run, images: list[Image.Image], retrieval_folder: Path, tmp_path: Path) -> Path:
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    out = tmp_path / "pages.parquet"
    made = run("map", tmp_path, "--embed", "retrieval", "-m", retrieval_folder, "-o", out)
    assert made.exit_code == 0, made.output
    return out


def test_pages_are_listed_best_first(
    run: Run, index: Path, retrieval_folder: Path, images: list[Image.Image]
) -> None:
    vlm = smolstack.load(retrieval_folder)
    scores = smolstack.maxsim(vlm.embed_queries(["total"]), vlm.embed_pages(images))[0]
    best = [f"{number}.png" for number in scores.argsort(descending=True).tolist()]
    result = run("search", index, "total", "--model", retrieval_folder, "--top", 2)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [Path(line.split()[1]).name for line in lines] == best[:2]
    assert float(lines[0].split()[0]) == pytest.approx(float(scores.max()), abs=2e-3)


def test_several_queries_as_json(run: Run, index: Path, retrieval_folder: Path) -> None:
    result = run("search", index, "total", "date", "--model", retrieval_folder, "--json")
    found = json.loads(result.stdout)
    assert [one["query"] for one in found] == ["total", "date"]
    assert all(set(page) == {"score", "row", "id", "path"} for page in found[0]["pages"])
    assert len(found[1]["pages"]) == 3


def test_a_model_that_cannot_search_is_refused(
    refuses: Run, index: Path, tiny_folder: Path
) -> None:
    assert "expected a retrieval model" in refuses("search", index, "?", "-m", tiny_folder)


def test_a_file_that_is_no_table_is_refused(
    refuses: Run, retrieval_folder: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "gone.parquet"
    assert "is not a file" in refuses("search", missing, "?", "-m", retrieval_folder)


def test_a_path_in_a_table_cannot_write_on_the_terminal(
    run: Run, index: Path, retrieval_folder: Path
) -> None:
    table = pq.read_table(index)
    place, field = table.schema.get_field_index("path"), table.schema.field("path")
    table = table.set_column(place, field, pa.array(["a\x1b[31m\nb"] * len(table)))
    pq.write_table(table, index)
    result = run("search", index, "total", "--model", retrieval_folder, "--top", 1)
    assert result.stdout.rstrip("\n").endswith("a\\x1b[31m\\nb")
