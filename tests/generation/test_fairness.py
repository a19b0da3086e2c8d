"""Whose turn it is: cheap requests before expensive ones, clients that had little before others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image

import smolstack
from smolstack.errors import GenerationError, QueueFullError
from smolstack.generation.costs import ClientUse, Costs
from smolstack.generation.engine import Engine
from smolstack.generation.options import read_options
from smolstack.generation.pools import RankedPool
from smolstack.generation.request import Request
from smolstack.generation.scheduler import SchedulerLimits


def made(
    vlm: smolstack.VLM, engine: Engine, text: str, images: Sequence[Any] = (), **options: Any
) -> Request:
    chosen = read_options(options, vlm.eos_token_ids)  # type: ignore[arg-type]
    (request,) = engine.core.requests([vlm.processor.prepare((images, text))], chosen)
    return request


def still(vlm: smolstack.VLM, **limits: Any) -> Engine:
    """An engine whose thread does not work, so that its queue can be looked at."""
    engine = Engine(vlm.model, vlm.processor, SchedulerLimits(**limits))
    engine.close()
    engine._closing = False
    return engine


def test_a_cheap_request_goes_first_and_an_expensive_one_gives_way(
    tiny_vlm: smolstack.VLM,
) -> None:
    engine = still(tiny_vlm, running=1, queued=1)
    scheduler = engine.core.scheduler
    long = [made(tiny_vlm, engine, "Tell all.", max_new_tokens=250) for _ in range(3)]
    for request in long[:2]:
        engine.enter([request], client="a")
    with pytest.raises(QueueFullError, match=r"0 answers .* 2 waiting.* 2"):
        engine.enter([long[2]], client="a")
    short = made(tiny_vlm, engine, "Hi.", max_new_tokens=2)
    engine.enter([short], client="a")
    assert [request.abort_error is None for request in long[:2]] == [True, False]
    for request in engine._inbox:
        engine.core.add(request)
    engine.core.remove_ended()
    assert scheduler.admit(0.0) == [short]


def test_a_client_that_had_much_waits_for_others(tiny_vlm: smolstack.VLM) -> None:
    engine = still(tiny_vlm, running=8)
    for _ in range(5):
        engine.enter([made(tiny_vlm, engine, "Again.", max_new_tokens=20)], client="much")
    engine.enter([made(tiny_vlm, engine, "Once.", max_new_tokens=20)], client="little")
    for request in engine._inbox:
        engine.core.add(request)
    engine.core.client_use.rank(engine.core.scheduler.waiting, time.monotonic())
    assert engine.core.scheduler.admit(0.0)[0].client == "little"


def test_a_client_that_had_much_does_not_displace_a_request_that_has_just_come(
    tiny_vlm: smolstack.VLM,
) -> None:
    engine = still(tiny_vlm, running=1, queued=1)
    for _ in range(9):
        request = made(tiny_vlm, engine, "Again.", max_new_tokens=20)
        with suppress(QueueFullError):
            engine.enter([request], client="much")
    once = made(tiny_vlm, engine, "Only once.", max_new_tokens=25)
    engine.enter([once], client="little")
    with pytest.raises(QueueFullError):
        engine.enter([made(tiny_vlm, engine, "Again.", max_new_tokens=20)], client="much")
    assert once.abort_error is None


def test_more_answers_at_once_than_may_wait_are_refused_for_good(tiny_vlm: smolstack.VLM) -> None:
    engine = still(tiny_vlm, running=1, queued=1)
    several = [made(tiny_vlm, engine, "Hi.", max_new_tokens=2) for _ in range(3)]
    with pytest.raises(GenerationError, match=r"3 answers .* 2 are accepted"):
        engine.enter(several, client="a")


def test_what_a_client_had_is_forgotten() -> None:
    client_use = ClientUse()
    client_use.charge("a", 8.0, 0.0)
    assert client_use.recent("a", 30.0) == pytest.approx(4.0)
    for number in range(5000):
        client_use.charge(str(number), 10.0, 100.0)
    assert client_use.recent("a", 100.0) == 0


def test_a_short_answer_does_not_wait_for_long_ones_to_end(tiny_vlm: smolstack.VLM) -> None:
    """They are preempted for it, go on afterwards, and say what they would have said."""
    alone = tiny_vlm.ask(None, "Tell all.", max_new_tokens=120, ignore_eos=True).token_ids
    engine = still(tiny_vlm, running=2)
    core, seconds = engine.core, [time.monotonic()]
    core.clock = lambda: seconds[0]
    long = [
        made(tiny_vlm, engine, "Tell all.", max_new_tokens=120, ignore_eos=True) for _ in range(3)
    ]
    short = [made(tiny_vlm, engine, f"{n}?", max_new_tokens=3, ignore_eos=True) for n in range(2)]
    for request in long:
        engine.enter([request], client="a")
        core.add(engine._inbox.pop())
    for _ in range(10):
        core.step()
    assert [request.stage for request in long] == ["decode", "decode", "waiting"]
    engine.enter(short[:1], client="a")
    core.add(engine._inbox.pop())
    core.step()
    assert short[0].stage == "waiting", "the long ones have had no turn yet"
    seconds[0] += 0.6
    for _ in range(4):
        core.step()
    assert short[0].finished
    assert sum(request.preempted for request in long) == 0
    engine.enter(short[1:], client="a")
    core.add(engine._inbox.pop())
    while not core.idle:
        core.step()
        assert sum(not each.held for each in core.scheduler.running) <= 2
        seconds[0] += 0.1
    assert [request.answered.token_ids for request in long] == [alone] * 3
    assert short[1].answered.usage.completion_tokens == 3


def test_a_preempted_answer_continues_while_another_one_waits_for_its_memory(
    tiny_vlm: smolstack.VLM,
) -> None:
    prompt = tiny_vlm.processor.prepare("Tell.")
    tokens = len(prompt.token_ids) + 100
    budget = (tokens + 40) * tiny_vlm.model.kv_bytes_per_token
    engine = still(tiny_vlm, running=1, kv_cache_bytes=budget, prefix_bytes=0)
    core, seconds = engine.core, [time.monotonic()]
    core.clock = lambda: seconds[0]

    def entered(number: int) -> Request:
        request = made(tiny_vlm, engine, "Tell.", max_new_tokens=number, ignore_eos=True)
        engine.enter([request], client="a")
        core.add(engine._inbox.pop())
        return request

    long = entered(100)
    core.step()
    seconds[0] += 1.0
    short = entered(2)
    core.step()
    assert long.preempted
    other = entered(90)  # has no room beside the long one
    other.urgency = other.rank = 0.0  # and is ahead of it
    for _ in range(400):
        if core.idle:
            break
        core.step()
        seconds[0] += 0.01
    assert [each.finished for each in (short, long, other)] == [True] * 3


def test_a_short_answer_displaces_a_long_one_that_has_waited_longer(
    tiny_vlm: smolstack.VLM,
) -> None:
    engine = still(tiny_vlm, running=1, queued=2)
    long = [made(tiny_vlm, engine, "Tell all.", max_new_tokens=250) for _ in range(3)]
    for request in long:
        engine.enter([request], client="a")
        request.urgency = request.rank = 0.0  # it came long ago
    with pytest.raises(QueueFullError):
        engine.enter([made(tiny_vlm, engine, "Me too.", max_new_tokens=200)], client="a")
    engine.enter([made(tiny_vlm, engine, "Hi.", max_new_tokens=2)], client="a")
    assert sum(isinstance(each.abort_error, QueueFullError) for each in long) == 1


def test_a_long_answer_does_not_displace_a_short_one_about_an_image(
    images: list[Image.Image],
) -> None:
    reader = smolstack.load()
    engine = still(reader, running=1, queued=1)
    engine.core.costs.tile, engine.core.costs.row = 0.1, 0.001
    short = made(reader, engine, "Hi.", images=images[:1], max_new_tokens=2)
    engine.enter([short], client="a")
    engine.enter([made(reader, engine, "One.", max_new_tokens=2000)], client="a")
    with pytest.raises(QueueFullError):
        engine.enter([made(reader, engine, "Me too.", max_new_tokens=2000)], client="a")
    assert short.abort_error is None


def test_equal_answers_do_not_preempt_each_other(tiny_vlm: smolstack.VLM) -> None:
    engine = still(tiny_vlm, running=1)
    core, seconds = engine.core, [time.monotonic()]
    core.clock = lambda: seconds[0]
    equal = [made(tiny_vlm, engine, "Tell.", max_new_tokens=9, ignore_eos=True) for _ in range(3)]
    for request in equal:
        engine.enter([request], client="a")
        core.add(engine._inbox.pop())
    ended: list[Request] = []
    while not core.idle:
        core.step()
        seconds[0] += 1.0
        assert not any(request.preempted for request in equal)
        ended += [request for request in equal if request.finished and request not in ended]
    assert ended == equal


def test_the_first_token_of_a_client_that_had_little_does_not_wait_for_one_that_had_much(
    tiny_vlm: smolstack.VLM,
) -> None:
    engine = still(tiny_vlm, running=1)
    core, seconds = engine.core, [time.monotonic()]
    core.clock = lambda: seconds[0]
    much, little = (made(tiny_vlm, engine, "Tell.", max_new_tokens=9) for _ in range(2))
    core.client_use.charge("much", 100.0, time.monotonic())
    for request, client in ((much, "much"), (little, "little")):
        engine.enter([request], client=client)
        core.add(engine._inbox.pop())
        core.step()
        seconds[0] += 1.0
    core.step()
    assert much.preempted
    assert not little.preempted


def test_a_pass_over_few_tokens_does_not_make_tokens_expensive() -> None:
    costs = Costs()
    for _ in range(1000):
        costs.measured("token", 1, 0.01)
        costs.measured("row", 1, 0.01)
    assert costs.token == pytest.approx(0.01 / 64)
    assert costs.row == pytest.approx(0.01 / 4)


def test_each_different_prompt_of_a_request_costs_its_own_work(tiny_vlm: smolstack.VLM) -> None:
    core = still(tiny_vlm).core
    prompts = [tiny_vlm.processor.prepare(((), text)) for text in ("Hi.", "And this?")]
    first, again, other = (
        Request(prompt, "vectors") for prompt in (prompts[0], prompts[0], prompts[1])
    )
    alone = core.costs.estimate([first])
    assert core.costs.estimate([first, again]) == alone
    assert core.costs.estimate([first, again, other]) == pytest.approx(
        alone + core.costs.estimate([other])
    )


def test_without_clients_requests_have_their_turn_as_they_came(tiny_vlm: smolstack.VLM) -> None:
    engine = still(tiny_vlm, running=8)
    texts = ["A long one? " * 20, "Hi.", "And this?"]
    requests = [made(tiny_vlm, engine, text, max_new_tokens=30) for text in texts]
    engine.enter(requests)
    for request in engine._inbox:
        engine.core.add(request)
    assert engine.core.scheduler.admit(0.0) == requests


def test_answers_whose_forms_take_long_take_turns(tiny_vlm: smolstack.VLM) -> None:
    engine = still(tiny_vlm, running=8)
    requests = [made(tiny_vlm, engine, f"{n}?", max_new_tokens=30) for n in range(6)]
    scheduler = engine.core.scheduler
    for request in requests:
        engine.core.add(request)
    scheduler.admit(0.0)
    for request in requests:
        request.stage = "decode"
    for request in requests[:5]:
        request.own_seconds = 0.03
    seen: list[set[Request]] = []
    for turn in range(1, 6):
        plan = scheduler.schedule()
        assert requests[5] in plan.decode
        for request in plan.decode:
            request.turn = turn
        seen.append(set(plan.decode) - {requests[5]})
    assert all(len(each) == 1 for each in seen)
    assert set.union(*seen) == set(requests[:5])


def test_answers_do_not_depend_on_their_rank(tiny_vlm: smolstack.VLM) -> None:
    images = [Image.new("RGB", (300, 200 + n), (n * 40, 90, 120)) for n in range(4)]
    expected = [tiny_vlm.ask(image, "What?", max_new_tokens=12).token_ids for image in images]
    with tiny_vlm.engine(running=2) as engine:
        futures = []
        for number, image in enumerate(images):
            request = tiny_vlm.request(image, "What?", max_new_tokens=12)
            done = threading.Event()
            request.listener = lambda update, done=done: (
                done.set() if update.answer or update.error else None
            )
            engine.enter([request], client=str(number % 2))
            futures.append((request, done))
        for _, done in futures:
            assert done.wait(60)
    assert [request.answered.token_ids for request, _ in futures] == expected


def test_heavy_work_leaves_a_thread_for_light_work() -> None:
    pool, gate, order = RankedPool(2, 1, "test"), threading.Event(), list[int]()
    blocked = [pool.rank(lambda: gate.wait(60), 0.0, heavy=True) for _ in range(3)]
    assert pool.rank(lambda: 5, 100.0).result(60) == 5
    gate.set()
    assert [each.result(60) for each in blocked] == [True] * 3
    first, second = threading.Event(), threading.Event()
    held = [pool.submit(each.wait, 60) for each in (first, second)]
    later = [pool.rank(lambda n=n: order.append(n), float(n)) for n in (3, 1, 2)]  # type: ignore[misc]
    first.set()
    for each in later:
        each.result(60)
    assert order == [1, 2, 3]
    second.set()
    assert all(each.result(60) for each in held)
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(int)
