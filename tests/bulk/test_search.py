"""A folder of pages becomes a table, and the table is searched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import smolstack
from smolstack.bulk import map_images, search_pages
from smolstack.bulk.embeddings import shape_of
from smolstack.errors import BulkError, ConfigError

from .conftest import BAD, Job, rows

QUERIES = ["What was the profit in 2024?", "delivery note", "Who signed?"]


@pytest.fixture(scope="module")
def colsmol(retrieval_folder: Path) -> smolstack.VLM:
    return smolstack.load(retrieval_folder)


@pytest.fixture(scope="module")
def index(colsmol: smolstack.VLM, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "pages.parquet"
    map_images(photos, [], out=out, model=colsmol, embed="retrieval", window=3)
    return out


def test_the_table_holds_every_page_s_vectors(index: Path, colsmol: smolstack.VLM) -> None:
    found = rows(index)
    assert {row["id"] for row in found if row["embedding"] is None} == set(BAD)
    for row in found:
        if row["embedding"] is not None:
            (expected,) = colsmol.embed_pages(row["path"])
            np.testing.assert_allclose(np.array(row["embedding"]), expected, atol=1e-5)
            assert row["visual_tokens"] == colsmol.plan(row["path"]).visual_tokens


@pytest.mark.parametrize("top", [1, 3, 100])
def test_hits_are_the_best_of_all_pages(index: Path, colsmol: smolstack.VLM, top: int) -> None:
    queries = colsmol.embed_queries(QUERIES)
    good = [row for row in rows(index) if row["embedding"] is not None]
    scores = smolstack.maxsim(queries, [torch.tensor(row["embedding"]) for row in good])
    found = search_pages(index, queries, top=top, shape=shape_of(colsmol))
    for hits, of_query in zip(found, scores, strict=True):
        order = of_query.argsort(descending=True)[:top].tolist()
        assert [hit.path for hit in hits] == [good[number]["path"] for number in order]
        assert [hit.row for hit in hits] == [good[number]["row"] for number in order]
        assert [hit.score for hit in hits] == pytest.approx(of_query[order].tolist(), abs=1e-4)


def test_a_page_s_own_vectors_find_it(colsmol: smolstack.VLM, photos: Path, tmp_path: Path) -> None:
    """In half precision too, which halves the table."""
    out = tmp_path / "pages.parquet"
    map_images(photos, [], out=out, model=colsmol, embed="retrieval", embed_dtype="float16")
    page = photos / "1.png"
    ((hit,),) = search_pages(out, colsmol.embed_pages(page), top=1)
    assert hit.path == str(page)


def test_tables_of_something_else_are_refused(
    index: Path, job: Job, photos: Path, colsmol: smolstack.VLM, tmp_path: Path
) -> None:
    queries = colsmol.embed_queries(["?"])
    job(photos, embed="tokens", out=tmp_path / "tokens.parquet")
    with pytest.raises(BulkError, match="smolstack map --embed retrieval"):
        search_pages(tmp_path / "tokens.parquet", queries)
    with pytest.raises(BulkError, match="is not a file, expected a table of pages"):
        search_pages(tmp_path / "gone.parquet", queries)
    (tmp_path / "cut.parquet").write_bytes(index.read_bytes()[:500])
    with pytest.raises(BulkError, match="cannot be read as a Parquet file"):
        search_pages(tmp_path / "cut.parquet", queries)
    with pytest.raises(BulkError, match="another shape \\(2 layers of 48, vectors of 16\\)"):
        search_pages(index, queries, shape="30 layers of 576, vectors of 128")
    with pytest.raises(BulkError, match="top is 0, expected at least 1"):
        search_pages(index, queries, top=0)


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ([[float("nan")] * 16], "row 0 has values that are not finite"),
        ([], "row 0 has no vectors"),
        ("none", "has 0 columns embedding, expected one"),
        ("text", "column embedding has the type string, expected lists of vectors"),
    ],
)
def test_a_damaged_table_is_refused_by_its_row_or_column(
    index: Path, tmp_path: Path, vectors: Any, said: str
) -> None:
    table = pq.read_table(index).slice(0, 1)
    place, field = table.schema.get_field_index("embedding"), table.schema.field("embedding")
    if vectors == "none":
        table = table.drop_columns(["embedding"])
    elif vectors == "text":
        table = table.set_column(place, "embedding", pa.array(["?"]))
    else:
        table = table.set_column(place, field, pa.array([vectors], field.type))
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(BulkError, match=re.escape(said)):
        search_pages(tmp_path / "bad.parquet", [torch.ones(2, 16)])


def test_a_table_of_unreadable_pages_has_no_hits(index: Path, tmp_path: Path) -> None:
    table = pq.read_table(index)
    bad = table.filter(pa.compute.is_null(table["embedding"]))
    pq.write_table(bad, tmp_path / "bad.parquet")
    assert search_pages(tmp_path / "bad.parquet", [torch.ones(2, 16)]) == [[]]


def test_only_a_retrieval_model_makes_one(job: Job, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a retrieval model"):
        job(photos, embed="retrieval", out=tmp_path / "pages.parquet")
    assert not list(tmp_path.iterdir())
