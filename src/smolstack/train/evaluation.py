"""Evaluation during training: the loss of every example, and generated answers compared with the
expected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from smolstack.batch import VisualTokens
from smolstack.errors import ConfigError
from smolstack.processor.geometry import TilePlan
from smolstack.processor.tiles import ImageSource, open_image
from smolstack.train.batches import MicroBatch, as_source, batches_of
from smolstack.train.data import Source
from smolstack.train.frozen_tower import FrozenTower
from smolstack.train.loss_mask import Supervisor, TokenizedExample
from smolstack.train.objective import AnswerLoss
from smolstack.train.recipe import Evaluation
from smolstack.vlm import VLM

AT_ONCE = 8  # answers generated per batch


@dataclass(frozen=True)
class Answered:
    """An answered evaluation example. ``image`` is its first image, reduced."""

    name: str
    question: str
    truth: str
    answer: str
    image: Image.Image | None

    @property
    def right(self) -> bool:
        return self.answer == self.truth


@dataclass(frozen=True)
class Evaluated:
    """The result of one evaluation.

    Attributes:
        loss: mean over the tokens that contribute to it, in nats.
        exact: share of answers equal to the expected answer; None if none were generated.
        character_error_rate: edits per character of the expected answers, over all answers.
        answered: all answers.
    """

    loss: float
    exact: float | None = None
    character_error_rate: float | None = None
    answered: tuple[Answered, ...] = ()

    def sentence(self) -> str:
        """Return the result as text."""
        words = f"evaluation loss {self.loss:.4f}"
        if self.exact is not None and self.character_error_rate is not None:
            words += (
                f", {self.exact:.1%} of {len(self.answered)} answers exact, character error rate "
                f"{self.character_error_rate:.1%}"
            )
        return words

    def metrics(self) -> dict[str, float]:
        """Return the values for the log."""
        found = {"evaluation_loss": self.loss}
        if self.exact is not None and self.character_error_rate is not None:
            found |= {"exact": self.exact, "character_error_rate": self.character_error_rate}
        return found


class Evaluator:
    """Evaluates a model during training.

    Args:
        vlm: contains the model.
        source, supervisor: provide the examples.
        settings: how many examples are answered.
        micro_batch: examples per forward pass.
        autocast: compute the loss in bfloat16.
    """

    def __init__(
        self,
        vlm: VLM,
        source: Source,
        supervisor: Supervisor,
        settings: Evaluation,
        *,
        micro_batch: int,
        autocast: bool,
    ) -> None:
        self.vlm, self.source, self.supervisor = vlm, source, supervisor
        self.settings, self.micro_batch, self.autocast = settings, micro_batch, autocast

    def __call__(self, loss: AnswerLoss, tower: FrozenTower | None) -> Evaluated:
        """Evaluate the current model; ``tower`` provides cached outputs of a frozen tower."""
        model = self.vlm.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                total = self._loss(loss, tower)
            answered = self._answers(tower)
        finally:
            model.train(was_training)
            self.vlm.clear_caches()
        if not answered:
            return Evaluated(total)
        truths, answers = [a.truth for a in answered], [a.answer for a in answered]
        exact = sum(a.right for a in answered) / len(answered)
        return Evaluated(total, exact, _error_rate(truths, answers), tuple(answered))

    def _loss(self, loss: AnswerLoss, tower: FrozenTower | None) -> float:
        total, tokens = 0.0, 0
        device, processor = self.vlm.device, self.vlm.processor
        for start in range(0, len(self.source), self.micro_batch):
            some = range(start, min(start + self.micro_batch, len(self.source)))
            tokenized_examples = [self.supervisor(self.source[index]) for index in some]
            for batch in batches_of(
                tokenized_examples, self.micro_batch, processor, cut=tower is None
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                    total += float(loss(with_states(batch, tower).to(device)))
                tokens += batch.supervised
        return total / max(tokens, 1)

    def _answers(self, tower: FrozenTower | None) -> list[Answered]:
        count = min(self.settings.answers, len(self.source))
        answered = []
        for start in range(0, count, AT_ONCE):
            examples = [self.source[i] for i in range(start, min(start + AT_ONCE, count))]
            tokenized_examples = [self.supervisor(example) for example in examples]
            chats = [
                self._asked(example.messages, tokenized, tower)
                for example, tokenized in zip(examples, tokenized_examples, strict=True)
            ]
            answers = self.vlm.ask_many(
                chats,
                max_new_tokens=self.settings.max_new_tokens,
                keep_special_tokens=self.settings.keep_special_tokens,
                **self.supervisor.tiling,
            )
            for example, tokenized, answer in zip(
                examples, tokenized_examples, answers, strict=True
            ):
                answered.append(_compared(example.name, example.messages, tokenized, answer.text))
        return answered

    def _asked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenized: TokenizedExample,
        tower: FrozenTower | None,
    ) -> list[Mapping[str, Any]]:
        """Return the chat up to its last answer, with visual tokens as images if the tower is
        frozen.
        """
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        asked = list(messages[:last])
        if tower is None or not tokenized.images:
            return asked
        visual = iter(
            self._projected(tower, as_source(image), plan)
            for image, plan in zip(tokenized.images, tokenized.plans, strict=True)
        )
        return [_with_images(message, visual) for message in asked]

    @torch.no_grad()
    def _projected(self, tower: FrozenTower, image: ImageSource, plan: TilePlan) -> VisualTokens:
        states = tower.states(image, plan).to(self.vlm.dtype)
        tokens = states if tower.projected else self.vlm.model.connector.proj(states)
        return VisualTokens(tokens, plan.rows, plan.cols, plan.source)


def with_states(batch: MicroBatch, tower: FrozenTower | None) -> MicroBatch:
    """Return a micro-batch with a frozen tower's outputs for its images."""
    return batch if tower is None else replace(batch, states=tower(batch.images))


def _with_images(message: Mapping[str, Any], visual: Any) -> Mapping[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [
        {"type": "image", "image": next(visual)} if part["type"] == "image" else part
        for part in content
    ]
    return {**message, "content": parts}


def _compared(
    name: str, messages: Sequence[Mapping[str, Any]], tokenized: TokenizedExample, answer: str
) -> Answered:
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    image = None
    if tokenized.images:
        image = open_image(as_source(tokenized.images[0]))
        image.thumbnail((320, 240))
    question = _text(messages[last - 1]) if last else ""
    return Answered(name, question, _text(messages[last]).strip(), answer.strip(), image)


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def check_evaluation(settings: Evaluation) -> None:
    """Check that evaluation is possible, before the first step.

    Raises:
        ConfigError: answers are requested and jiwer is not installed.
    """
    if settings.answers:
        _error_rate(["a"], ["a"])


def _error_rate(truths: list[str], answers: list[str]) -> float:
    """Return the character error rate over all pairs: edits per character of the expected
    answers.
    """
    try:
        import jiwer
    except ImportError:
        raise ConfigError(
            "evaluation by answers needs the package jiwer (pip install 'smolstack[train]'), "
            "or evaluation.answers = 0"
        ) from None
    rate: float = jiwer.process_characters(truths, answers).cer
    return rate
