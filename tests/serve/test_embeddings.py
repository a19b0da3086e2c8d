"""Vectors of a retrieval model, by the openai client as it is installed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from tests.serve.conftest import Process, data_url, serving
from tests.serve.test_refusals import message

import smolstack
from smolstack.generation.request import Request, Update
from smolstack.generation.scheduler import SchedulerLimits
from smolstack.retrieval import query_prompts
from smolstack.serve import request_reader
from smolstack.serve.server import Server
from smolstack.serve.settings import ServerSettings

ELSEWHERE = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}


@pytest.fixture(scope="module")
def retrieval(retrieval_folder: Path) -> Iterator[Process]:
    with serving("--model", str(retrieval_folder), "--name", "tiny") as process:
        yield process


@pytest.fixture(scope="module")
def page() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (90, 60), (200, 30, 60)).save(held, "PNG")
    return held.getvalue()


def test_pages_and_queries_are_those_of_the_library(
    retrieval: Process, retrieval_folder: Path, page: bytes
) -> None:
    ours = smolstack.load(retrieval_folder)
    items: Any = ["profit", {"type": "image_url", "image_url": {"url": data_url(page)}}]
    with retrieval.client() as client:
        made: Any = client.embeddings.create(model="tiny", input=items)
    assert [one.index for one in made.data] == [0, 1]
    expected = [*ours.embed_queries(["profit"]), *ours.embed_pages(page)]
    for one, vectors in zip(made.data, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.embedding), vectors, atol=1e-5, rtol=1e-5)
    assert made.usage.prompt_tokens == sum(len(vectors) for vectors in expected)


def test_each_model_does_what_it_can(retrieval: Process, server: Process) -> None:
    asked = {"messages": [{"role": "user", "content": "?"}]}
    response = httpx.post(f"{retrieval.url}/v1/chat/completions", json=asked, timeout=60)
    assert response.status_code == 400
    assert "embedding head" in message(response)
    response = httpx.post(f"{server.url}/v1/embeddings", json={"input": "?"}, timeout=60)
    assert response.status_code == 400
    assert "has a language head, expected a retrieval model" in message(response)


@pytest.mark.parametrize("wrong", [[], [3], "", [{"type": "text", "text": "?"}]], ids=str)
def test_what_is_no_page_and_no_query(retrieval: Process, wrong: Any) -> None:
    response = httpx.post(f"{retrieval.url}/v1/embeddings", json={"input": wrong}, timeout=60)
    assert response.status_code == 400
    assert "input" in message(response)


def test_of_several_pages_the_damaged_one_is_named(retrieval: Process, page: bytes) -> None:
    pages = [
        {"type": "image_url", "image_url": {"url": data_url(each)}} for each in (page, page[:-30])
    ]
    asked = {"input": ["profit", *pages]}
    response = httpx.post(f"{retrieval.url}/v1/embeddings", json=asked, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input.2.image_url"
    assert message(response).startswith("input.2.image_url: image of ")


def test_the_openai_client_reads_lists(retrieval: Process) -> None:
    with retrieval.client() as client:
        made = client.embeddings.create(model="tiny", input="a query", encoding_format="float")
    assert isinstance(made, openai.types.CreateEmbeddingResponse)


@pytest.fixture(scope="module")
def retrieval_vlm(retrieval_folder: Path) -> smolstack.VLM:
    return smolstack.load(retrieval_folder)


@pytest.fixture
def small(retrieval_vlm: smolstack.VLM) -> Iterator[Server]:
    """A server with one slot, a queue of one, and a limit of prompt tokens."""
    limits = SchedulerLimits(running=1, queued=1)
    settings = ServerSettings(scheduler=limits, prompt_tokens=100, allow_remote_images=True)
    server = Server(retrieval_vlm, settings)
    yield server
    server.close()


async def post(server: Server, path: str, body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json=body)


async def embed(server: Server, *inputs: Any) -> list[httpx.Response]:
    """Send a request for each input, all at the same time."""
    return await asyncio.gather(*(post(server, "/v1/embeddings", {"input": x}) for x in inputs))


def waiting(server: Server, text: str) -> Request:
    """A request that waits in the engine's queue."""
    templates = server.vlm.retrieval_prompts
    (prompt,) = query_prompts(server.vlm.processor, [text], templates.query)
    request = Request(prompt, "vectors")
    request.paused = True
    return request


def end_soon(server: Server) -> None:
    server.handler.settings = replace(server.settings, deadline=0.05)


def test_at_the_limit_of_the_queue_the_client_is_told_when_to_come_again(small: Server) -> None:
    small.engine.enter([waiting(small, "profit") for _ in range(2)])
    (response,) = asyncio.run(embed(small, "profit"))
    assert response.status_code == 429
    assert message(response) == "0 answers are running and 2 waiting, the limit is 2"
    assert response.headers["Retry-After"] == "2"


def test_a_cheap_request_displaces_an_expensive_one(small: Server) -> None:
    heard: list[Update] = []
    for text in ("profit " * 20, "loss " * 20):
        expensive = waiting(small, text)
        expensive.listener = heard.append
        small.engine.enter([expensive], client="another")
    (response,) = asyncio.run(embed(small, "a"))
    assert response.status_code == 200
    (update,) = heard
    assert "displaced by cheaper ones" in str(update.error)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": [ELSEWHERE]}),
        ("/tokenize", {"messages": [{"role": "user", "content": [ELSEWHERE]}]}),
        ("/plan", {"image_url": ELSEWHERE["image_url"]}),
    ],
    ids=["embeddings", "tokenize", "plan"],
)
def test_requests_being_read_are_limited_in_number_and_time(
    small: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    small.handler.read_limiter.limit = 1
    fetching = asyncio.Event()

    async def fetch(*_: Any, **__: Any) -> bytes:
        fetching.set()
        await asyncio.Event().wait()  # for ever
        raise AssertionError

    async def second() -> httpx.Response:
        first = asyncio.ensure_future(post(small, path, body))
        await fetching.wait()
        response = await post(small, path, body)
        first.cancel()
        return response

    monkeypatch.setattr(request_reader, "fetch", fetch)
    refused = asyncio.run(second())
    assert refused.status_code == 429
    assert message(refused) == "1 other requests are being read"
    assert refused.headers["Retry-After"] == "1"
    end_soon(small)
    late = asyncio.run(post(small, path, body))
    assert late.status_code == 504
    assert message(late) == "the deadline passed while the request was being read"


def test_a_request_that_waits_too_long_ends_at_its_deadline(small: Server) -> None:
    small.engine.core.scheduler.kv_budget = -1  # no request starts
    end_soon(small)
    (response,) = asyncio.run(embed(small, "profit"))
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline"
    assert message(response) == "the deadline passed before the embedding was complete"


def test_a_query_too_long_and_an_empty_one_are_named(small: Server) -> None:
    words = "profit and loss and " * 40
    long, empty = asyncio.run(embed(small, words, ["profit", "  "]))
    assert "at most 100 are accepted" in message(long)
    assert message(empty) == "input.1 is '  ', expected non-empty text"
    assert (long.status_code, empty.status_code) == (400, 400)
