"""What IMAGES may be: folders, globs, lists, and tables of paths or bytes."""

from __future__ import annotations

import base64
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.bulk.conftest import Job, rows

from smolstack.bulk.input_listing import RowReader, listed, write_listing
from smolstack.bulk.inputs import open_input
from smolstack.bulk.rows import Row, Window
from smolstack.errors import BulkError

NAMES = ["1.png", "2.png", "4.png"]


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., list[Row]]:
    """The rows of an input as a job reads them."""

    def read(images: Any, *columns: str | None) -> list[Row]:
        source = open_input(images, *columns)
        files = source.parquet
        if source.rows is not None:
            write_listing(tmp_path / "listing.parquet", source.rows(), 2)
            files = listed(tmp_path / "listing.parquet")
        assert files is not None
        reader = RowReader(files)
        return list(reader.read(Window(0, len(reader))))

    return read


def write_jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return path


def test_a_glob_takes_what_it_names_in_order(found: Any, photos: Path) -> None:
    assert [Path(row.path).name for row in found(str(photos / "**" / "[0-3].png"))] == [
        "1.png",
        "2.png",
        "0.png",
        "3.png",
    ]


def test_what_a_folder_passes_over_is_said(
    found: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.png", "b.docx", "c.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "more").symlink_to(tmp_path)
    assert [row.id for row in found(folder)] == ["a.png"]
    assert caplog.messages == [
        f"{folder}: passed over 2 files of other kinds (1 .docx, 1 .mp4), 1 link to a folder (more)"
    ]


def test_no_id_is_a_data_url(found: Any, tmp_path: Path) -> None:
    url = "Data:image/png;base64," + "A" * 400
    table = write_jsonl(tmp_path / "list.jsonl", [url, {"file_name": url}, url[5:] + ".png"])
    assert [row.id for row in found(table)][:2] == ["0", "1"]


def test_one_image_is_an_input_too(found: Any, photos: Path) -> None:
    (row,) = found(photos / "1.png")
    assert row.path == str(photos / "1.png")


def test_a_list_holds_paths_and_bytes(found: Any, photos: Path) -> None:
    content = (photos / "1.png").read_bytes()
    first, second = found([photos / "2.png", content])
    assert (first.path, second.content) == (str(photos / "2.png"), content)
    assert (first.id, second.id) == (str(photos / "2.png"), "1")


def test_paths_in_a_table_are_relative_to_it(found: Any, photos: Path) -> None:
    tables = [photos / "list.jsonl", photos / "list.csv", photos / "list.parquet"]
    try:
        write_jsonl(tables[0], [{"file_name": name, "n": 1} for name in NAMES])
        tables[1].write_text("file_name,n\n" + "".join(f"{name},1\n" for name in NAMES))
        pq.write_table(pa.table({"file_name": NAMES, "n": [1, 2, 3]}), tables[2])
        for table in tables:
            read = found(table)
            assert [row.path for row in read] == [str(photos / name) for name in NAMES]
            assert [row.id for row in read] == NAMES
    finally:
        for table in tables:
            table.unlink(missing_ok=True)


def test_a_jsonl_file_may_be_plain_paths(found: Any, photos: Path, tmp_path: Path) -> None:
    paths = [str(photos / name) for name in NAMES]
    assert [row.path for row in found(write_jsonl(tmp_path / "a.jsonl", paths))] == paths


