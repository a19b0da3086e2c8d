"""Many answers at once: each is the one that ``ask`` gives, whoever shares the batch."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import smolstack
from smolstack.errors import (
    ContextLengthError,
    DeadlineError,
    ImageError,
    KVCacheError,
    QueueFullError,
)
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.options import read_options
from smolstack.generation.request import Request, Update
from smolstack.generation.scheduler import SchedulerLimits
from smolstack.model.vision import VisionTower
from smolstack.model.vlm import VisionLanguageModel


class Desk:
    """An engine's core over a model, and what it told about each question."""

    def __init__(self, vlm: smolstack.VLM, **limits: Any) -> None:
        self.vlm, self.now = vlm, 0.0
        self.core = EngineCore(
            vlm.model, vlm.processor, SchedulerLimits(**limits), clock=lambda: self.now
        )
        self.updates: dict[int, list[Update]] = {}

    def ask(self, images: Any, text: str, deadline: float | None = None, **options: Any) -> Request:
        chosen = read_options(options, self.vlm.eos_token_ids)  # type: ignore[arg-type]
        prompt = self.vlm.processor.prepare((images, text), **chosen.image_options)
        self.core.scheduler.check_room(1)
        (request,) = self.core.requests([prompt], chosen, deadline=deadline)
        told: list[Update] = []
        request.listener = told.append
        self.core.add(request)
        self.updates[request.number] = told
        return request

    def run(self) -> None:
        while not self.core.idle:
            self.core.step()

    def answer(self, request: Request) -> Answer:
        answer = self.updates[request.number][-1].answer
        assert answer is not None, self.updates[request.number]
        assert request.answered is answer
        return answer

    def pieces(self, request: Request) -> str:
        return "".join(update.piece for update in self.updates[request.number])


QUESTIONS: list[tuple[tuple[int, ...], str, dict[str, Any]]] = [
    ((), "Hello?", {"max_new_tokens": 7}),
    ((0,), "What?", {"max_new_tokens": 12}),
    ((0,), "What does it say in the end?", {"max_new_tokens": 1}),
    ((1,), "What?", {"max_new_tokens": 9, "temperature": 1.0, "seed": 3, "top_p": 0.9}),
    ((2, 0), "Compare.", {"max_new_tokens": 5, "repetition_penalty": 1.3}),
    ((1,), "How many?", {"max_new_tokens": 6, "regex": "[0-9]{1,3}( apples)?"}),
    ((1,), "Which?", {"choices": ["red", "green", "a longer one"]}),
    ((2,), "As JSON.", {"max_new_tokens": 20, "schema": {"enum": ["a", "b", 17]}}),
    ((0,), "Likely?", {"max_new_tokens": 4, "logprobs": 3, "split": False}),
]


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, images: list[Image.Image]) -> list[Answer]:
    """Each question put to a model that has seen nothing before."""
    answers = []
    for shown, text, options in QUESTIONS:
        vlm = smolstack.load(tiny_folder)
        answers.append(vlm.ask([images[i] for i in shown], text, **options))
    return answers


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, len(QUESTIONS) - 1), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    running=st.integers(1, 6),
    tiles=st.integers(1, 5),
    prefill_tokens=st.sampled_from([7, 64, 512, None]),
    interleave=st.booleans(),
    contexts=st.integers(1, 6),
)
def test_answers_are_those_of_ask_in_any_mixture(
    tiny_vlm: smolstack.VLM,
    images: list[Image.Image],
    alone: list[Answer],
    order: list[int],
    gaps: list[int],
    running: int,
    tiles: int,
    prefill_tokens: int | None,
    interleave: bool,
    contexts: int,
) -> None:
    desk = Desk(
        tiny_vlm,
        running=running,
        tiles=tiles,
        prefill_tokens=prefill_tokens,
        interleave=interleave,
        kv_cache_bytes=contexts * 512 * tiny_vlm.model.kv_bytes_per_token,
    )
    asked = []
    for which, gap in zip(order, gaps, strict=False):
        shown, text, options = QUESTIONS[which]
        asked.append((which, desk.ask([images[i] for i in shown], text, **options)))
        for _ in range(gap):
            desk.core.step()
    desk.run()
    for which, request in asked:
        found, expected = desk.answer(request), alone[which]
        assert found.token_ids == expected.token_ids
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        assert replace(found.usage, cached_tokens=0) == expected.usage  # of others' prompts
        assert found.parsed == expected.parsed
        assert desk.pieces(request).rstrip() == expected.text
        if expected.probabilities is not None:
            assert found.probabilities == pytest.approx(expected.probabilities, rel=1e-3)
        if expected.logprobs is not None:
            assert [t.logprob for t in found.logprobs or ()] == pytest.approx(
                [t.logprob for t in expected.logprobs], abs=1e-4
            )


