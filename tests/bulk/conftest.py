"""Images in folders and tables, and a job on the tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

import smolstack
from smolstack.bulk import Summary, map_images

Job: TypeAlias = Callable[..., Summary]
SIZES = [(40, 100), (90, 90), (120, 30), (200, 150), (64, 64), (30, 20), (100, 40), (128, 96)]
BAD = ("broken.png", "cut.png")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten images, two of them bad, some in a sub-folder; and what is no image."""
    folder = tmp_path_factory.mktemp("bulk") / "photos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(1)
    for number, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        place = folder / "more" if number % 3 == 0 else folder
        Image.fromarray(pixels).save(place / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image at all")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def reader() -> smolstack.VLM:
    """The bundled reader, whose answers depend on what it sees."""
    return smolstack.load()


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten printed numbers in images of different sizes."""
    folder = tmp_path_factory.mktemp("bulk") / "numbers"
    folder.mkdir()
    font = ImageFont.load_default(size=64)
    for place, number in enumerate((7, 42, 318, 2024, 90210, 655321, 11, 5000, 86, 1789)):
        size = (300 + 40 * (place % 3), 110 + 90 * (place % 4))
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).text((30, size[1] // 2 - 32), str(number), "black", font)
        image.save(folder / f"{place}.png")
    return folder


@pytest.fixture
def job(tiny_vlm: smolstack.VLM, tmp_path: Path) -> Job:
    """``job(images, …)``: short answers to "What?" in answers.parquet, unless told otherwise."""

    def run(images: Any, questions: Any = None, **options: Any) -> Summary:
        options = {"out": tmp_path / "answers.parquet", "model": tiny_vlm, **options}
        if questions is None:
            questions = () if "embed" in options else "What?"
        return map_images(images, questions, **{"max_new_tokens": 4, **options})

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet or JSONL output."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found
