"""Vectors of a retrieval model, by the openai client as it is installed."""

from __future__ import annotations

import io
from collections.abc import Iterator
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


def test_the_openai_client_reads_lists(retrieval: Process) -> None:
    with retrieval.client() as client:
        made = client.embeddings.create(model="tiny", input="a query", encoding_format="float")
    assert isinstance(made, openai.types.CreateEmbeddingResponse)
