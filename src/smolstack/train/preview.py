"""The summary before a run: how many tokens contribute to the loss, and an example's mask."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.text import Text

from smolstack.batch import VisualTokens
from smolstack.errors import DataError, ImageError
from smolstack.processor.inputs import ImageInput
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import open_image
from smolstack.train.data import Source
from smolstack.train.loss_mask import IGNORED, Supervisor, TokenizedExample
from smolstack.train.progress import Display

COUNTED = 200  # examples checked if not all are
DECODERS, AT_ONCE = 4, 32  # threads that decode images, and examples per batch of them


@dataclass
class Counts:
    """Token counts of the checked examples, by kind."""

    examples: int = 0
    tokens: int = 0
    visual: int = 0
    supervised: int = 0
    longest: int = 0

    def add(self, tokenized: TokenizedExample) -> None:
        self.examples += 1
        self.tokens += len(tokenized.token_ids)
        self.visual += sum(plan.visual_tokens for plan in tokenized.plans)
        self.supervised += tokenized.supervised
        self.longest = max(self.longest, len(tokenized.token_ids))

    def sentence(self) -> str:
        """Return the counts as text."""
        share = self.supervised / max(self.tokens, 1)
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens: {share:.1%} contribute to "
            f"the loss ({self.supervised:,} of assistant messages), {self.visual:,} are visual, "
            f"the longest example has {self.longest:,}"
        )


def show_examples(
    sources: Mapping[str, Source], supervisor: Supervisor, display: Display, *, everything: bool
) -> None:
    """Check examples before training and print a summary.

    Args:
        sources: sources by name; an example of the first one is shown with its mask.
        everything: check all examples, not only the first ones.

    Raises:
        DataError: an example is invalid; names it.
    """
    for number, (name, source) in enumerate(sources.items()):
        counts, shown = Counts(), None
        display.begin(f"checking {name} examples", len(source))
        for tokenized in _examples_to_check(source, supervisor, everything=everything):
            counts.add(tokenized)
            shown = shown or tokenized
            display.advance()
        display.end()
        if shown is None:
            raise DataError(f"the {name} data contains no examples")
        display.say(f"{name}: {counts.sentence()}")
        if number == 0:
            display.say(f"{shown.name}, tokens that contribute to the loss in ⟦ ⟧:")
            display.say(mask_shown(shown, supervisor.processor))


def _examples_to_check(
    source: Source, supervisor: Supervisor, *, everything: bool
) -> Iterator[TokenizedExample]:
    """Yield examples after decoding their images completely, so that truncated files are found
    before training.
    """
    count = len(source) if everything else min(len(source), COUNTED)
    seen: set[str] = set()
    with ThreadPoolExecutor(max(1, min(DECODERS, os.cpu_count() or 1))) as pool:
        for start in range(0, count, AT_ONCE):
            some = range(start, min(start + AT_ONCE, count))
            tokenized_examples = [supervisor(source[index]) for index in some]
            checks = [
                pool.submit(_decode, tokenized.name, p)
                for tokenized, p in _new(tokenized_examples, seen)
            ]
            for check in checks:
                check.result()
            yield from tokenized_examples


def _new(
    tokenized_examples: Sequence[TokenizedExample], seen: set[str]
) -> Iterator[tuple[TokenizedExample, ImageInput]]:
    """Yield tokenized examples and their images; each file only once."""
    for tokenized in tokenized_examples:
        for image in tokenized.images:
            if isinstance(image, (str, Path)):
                if str(image) in seen:
                    continue
                seen.add(str(image))
            yield tokenized, image


def _decode(name: str, image: ImageInput) -> None:
    if isinstance(image, VisualTokens):
        return
    try:
        open_image(image)
    except ImageError as error:
        raise DataError(f"{name}: {error}") from error


def mask_shown(tokenized: TokenizedExample, processor: Processor) -> Text:
    """Return the example's text with the parts that contribute to the loss in ⟦ ⟧
    (and bold green on a terminal).
    """
    shown = Text()
    pairs = list(zip(tokenized.token_ids, tokenized.labels, strict=True))
    for carries, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in run]
        if carries:
            shown.append(f"⟦{_text(ids, processor)}⟧", "bold green")
        else:
            shown.append(_text(ids, processor), "dim")
    return shown


def _text(ids: Sequence[int], processor: Processor) -> str:
    """Return tokens as text, with runs of visual tokens shortened."""
    image = processor.config.image_token_id
    pieces = []
    for visual, run in groupby(ids, key=lambda token: token == image):
        some = list(run)
        decoded = processor.tokenizer.decode(some, skip_special=False)
        pieces.append(f"{processor.markers.image}×{len(some)}" if visual else decoded)
    return "".join(pieces)
