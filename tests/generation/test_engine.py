"""The public engine: requests from threads and from asyncio, and ask in many threads at once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import smolstack
from smolstack.errors import DeadlineError, GenerationError, KVCacheError, QueueFullError
from smolstack.generation.request import Request

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 2}


@pytest.fixture
def vlm(tiny_folder: Path) -> smolstack.VLM:
    """A model whose caches are empty."""
    return smolstack.load(tiny_folder)


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, images: list[Image.Image]) -> list[tuple[int, ...]]:
    """Each image's answer, of a model that has seen nothing else."""
    return [
        smolstack.load(tiny_folder).ask(image, "What?", **OPTIONS).token_ids for image in images
    ]


def test_submitted_requests_are_answered_and_the_engine_drains(
    vlm: smolstack.VLM, images: list[Image.Image], expected: list[tuple[int, ...]]
) -> None:
    with vlm.engine(running=2) as engine:
        futures = [engine.submit(vlm.request(image, "What?", **OPTIONS)) for image in images * 2]
    assert not engine.alive
    assert [future.result().token_ids for future in futures] == expected * 2
    with pytest.raises(QueueFullError, match="shutting down"):
        engine.submit(vlm.request(text="What?"))


def test_pieces_come_in_asyncio(vlm: smolstack.VLM, images: list[Image.Image]) -> None:
    whole = vlm.ask(images[0], "What?", **OPTIONS)

    async def streamed(engine: smolstack.Engine, image: Image.Image) -> str:
        request = vlm.request(image, "What?", **OPTIONS)
        text = "".join([piece async for piece in engine.stream(request)])
        assert request.answered.text == text.rstrip()
        return text

    async def both(engine: smolstack.Engine) -> list[str]:
        return await asyncio.gather(*(streamed(engine, image) for image in images))

    with vlm.engine() as engine:
        texts = asyncio.run(both(engine))
    assert texts[0].rstrip() == whole.text


def test_who_stops_iterating_stops_the_work(vlm: smolstack.VLM) -> None:
    vlm.eos_token_ids = ()

    async def one_piece(engine: smolstack.Engine) -> None:
        pieces = engine.stream(vlm.request(text="Talk on.", max_new_tokens=400))
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]

    with vlm.engine() as engine:
        asyncio.run(one_piece(engine))
    assert engine.core.generated_tokens == 0
    assert engine.core.decode_steps < 399


def test_a_late_answer_is_an_error_of_its_future(vlm: smolstack.VLM) -> None:
    vlm.eos_token_ids = ()
    with vlm.engine() as engine:
        late = engine.submit(vlm.request(text="Talk on.", max_new_tokens=400), seconds=0)
        with pytest.raises(DeadlineError):
            late.result()


def test_a_request_is_submitted_once_and_must_fit(vlm: smolstack.VLM) -> None:
    request = vlm.request(text="What?")
    with (
        vlm.engine(kv_cache_bytes=2000) as engine,
        pytest.raises(KVCacheError, match="2,000 are allowed"),
    ):
        engine.submit(request)
    with vlm.engine() as engine:
        request = vlm.request(text="What?", max_new_tokens=2)
        engine.submit(request)
        with pytest.raises(GenerationError, match="submitted before"):
            engine.submit(request)


@pytest.mark.parametrize("kind", ["vectors", "visual tokens"])
def test_a_request_that_is_not_for_an_answer_is_refused(vlm: smolstack.VLM, kind: Any) -> None:
    request = Request(vlm.processor.prepare("What?"), kind)
    expected = f"is for {kind}, expected one for an answer"
    with vlm.engine() as engine, pytest.raises(GenerationError, match=expected):
        engine.submit(request)
    assert not request.finished


