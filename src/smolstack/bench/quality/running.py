"""Runs a quality measurement and saves its results.

Each contender's row is written to a file when it is complete, so that an interrupted measurement
can continue. The file's name is a digest of everything that a number depends on: the files of the
model, the text and the images, the package's sources, the kernels and the threads.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench import machine
from smolstack.bench.cache import cache_folder
from smolstack.bench.quality import llama_cpp, passages
from smolstack.bench.quality.contenders import (
    REFERENCE,
    ImagePeer,
    TextContender,
    image_peers,
    our_contenders,
    peers,
    reference_of,
)
from smolstack.bench.quality.divergence import Divergence
from smolstack.bench.quality.images import Samples, draw_images, find_images, measure_images
from smolstack.bench.quality.ours import Ours
from smolstack.bench.quality.outliers import outlier_folder
from smolstack.bench.quality.state import Row, State, digest, environment, files
from smolstack.bench.record import Record
from smolstack.bench.timing import Case, Contender, later, measure
from smolstack.bench.unfinished import Saved
from smolstack.bench.worker import WorkerError
from smolstack.errors import ConfigError
from smolstack.output_files import atomic_file

KEPT_WINDOWS = 16  # windows whose logits are kept in files: 151 MB each with 49,280 tokens
CONTEXT, STEPS = 100, 32  # number of timed tokens, and of tokens before them
TEXT, IMAGES, OUTLIERS = "quality of text", "quality of images", "quality of images with outliers"

# Description and number of steps → a context with a function to call after each step.
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def quietly(what: str, steps: int) -> AbstractContextManager[Callable[[], None]]:
    """Show no progress."""
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class Choice:
    """What to measure.

    Attributes:
        model: a checkpoint folder with float weights.
        dtypes: smolstack's precisions.
        also: other folders of the same model that smolstack.load opens, quantized or changed.
        text: a file; None: the text included in the package.
        images: a folder; None: drawn images.
        parts: some of TEXT, IMAGES, OUTLIERS.
        rounds: alternating rounds of timing one token; 0: no timing.
        only: contenders whose label contains one of these; all if empty.
        folder: folder for the measurement and the peers' files; None: the user's cache, which is
            cleared when the measurement is complete.
    """

    model: Path
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8", "int4")
    also: Sequence[Path] = ()
    text: Path | None = None
    images: Path | None = None
    parts: Sequence[str] = (TEXT, IMAGES)
    rounds: int = 7
    only: Sequence[str] = ()
    folder: Path | None = None


def run_quality(
    choice: Choice,
    progress: Progress = quietly,
    note: Callable[[str], None] = lambda said: None,
    save: Path | None = None,
) -> Record:
    """Run all chosen measurements.

    Args:
        progress: called with a description and the number of steps.
        note: called with a message about peers that fail and are skipped.
        save: a file in which the rows so far are kept while the measurement lasts.

    Raises:
        ConfigError: the model's weights are quantized, contenders share a name, or ``only``
            matches none of them.
        CheckpointError: a folder cannot be loaded, or holds a different model.
        DataError: the text or the images cannot be read.
    """
    record = Record(choice.model.name, machine.describe(), {}, unfinished={})
    saved = Saved(save)

    def keep(part: str, rows: Sequence[Row]) -> None:
        record.studies[part] = list(rows)
        saved.write(record, now=True)

    measurement = Measurement(choice, progress, note, keep)
    with torch.inference_mode():
        try:
            for part in choice.parts:
                rows = measurement.text() if part == TEXT else measurement.images(part)
                if rows:
                    record.studies[part] = rows
        finally:
            measurement.close()
    measurement.tidy()
    record.unfinished = None
    return record


class Measurement:
    """The parts of one measurement, and the models that they use."""

    def __init__(
        self,
        choice: Choice,
        progress: Progress,
        note: Callable[[str], None],
        keep: Callable[[str, Sequence[Row]], None],
    ) -> None:
        self.choice, self.progress, self.note, self.keep = choice, progress, note, keep
        self.reference = reference_of(choice.model)
        own = our_contenders(self.reference, choice.dtypes, choice.also)
        self.own = [one for one in own if self._wanted(one)]
        self.passage = passages.read_text(choice.text or passages.TEST_TEXT)
        self.paths = find_images(choice.images) if choice.images is not None else None
        base = choice.folder or cache_folder("quality")
        self.root = base / digest(files(choice.model))
        self.root.mkdir(parents=True, exist_ok=True)
        found = self._peers() if TEXT in choice.parts else []
        self.everyone: list[TextContender] = [*self.own, *found]
        if not self.everyone:
            raise ConfigError(f"no contender's name contains one of {list(choice.only)}")
        run = digest([*environment(), self.passage, *files(*(self.paths or ()))])
        self.state = State(self.root / f"rows-{run}.json")
        self.run = run

    def text(self) -> list[Row]:
        """Return a row per contender: divergence, agreement, perplexity, bytes and time."""
        batches = passages.windows(self.reference.vlm.processor, self.passage)
        contenders: list[TextContender] = []
        rows = []
        for one in self.everyone:
            make = partial(self._text, one, batches)
            try:
                rows.append(self.state.row(f"text {self._key(one)}", make))
                contenders.append(one)
                self.keep(TEXT, rows)
            except WorkerError as error:  # peers do not support all shapes
                self.note(f"{one.label} takes no part: {error}")
            finally:
                one.close()
        if self.choice.rounds:
            names = " ".join(self._key(one) for one in contenders)
            times = self.state.row(
                f"times {self.choice.rounds} {names}", lambda: self._times(contenders)
            )
            rows = [{**row, "seconds a token": times[_label(row)]} for row in rows]
        return rows

    def images(self, part: str) -> list[Row]:
        """A row per contender that sees: visual tokens and forced answers."""
        root, folder = self.root / f"images-{self.run}", self.choice.model
        split = None
        paths = self.paths
        if paths is None:
            paths, split = draw_images(root / "drawn"), False
        reference, own = self.reference, self.own
        if part == OUTLIERS:
            root = self.root / f"outliers-{self.run}"
            folder = root / "model"
            reference = Ours(REFERENCE, folder, REFERENCE)
            # Additional folders have other weights, without the outliers.
            own = [Ours(o.precision, folder, o.dtype) for o in own if o.dtype != "auto"]
            self._plant(folder)
        samples = Samples(reference, paths, root, split)
        rows = []
        for one in (*own, *filter(self._wanted, image_peers(reference, folder, root))):
            make = partial(self._images, one, samples, part)
            try:
                rows.append(self.state.row(f"{part} {self._key(one)}", make))
                self.keep(part, rows)
            except WorkerError as error:
                self.note(f"{one.label} takes no part in {part}: {error}")
            finally:
                one.close()
        return rows

    def close(self) -> None:
        """End peers' processes and free the models."""
        for one in self.everyone:
            one.close()
        self.reference.close()
        gc.collect()

    def tidy(self) -> None:
        """Remove temporary files after the measurement; rows and peers' files stay if a folder
        was given.
        """
        if self.choice.folder is None:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        for path in self.root.glob(f"text-{self.run}-*.npy"):
            path.unlink()
        for kind in ("images", "outliers"):
            shutil.rmtree(self.root / f"{kind}-{self.run}", ignore_errors=True)

    def _text(self, one: TextContender, batches: Sequence[Batch]) -> Row:
        told = Divergence()
        what = f"{one.label}: text, {len(batches)} windows"
        with self.progress(what, len(batches)) as advance:
            for index, batch in enumerate(batches):
                expected = self._expected(index, batch)
                found = expected if one.label == self.reference.label else one.scores(batch)
                told.add(expected[:-1], found[:-1], batch.token_ids[0, 1:])
                advance()
        return {
            "by": one.by,
            "precision": one.precision,
            "tokens": told.tokens,
            "KL to float32": told.mean,
            "same likeliest token": told.agreement,
            "perplexity": told.perplexity,
            "text tower, MB": one.text_bytes() / 1e6,
        }

    def _expected(self, index: int, batch: Batch) -> Tensor:
        """Return float32's logits (T, V) of a window; those of the first windows are kept in
        files.
        """
        if index >= KEPT_WINDOWS:
            return self.reference.scores(batch)
        path = self.root / f"text-{self.run}-{index}.npy"
        if not path.exists():
            with atomic_file(path) as partial_file, partial_file.open("wb") as file:
                np.save(file, self.reference.scores(batch).numpy())
        return torch.from_numpy(np.load(path))

    def _plant(self, folder: Path) -> None:
        """The model with outliers, unless an earlier run has made it."""
        if not folder.exists():
            with self.progress("planting outliers", 1), torch.inference_mode(False):
                outlier_folder(self.choice.model, folder, towers=("vision",))

    def _images(self, one: ImagePeer | Ours, samples: Samples, part: str) -> Row:
        with self.progress(f"{one.label}: {part}", len(samples)) as advance:
            return measure_images(one, samples, advance)

    def _times(self, contenders: Sequence[TextContender]) -> Row:
        """Return seconds per token after CONTEXT tokens: medians of alternating runs of all
        contenders.
        """
        vocabulary = min(self.reference.vlm.config.image_token_id, 40_000)
        generator = torch.Generator().manual_seed(0)
        limit = self.reference.vlm.config.text.max_positions
        ids = torch.randint(3, vocabulary, (1, min(CONTEXT, limit // 2)), generator=generator)
        steps = min(STEPS, limit - ids.shape[1])
        case = Case(
            f"decode, after {ids.shape[1]} tokens",
            [
                Contender(one.by, later(partial(one.decoding, ids, steps)), one.precision)
                for one in contenders
            ],
            units=steps,
        )
        try:
            with self.progress(f"{case.name}: {len(contenders)} in turn", 1):
                results = measure(case, self.choice.rounds)
        finally:
            for one in contenders:
                one.close()
        return {result.contender: result.median for result in results}

    def _peers(self) -> list[TextContender]:
        found = peers(self.reference, self.root, CONTEXT + STEPS)
        return [peer for peer in found if self._wanted(peer)]

    def _wanted(self, one: TextContender | ImagePeer) -> bool:
        only = self.choice.only
        return not only or any(text in one.label for text in only)

    def _key(self, one: TextContender | ImagePeer) -> str:
        beside = one.folder != self.choice.model and isinstance(one, Ours) and one.dtype == "auto"
        return f"{one.label} {digest(files(one.folder))}" if beside else one.label


def absence(choice: Choice) -> str | None:
    """Return a sentence if llama.cpp could take part but is not installed."""
    lacking = llama_cpp.missing()
    if TEXT not in choice.parts or not lacking:
        return None
    return f"{llama_cpp.NAME} takes no part: {', '.join(lacking)} not installed"


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['by']} {row['precision']}"
