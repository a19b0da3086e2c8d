"""Quality of a precision on images: its visual tokens, and forced answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench.quality.divergence import Divergence
from smolstack.bench.quality.ours import Ours
from smolstack.bench.studies.drawn import drawn_numbers
from smolstack.errors import DataError
from smolstack.output_files import atomic_file
from smolstack.processor import formats
from smolstack.vlm import VLM

QUESTION = "Can you describe this image?"
LEAST, ANSWER = 16, 32  # tokens of a forced answer: short ones would not be informative
DRAWN = 6  # number of images drawn if none are given


class ImageContender(Protocol):
    """A contender that computes visual tokens, and logits of answers with them."""

    by: str
    precision: str

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Visual tokens (N, S, D) of a batch's tiles."""
        ...

    def answer_scores(self, batch: Batch, count: int) -> Tensor:
        """Logits (count, V) of the last positions of a batch with its visual tokens."""
        ...


def find_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, by name.

    Raises:
        DataError: it is not a folder, or contains no images.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder} is {found}, expected a folder of images")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in formats.SUFFIXES and path.is_file()
    )
    if not paths:
        raise DataError(
            f"{folder} contains no image, expected files that end in {', '.join(formats.SUFFIXES)}"
        )
    return paths


def draw_images(folder: Path) -> list[Path]:
    """Draw images of printed numbers, the same in every run, used if there are no others.

    They are square, so that they fill a tile: peers' towers know nothing of padding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"drawn-{index}.png" for index in range(DRAWN)]
    if not all(path.exists() for path in paths):
        for path, drawn in zip(paths, drawn_numbers(DRAWN), strict=True):
            with atomic_file(path) as partial:
                _square(drawn.image).save(partial, format="PNG")
    return paths


def _square(image: Image.Image) -> Image.Image:
    """An image in the middle of a white square."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


@dataclass
class Sample:
    """An image with float32's results.

    Attributes:
        batch: the prompt with its tiles, and the answer's tokens after it.
        visual: float32's visual tokens (N, S, D).
        answer: (n,) float32's greedy answer.
        logits: (n, V) float32's logits at the answer's tokens.
    """

    batch: Batch
    visual: Tensor
    answer: Tensor
    logits: Tensor


class Samples:
    """Images with float32's answers, which are saved in a folder.

    Args:
        reference: the model in float32.
        paths: image files.
        split: whether images are split into tiles; None: the checkpoint's setting.
    """

    def __init__(
        self, reference: Ours, paths: Sequence[Path], root: Path, split: bool | None = None
    ) -> None:
        self.reference, self.paths, self.root, self.split = reference, paths, root, split
        root.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self, index: int) -> Sample:
        """Return one image's sample, computed on first use."""
        vlm, kept = self.reference.vlm, self.root / f"reference-{index}.safetensors"
        tiling: dict[str, Any] = {} if self.split is None else {"split": self.split}
        batch = vlm.processor([(str(self.paths[index]), QUESTION)], **tiling)
        if not kept.exists():
            visual = vlm.model.encode_tiles(batch.tiles, batch.tile_grids)
            answer = _answer(vlm, replace(batch, visual_tokens=visual))
            forced = _with_answer(batch, answer)
            seen = replace(forced, visual_tokens=visual)
            logits = self.reference.answer_scores(seen, len(answer))
            with atomic_file(kept) as partial:
                save_file({"visual": visual, "answer": answer, "logits": logits}, str(partial))
        held = load_file(kept)
        return Sample(
            _with_answer(batch, held["answer"]), held["visual"], held["answer"], held["logits"]
        )


def measure_images(
    contender: ImageContender, samples: Samples, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return a table row with the errors of a precision's visual tokens and forced answers.

    The relative error is the norm of the difference divided by the norm, over all images' visual
    tokens. Forced answers are read with the precision's own visual tokens.
    """
    difference = norm = 0.0
    tiles = 0
    told = Divergence()
    for index in range(len(samples)):
        sample = samples.sample(index)
        visual = contender.visual_tokens(sample.batch)
        expected = sample.visual.double()
        difference += float((visual.double().cpu() - expected).square().sum())
        norm += float(expected.square().sum())
        tiles += len(visual)
        forced = replace(sample.batch, visual_tokens=visual)
        found = contender.answer_scores(forced, len(sample.answer))
        told.add(sample.logits, found, sample.answer)
        advance()
    return {
        "by": contender.by,
        "precision": contender.precision,
        "images": len(samples),
        "tiles": tiles,
        "relative error of visual tokens": math.sqrt(difference / norm),
        "answer tokens": told.tokens,
        "KL of forced answers": told.mean,
        "same likeliest token": told.agreement,
    }


def _answer(vlm: VLM, batch: Batch) -> Tensor:
    """Return the tokens of a greedy answer of at least LEAST tokens, without image tokens."""
    length = batch.token_ids.shape[1]
    count = min(ANSWER, vlm.config.text.max_positions - length)
    cache = vlm.model.new_cache(batch, length + count)
    scores = vlm.model.prefill(batch, cache)
    chosen: list[int] = []
    while True:
        scores = scores.clone()
        scores[:, vlm.config.image_token_id] = -math.inf
        if len(chosen) < min(LEAST, count):
            scores[:, list(vlm.eos_token_ids)] = -math.inf
        token = scores.argmax(dim=-1)
        chosen.append(int(token))
        if len(chosen) == count or chosen[-1] in vlm.eos_token_ids:
            return torch.tensor(chosen)
        scores = vlm.model.decode_one_token(token, cache)


def _with_answer(batch: Batch, answer: Tensor) -> Batch:
    """Return the prompt with all tokens of an answer but the last, whose successor is not
    needed.
    """
    rest = answer[None, :-1]
    seen = torch.ones_like(rest, dtype=torch.bool)
    return replace(
        batch,
        token_ids=torch.cat((batch.token_ids, rest), dim=1),
        attention_mask=torch.cat((batch.attention_mask, seen), dim=1),
    )