def test_an_engine_that_is_left_by_an_error_gives_up_its_requests(vlm: smolstack.VLM) -> None:
    vlm.eos_token_ids = ()
    futures = []

    def leave() -> None:
        with vlm.engine() as engine:
            futures.append(engine.submit(vlm.request(text="Talk on.", max_new_tokens=450)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    with pytest.raises(QueueFullError, match="closed"):
        futures[0].result()


def test_many_threads_ask_at_once(
    vlm: smolstack.VLM, images: list[Image.Image], expected: list[tuple[int, ...]]
) -> None:
    def ask(number: int) -> tuple[int, ...]:
        which = number % len(images)
        if number % 2:
            return vlm.ask(images[which], "What?", **OPTIONS).token_ids
        stream = vlm.stream(images[which], "What?", **OPTIONS)
        assert "".join(stream).rstrip() == stream.answer.text
        return stream.answer.token_ids

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers == expected * 8


def test_a_stream_that_is_not_read_costs_no_work_and_closing_frees_it(vlm: smolstack.VLM) -> None:
    vlm.eos_token_ids = ()
    stream = vlm.stream(text="Talk on.", max_new_tokens=200)
    next(stream)
    core = vlm._inline.core
    before = core.decode_steps
    vlm.ask(text="Hello?", max_new_tokens=50)
    assert core.decode_steps == before + 49
    assert core.scheduler.reserved_bytes > 0
    stream.close()
    assert core.scheduler.reserved_bytes == 0
    assert list(stream) == []
    with pytest.raises(GenerationError, match="not complete"):
        _ = stream.answer


def test_an_interrupted_answer_leaves_the_engine_at_work(
    vlm: smolstack.VLM,
    images: list[Image.Image],
    expected: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(vlm.model), "decode_one_token", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vlm.ask(images[0], "What?", **OPTIONS)
    assert vlm._inline.core.idle
    assert vlm.ask(images[0], "What?", **OPTIONS).token_ids == expected[0]


def test_other_weights_read_a_prompt_anew(vlm: smolstack.VLM) -> None:
    """What was kept of a conversation was computed with the weights of its time."""
    question = "What is written here, in so many words, and what is it all about?"
    vlm.ask(text=question, **OPTIONS)
    with torch.no_grad():
        for layer in vlm.model.decoder.layers:
            layer.attention.value.weight.mul_(-1)  # type: ignore[union-attr,operator]
    changed = vlm.ask(text=question, **OPTIONS)
    vlm.clear_caches()
    assert changed.token_ids == vlm.ask(text=question, **OPTIONS).token_ids


def test_more_known_images_than_run_at_a_time_are_no_trouble(vlm: smolstack.VLM) -> None:
    image = Image.new("RGB", (40, 40), "teal")
    vlm.encode(image)
    requests = [Request(vlm.request(image, "?").prompt, "visual tokens") for _ in range(150)]
    vlm._inline.core.open_images(requests)
    vlm._inline.finish(requests)
    assert all(len(request.visual) == 1 for request in requests)


def test_a_request_that_found_no_room_may_be_submitted_again(tiny_vlm: smolstack.VLM) -> None:
    request = tiny_vlm.request(text="Hello", max_new_tokens=2)
    full = tiny_vlm.engine()
    full.close()
    with pytest.raises(QueueFullError):
        full.submit(request)
    with tiny_vlm.engine() as engine:
        assert engine.submit(request).result(30).usage.completion_tokens > 0


def test_nobody_waits_for_ever_for_an_engine_that_broke(
    tiny_vlm: smolstack.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = tiny_vlm.engine()
    scheduler = engine.core.scheduler
    plan = scheduler.schedule
    monkeypatch.setattr(scheduler, "schedule", lambda: plan() if scheduler.idle else 1 / 0)
    future = engine.submit(tiny_vlm.request(text="Hello", max_new_tokens=2))
    with pytest.raises(GenerationError, match="ZeroDivisionError"):
        future.result(30)
    with pytest.raises(QueueFullError):
        engine.submit(tiny_vlm.request(text="Hello", max_new_tokens=2))


@pytest.mark.parametrize("limits", [{"running": 1.5}, {"kv_cache_bytes": True}, {"queued": "x"}])
def test_limits_of_another_kind_are_refused(
    tiny_vlm: smolstack.VLM, limits: dict[str, Any]
) -> None:
    with pytest.raises(GenerationError, match="expected a whole number"):
        tiny_vlm.engine(**limits)


@pytest.mark.parametrize("seconds", [float("nan"), "soon"])
def test_a_deadline_is_a_number(tiny_vlm: smolstack.VLM, seconds: Any) -> None:
    with tiny_vlm.engine() as engine, pytest.raises(GenerationError, match="expected a number"):
        engine.submit(tiny_vlm.request(text="Hello"), seconds=seconds)
