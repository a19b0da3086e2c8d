"""What a run shows before it starts: how many tokens carry loss, and one example with its mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from smolstack.errors import DataError
from smolstack.processor.processor import Processor
from smolstack.train.data import Source
from smolstack.train.loss_mask import IGNORED, Supervisor, TokenizedExample
from smolstack.train.progress import Display

COUNTED = 200  # examples that are counted where not all are checked


@dataclass
class Counts:
    """Tokens of the examples looked at, by what becomes of them."""

    examples: int = 0
    tokens: int = 0
    visual: int = 0
    supervised: int = 0
    longest: int = 0

    def add(self, lesson: TokenizedExample) -> None:
        self.examples += 1
        self.tokens += len(lesson.token_ids)
        self.visual += sum(plan.visual_tokens for plan in lesson.plans)
        self.supervised += lesson.supervised
        self.longest = max(self.longest, len(lesson.token_ids))

    def sentence(self) -> str:
        """The counts in words."""
        share = self.supervised / max(self.tokens, 1)
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens: {share:.1%} carry loss "
            f"({self.supervised:,} of assistants' answers), {self.visual:,} are visual, "
            f"the longest example has {self.longest:,}"
        )


def show_examples(
    sources: Mapping[str, Source], supervisor: Supervisor, display: Display, *, everything: bool
) -> None:
    """Look at examples before anything is trained on them, and say what was seen.

    Args:
        sources: by name; of the first one an example is shown with its mask.
        everything: look at all of them, not only at the first few.

    Raises:
        DataError: an example that cannot be learned from, by its name.
    """
    for number, (name, source) in enumerate(sources.items()):
        counts, shown = Counts(), None
        display.begin(f"checking {name} examples", len(source))
        for lesson in _lessons_to_check(source, supervisor, everything=everything):
            counts.add(lesson)
            shown = shown or lesson
            display.advance()
        display.end()
        if shown is None:
            raise DataError(f"the {name} data holds no example")
        display.say(f"{name}: {counts.sentence()}")
        if number == 0:
            display.say(f"{shown.name}, what carries loss in ⟦ ⟧:")
            display.say(mask_shown(shown, supervisor.processor))


def _lessons_to_check(
    source: Source, supervisor: Supervisor, *, everything: bool
) -> Iterator[TokenizedExample]:
    for index in range(len(source) if everything else min(len(source), COUNTED)):
        yield supervisor(source[index])


def mask_shown(lesson: TokenizedExample, processor: Processor) -> Text:
    """The lesson's text; what carries loss stands in ⟦ ⟧ (and bold green on a terminal)."""
    shown = Text()
    pairs = list(zip(lesson.token_ids, lesson.labels, strict=True))
    for carries, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in run]
        if carries:
            shown.append(f"⟦{_text(ids, processor)}⟧", "bold green")
        else:
            shown.append(_text(ids, processor), "dim")
    return shown


def _text(ids: Sequence[int], processor: Processor) -> str:
    """Tokens as text, runs of visual tokens as one word."""
    image = processor.config.image_token_id
    pieces = []
    for visual, run in groupby(ids, key=lambda token: token == image):
        some = list(run)
        decoded = processor.tokenizer.decode(some, skip_special=False)
        pieces.append(f"{processor.markers.image}×{len(some)}" if visual else decoded)
    return "".join(pieces)
