"""How the server begins and ends: ports in use, SIGTERM, answers that outlast the drain."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serve.conftest import Process, serving
from tests.serve.test_refusals import LONG, message, post

import smolstack
from smolstack.errors import ImageError
from smolstack.serve.server import Server
from smolstack.serve.settings import ServerSettings

ENDLESS = {**LONG, "max_tokens": 800, "regex": "(a|b)*c{900}"}


def test_sigterm_lets_answers_finish(tiny_folder: Any) -> None:
    with serving("--model", str(tiny_folder)) as server:
        response: list[httpx.Response] = []
        asker = threading.Thread(target=lambda: response.append(post(server, LONG)))
        asker.start()
        asking = True
        while server.metric("decode_steps_total") < 1:  # only grows, so it cannot be missed
            assert asking, "the question ended before it was answered"
            asking = asker.is_alive()
        assert server.stop() == 0
        asker.join(30)
    assert response[0].status_code == 200
    assert response[0].json()["usage"]["completion_tokens"] == 300


def test_an_answer_that_outlasts_the_drain_ends_with_an_error(tiny_folder: Any) -> None:
    with (
        serving("--model", str(tiny_folder), "--drain", "0.01") as server,
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(post, server, {**ENDLESS, "stream": s}) for s in (False, True)]
        long = {"input": "?", "max_output_tokens": 800, "regex": ENDLESS["regex"], "stream": True}
        asked.append(pool.submit(post, server, long, route="responses"))
        while server.metric("decode_steps_total") < 3 or server.metric("running") < 3:
            assert not all(each.done() for each in asked), "answered before it could be stopped"
        assert server.stop() == 0
        whole, streamed, response = (each.result() for each in asked)
        assert server.said == []
    assert whole.status_code == 503
    assert "shutting down" in message(whole)
    assert streamed.status_code == 200
    assert "shutting down" in streamed.text.rstrip().rpartition("\n")[2]
    name, last = response.text.rstrip().split("\n")[-2:]
    assert name == "event: response.failed"
    told = json.loads(last.removeprefix("data: "))["response"]
    assert (told["status"], told["error"]["code"]) == ("failed", "server_error")
    assert "shutting down" in told["error"]["message"]


def test_a_model_that_was_served_behaves_as_before(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    for path in (red, blue):
        Image.new("RGB", (90, 60), path.stem).save(path)
    cache, text = tiny_vlm.image_cache, "<|im_start|>"
    before = tiny_vlm.ask(red, text, max_new_tokens=2)
    max_bytes, prompt_tokens = cache.max_bytes, before.usage.prompt_tokens
    server = Server(
        tiny_vlm,
        ServerSettings(decode_bytes=100, image_cache_bytes=0, special_tokens_in_text=False),
    )
    assert len(cache) == 0
    with pytest.raises(ImageError, match="more than the 100 that are allowed"):
        tiny_vlm.ask(blue, text, max_new_tokens=2)
    server.close()
    after = tiny_vlm.ask(blue, text, max_new_tokens=2)
    assert after.usage.prompt_tokens == prompt_tokens
    assert (len(cache), cache.max_bytes) == (1, max_bytes)
    tiny_vlm.processor.special_tokens_in_text = False
    server.close()  # again, as when a server has ended by itself
    assert not tiny_vlm.processor.special_tokens_in_text
    tiny_vlm.processor.special_tokens_in_text = True


def test_a_port_in_use_is_told_before_anything_is_loaded(server: Process) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1 port {port}"):
        Process("--port", port)
