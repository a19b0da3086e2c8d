"""``smolstack export``, from its arguments to its files and words."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_export_says_what_it_wrote_and_how_exact_it_is(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    result = run("export", tiny_folder, folder, "--dtype", "fp32", "--dtype", "int8", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(result.stdout)
    files = {entry["file"]: entry for entry in report["graphs"]}
    assert sorted(files) == sorted(f"onnx/{p.name}" for p in (folder / "onnx").iterdir())
    assert files["onnx/decoder_model_merged.onnx"]["difference"] < 1e-4
    assert files["onnx/decoder_model_merged_int8.onnx"]["dtype"] == "int8"


def test_an_existing_folder_is_kept_unless_told_otherwise(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = run("export", tiny_folder, tmp_path)
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"error: {tmp_path} exists and is not empty; overwrite=True (--overwrite) replaces it\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_is_no_checkpoint_is_one_sentence(run: Run, tmp_path: Path) -> None:
    result = run("export", tmp_path / "nothing", tmp_path / "exported")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