def count_work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What goes through the networks, in order: tiles, or the tokens of one forward pass."""
    log: list[tuple[str, int]] = []
    tower = VisionTower.forward
    read = VisionLanguageModel.prefill_embeddings
    decode = VisionLanguageModel.decode_one_token

    def tiles(self: VisionTower, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        log.append(("tiles", x.shape[0]))
        return tower(self, x, *rest)

    def prefill(self: VisionLanguageModel, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        log.append(("prefill", x.shape[:2].numel()))
        return read(self, x, *rest, **named)

    def one_token(self: VisionLanguageModel, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        log.append(("decode", x.shape[0]))
        return decode(self, x, *rest)

    monkeypatch.setattr(VisionTower, "forward", tiles)
    monkeypatch.setattr(VisionLanguageModel, "prefill_embeddings", prefill)
    monkeypatch.setattr(VisionLanguageModel, "decode_one_token", one_token)
    return log


def test_an_image_is_encoded_once_for_everybody(
    tiny_vlm: smolstack.VLM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = count_work(monkeypatch)
    desk = Desk(tiny_vlm)
    for number in range(5):
        desk.ask(images[0], f"Question {number}?", max_new_tokens=2)
    desk.run()
    assert sum(count for kind, count in log if kind == "tiles") == 9
    assert desk.core.image_queue.images_done == 1


def test_what_prompts_share_is_read_once(
    tiny_vlm: smolstack.VLM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = count_work(monkeypatch)
    desk = Desk(tiny_vlm)
    visual = tiny_vlm.encode(images[0])
    log.clear()
    for number in range(4):
        desk.ask(visual, f"Question {number}?", max_new_tokens=2)
    desk.run()
    first, *later = [count for kind, count in log if kind == "prefill"]
    assert first > len(visual)
    assert sum(later) < 3 * 20


def test_decoding_never_waits_for_more_than_one_piece_of_a_newcomers_work(
    tiny_vlm: smolstack.VLM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tiny_vlm, tiles=2, prefill_tokens=16)
    tiny_vlm.eos_token_ids, ends = (), tiny_vlm.eos_token_ids
    try:
        talker = desk.ask((), "Talk on.", max_new_tokens=60)
        while talker.stage != "decode":
            desk.core.step()
        log = count_work(monkeypatch)
        for image in images:
            desk.ask(image, "What?", max_new_tokens=3)
        desk.ask((), "Which?", choices=["a short one", "another " * 5, "one more", "the fourth"])
        desk.run()
    finally:
        tiny_vlm.eos_token_ids = ends
    assert len(desk.answer(talker).token_ids) == 60
    kinds = [kind for kind, _ in log]
    assert all("decode" in pair for pair in itertools.pairwise(kinds)), (
        "between two pieces of the newcomers' work everybody decodes"
    )
    assert max(count for kind, count in log if kind == "tiles") <= 2
    assert max(count for kind, count in log if kind == "prefill") <= 16


def test_who_goes_away_stops_costing_anything(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    desk = Desk(tiny_vlm, tiles=1)
    gone = desk.ask(images[0], "What?", max_new_tokens=50)
    stays = desk.ask(images[1], "What?", max_new_tokens=3)
    desk.core.step()
    gone.cancelled = True
    desk.run()
    assert desk.core.image_queue.images_done == 1
    assert desk.updates[gone.number] == []
    assert desk.answer(stays).text == tiny_vlm.ask(images[1], "What?", max_new_tokens=3).text


def test_an_image_that_others_wait_for_survives_one_who_goes_away(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    desk = Desk(tiny_vlm, tiles=1)
    gone = desk.ask(images[0], "What?", max_new_tokens=3)
    stays = desk.ask(images[0], "What else?", max_new_tokens=3)
    desk.core.step()
    desk.core.step()
    gone.cancelled = True
    desk.run()
    assert desk.answer(stays).usage.tiles == 9


def test_an_answer_that_is_late_ends_with_an_error_and_the_others_go_on(
    tiny_vlm: smolstack.VLM,
) -> None:
    desk = Desk(tiny_vlm)
    late = desk.ask((), "What?", deadline=5.0, max_new_tokens=100, regex="a{200}")
    other = desk.ask((), "What?", max_new_tokens=10)
    for _ in range(4):
        desk.core.step()
    desk.now = 6.0
    desk.run()
    assert isinstance(desk.updates[late.number][-1].error, DeadlineError)
    assert desk.answer(other).usage.completion_tokens > 0


def test_a_damaged_image_is_its_own_askers_trouble_alone(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    content = io.BytesIO()
    images[0].save(content, "jpeg")  # whose header tells its size
    desk = Desk(tiny_vlm)
    bad = desk.ask(content.getvalue()[:-200], "What?", max_new_tokens=3)
    good = desk.ask(content.getvalue(), "What?", max_new_tokens=3)
    desk.run()
    assert isinstance(desk.updates[bad.number][-1].error, ImageError)
    assert desk.answer(good).finish_reason in ("length", "stop")


def test_a_full_queue_refuses_at_once(tiny_vlm: smolstack.VLM) -> None:
    desk = Desk(tiny_vlm, running=1, queued=1)
    desk.ask((), "One?", max_new_tokens=2)
    desk.ask((), "Two?", max_new_tokens=2)
    with pytest.raises(QueueFullError, match="the limit is 2"):
        desk.ask((), "Three?", max_new_tokens=2)
    desk.run()
    desk.ask((), "Four?", max_new_tokens=2)


def test_a_prompt_too_long_is_refused_before_it_waits(tiny_vlm: smolstack.VLM) -> None:
    desk = Desk(tiny_vlm)
    with pytest.raises(ContextLengthError):
        desk.ask((), "word " * 600)
    assert desk.core.idle


def test_nothing_is_kept_of_those_who_left(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    desk = Desk(tiny_vlm, prefix_bytes=0)
    requests = [desk.ask(p, "What?", max_new_tokens=4) for p in images]
    desk.run()
    assert all(r.cache is None and r.images is None for r in requests)
    assert desk.core.prefix_cache.held_bytes == desk.core.scheduler.reserved_bytes == 0
    assert len(desk.core.image_queue) == 0


def test_a_request_waits_until_there_is_memory_for_its_kv_cache(
    tiny_vlm: smolstack.VLM,
) -> None:
    one = tiny_vlm.ask(text="Hello?", max_new_tokens=1).usage.prompt_tokens + 20
    budget = 2 * one * tiny_vlm.model.kv_bytes_per_token
    desk = Desk(tiny_vlm, kv_cache_bytes=budget)
    requests = [desk.ask((), "Hello?", max_new_tokens=20, seed=n, temperature=1) for n in range(5)]
    most = 0
    while not desk.core.idle:
        desk.core.step()
        core = desk.core
        most = max(most, len(core.scheduler.running))
        assert core.scheduler.reserved_bytes + core.prefix_cache.held_bytes <= budget
    assert most == 2
    assert all(desk.answer(request).token_ids for request in requests)


def test_a_request_that_never_fits_is_refused_by_its_numbers(tiny_vlm: smolstack.VLM) -> None:
    desk = Desk(tiny_vlm, kv_cache_bytes=1000)
    with pytest.raises(KVCacheError, match=r"answer up to 9, .* 1,000 are allowed"):
        desk.ask((), "Hello?", max_new_tokens=9)
    assert desk.core.idle


def test_tiles_of_several_requests_share_a_pass(
    tiny_vlm: smolstack.VLM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = count_work(monkeypatch)
    desk = Desk(tiny_vlm, tiles=4)
    for image in images:
        desk.ask(image, "What?", max_new_tokens=1, split=False)
    desk.run()
    assert [count for kind, count in log if kind == "tiles"] == [3]


def test_equal_tiles_of_several_images_are_encoded_once(
    tiny_vlm: smolstack.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = count_work(monkeypatch)
    desk = Desk(tiny_vlm)
    requests = []
    for width in (64, 96):
        page = Image.new("RGB", (width, 64), "white")
        requests.append(desk.ask(page, "What?", max_new_tokens=1))
    desk.run()
    assert sum(desk.answer(request).usage.tiles for request in requests) > 2
    assert sum(count for kind, count in log if kind == "tiles") == 1
