"""Other clients, unmodified and in their default modes, against a real server."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from tests.serve.conftest import Process
from tests.serve.test_chat import MODEL, asking


class Reading(BaseModel):
    """What stands on a sign."""

    number: int = Field(ge=0, le=9999)
    kind: Literal["number", "word"]


def test_instructor_asks_by_a_function(server: Process, number: str) -> None:
    instructor = pytest.importorskip("instructor")
    with server.client() as client:
        found: Any = instructor.from_openai(client).chat.completions.create(
            model=MODEL, messages=asking(number), response_model=Reading
        )
    assert isinstance(found, Reading)


def test_pydantic_ai_asks_by_a_function(server: Process, number: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    model = models.OpenAIChatModel(MODEL, provider=provider)
    agent = ai.Agent(model, output_type=Reading)
    image = ai.BinaryContent.from_data_uri(number)
    assert isinstance(agent.run_sync(["What does it say?", image]).output, Reading)


def test_langchain_gets_an_object_by_its_default_and_by_a_function(
    server: Process, number: str
) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key="none")
    for method in ({}, {"method": "function_calling"}):
        found = model.with_structured_output(Reading, **method).invoke(asking(number))
        assert isinstance(found, Reading), method
    bound = model.bind_tools([Reading], tool_choice="any")
    said = bound.invoke(asking(number))
    assert said.tool_calls[0]["name"] == "Reading"
    streamed = None
    for chunk in bound.stream(asking(number)):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == said.tool_calls[0]["args"]


def test_pydantic_ai_and_langchain_by_responses(server: Process, number: str, says: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    model = models.OpenAIResponsesModel(MODEL, provider=provider)
    asked = ["What does it say?", ai.BinaryContent.from_data_uri(number)]
    assert isinstance(ai.Agent(model, output_type=Reading).run_sync(asked).output, Reading)
    said = ai.Agent(model).run_sync(asked)
    assert said.output == says
    again = ai.Agent(model).run_sync("And now?", message_history=said.all_messages())
    assert isinstance(again.output, str)

    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key="none", use_responses_api=True
    )
    assert chat.invoke(asking(number)).text == says
    assert "".join(chunk.text for chunk in chat.stream(asking(number))) == says
    assert isinstance(chat.with_structured_output(Reading).invoke(asking(number)), Reading)
    [call] = chat.bind_tools([Reading], tool_choice="any").invoke(asking(number)).tool_calls
    assert call["name"] == "Reading"