def test_bytes_come_as_parquet_as_structs_and_as_base64(
    found: Any, photos: Path, tmp_path: Path
) -> None:
    contents = [(photos / name).read_bytes() for name in NAMES]
    encoded = [base64.b64encode(content).decode() for content in contents]
    structs = [{"bytes": content, "path": "x.png"} for content in contents]
    pq.write_table(pa.table({"image": contents, "id": [5, 6, 7]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": structs, "id": [5, 6, 7]}), tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", [{"bytes": e, "id": 5 + i} for i, e in enumerate(encoded)])
    write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"image": {"bytes": base64.encodebytes(c).decode()}, "id": 5 + i}
            for i, c in enumerate(contents)
        ],
    )
    write_jsonl(
        tmp_path / "e.jsonl",
        [{"image": f"data:image/png;base64,{e}", "id": 5 + i} for i, e in enumerate(encoded)],
    )
    with (tmp_path / "f.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "base64"], *([5 + i, e] for i, e in enumerate(encoded))])
    for table in sorted(tmp_path.glob("[a-f].*")):
        read = found(table)
        assert [row.content for row in read] == contents, table
        assert [row.id for row in read] == ["5", "6", "7"]


def test_several_tables_are_one_input(found: Any, photos: Path, tmp_path: Path) -> None:
    for part, names in enumerate((NAMES[:2], NAMES[2:])):
        paths = [str(photos / name) for name in names]
        pq.write_table(pa.table({"path": paths}), tmp_path / f"part-{part}.parquet")
        write_jsonl(tmp_path / f"part-{part}.jsonl", [{"path": path} for path in paths])
    for kind in ("parquet", "jsonl"):
        read = found(str(tmp_path / f"part-*.{kind}"))
        assert [(row.index, Path(row.path).name) for row in read] == list(enumerate(NAMES))


def test_columns_can_be_named(found: Any, photos: Path, tmp_path: Path) -> None:
    table = write_jsonl(
        tmp_path / "a.jsonl", [{"path": "nothing", "scan": str(photos / "1.png"), "code": "x9"}]
    )
    (row,) = found(table, "scan", "code")
    assert (row.path, row.id) == (str(photos / "1.png"), "x9")


def test_a_row_without_an_image_says_so_and_the_others_are_answered(
    job: Job, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "list.jsonl"
    lines = [
        json.dumps({"path": str(photos / "1.png")}),
        "{broken",
        json.dumps({"other": 1}),
        json.dumps({"path": 7}),
        json.dumps({"path": "https://example.org/cat.png"}),
        json.dumps({"path": {"bytes": "no base64!"}}),
        '{"path": "a.png", "path": "b.png"}',
        json.dumps({"path": "missing.png"}),
        json.dumps({"path": "\ud800.png"}),
        json.dumps({"path": "a\u0000b.png"}),
        json.dumps({"path": str(photos / "2.png")}),
    ]
    table.write_text("\n".join(lines))
    summary = job(table)
    errors = [row["error"] for row in rows(tmp_path / "answers.parquet")]
    assert summary.bad_images == 9
    assert errors[0] is None
    assert errors[-1] is None
    for error, part in zip(
        errors[1:],
        [
            "line 2 of list.jsonl is not valid JSON: Expecting property name enclosed in double "
            "quotes at column 2",
            "found nothing in place of",
            "found a int in place of",
            "is a URL",
            "bytes is 'no base64!', expected an image file in base64",
            "line 7 of list.jsonl cannot be used: an object has the key 'path' more than once",
            "missing.png: found no file",
        ],
        strict=False,
    ):
        assert part in error


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes elsewhere alone")
def test_a_file_name_that_is_no_text_is_read_all_the_same(
    job: Job, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = os.fsdecode(os.fsencode(str(folder)) + b"/\xff\xfe.png")
    Path(odd).write_bytes((photos / "1.png").read_bytes())
    job(folder, out=tmp_path / "odd.jsonl")
    (row,) = rows(tmp_path / "odd.jsonl")
    assert row["error"] is None
    assert row["id"] == "??.png"


def test_any_window_is_read_without_what_lies_before(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([n]) for n in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    files = open_input(tmp_path / "a.parquet").parquet
    assert files is not None
    reader = RowReader(files)
    for start, stop in ((0, 10), (10, 20), (40, 50), (3, 9), (9, 12), (20, 21)):
        read = list(reader.read(Window(start, stop)))
        assert [row.index for row in read] == list(range(start, stop))
        assert [row.content for row in read] == [bytes([n]) for n in range(start, stop)]


def test_what_cannot_be_an_input_is_refused(tmp_path: Path, photos: Path) -> None:
    table = write_jsonl(tmp_path / "a.jsonl", [{"x": 1, "y": 2}])
    with pytest.raises(BulkError, match=r"--image-column.*'x', 'y'"):
        open_input(table)
    with pytest.raises(BulkError, match=r"has no column 'z' \(--image-column\)"):
        open_input(table, "z")
    with pytest.raises(BulkError, match="found nothing, expected a folder"):
        open_input(tmp_path / "nowhere")
    with pytest.raises(BulkError, match="no file matches"):
        open_input(str(tmp_path / "*.png"))
    with pytest.raises(BulkError, match=r"is for tables, and .* is a folder"):
        open_input(photos, "image")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(BulkError, match=r"b\.parquet cannot be read"):
        open_input(tmp_path / "b.parquet")
    with pytest.raises(BulkError, match="contains a int, expected paths or bytes"):
        open_input([1])  # type: ignore[list-item]
