"""The OpenAPI description is true enough to be fuzzed, and nothing that it allows is a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from tests.serve.conftest import Process, serving


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Process]:
    with serving("--max-new-tokens", "4", "--max-answers", "2") as server:
        yield server


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_request_is_a_server_error(fuzzed: Process, mode: Any) -> None:
    described: Any = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    asked = set()
    for found in described.get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing about it could be wrong

        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def no_server_error(case: Any) -> None:
            response = case.call(timeout=60)
            # A request may ask for a deadline that nobody could keep.
            assert response.status_code < 500 or response.status_code == 504, response.text

        no_server_error()
        asked.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/plan"} <= asked
    assert fuzzed.said == [], "the server logged an error"
