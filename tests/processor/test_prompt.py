"""Prompts: placeholders, chats, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from smolstack.errors import PromptError
from smolstack.processor.geometry import TilePlan
from smolstack.processor.prompt import (
    ChatTemplate,
    Markers,
    expand_placeholders,
    split_messages,
    user_message,
)

MARKERS = Markers(image="<i>", around="<f>", whole="<g>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<i>' }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def plan(rows: int, cols: int, tokens: int = 2) -> TilePlan:
    return TilePlan((9, 9), (9, 9), (9, 9), rows, cols, 9, tokens)


def test_a_single_tile_stands_between_markers() -> None:
    assert MARKERS.expand(plan(0, 0)) == "<f><g><i><i><f>"


def test_a_grid_is_announced_row_by_row_and_the_whole_follows() -> None:
    assert MARKERS.expand(plan(2, 2, tokens=1)) == (
        "<f><row_1_col_1><i><f><row_1_col_2><i>\n"
        "<f><row_2_col_1><i><f><row_2_col_2><i>\n"
        "\n<f><g><i><f>"
    )


def test_adjacent_images_keep_their_order() -> None:
    text = expand_placeholders("a<i><i>b", [plan(0, 0, 1), plan(0, 0, 2)], MARKERS)
    assert text == "a<f><g><i><f><f><g><i><i><f>b"


@pytest.mark.parametrize(("prompt", "plans"), [("a", 1), ("<i><i>", 1), ("<i>", 0)])
def test_placeholders_and_images_must_match(prompt: str, plans: int) -> None:
    with pytest.raises(
        PromptError, match=rf"has {prompt.count('<i>')} <i> placeholders for {plans}"
    ):
        expand_placeholders(prompt, [plan(0, 0)] * plans, MARKERS)


def test_a_question_puts_its_images_first() -> None:
    assert ChatTemplate(TEMPLATE, {}).render([user_message(2, "Why?")]) == (
        "User:<i><i>Why?|Assistant:"
    )


def test_a_chat_keeps_images_in_any_turn() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "path": "a.png"}]},
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And this?"},
                {"type": "image", "image": b"bytes"},
            ],
        },
    ]
    messages, images = split_messages(chat)
    assert images == ["a.png", b"bytes"]
    assert ChatTemplate(TEMPLATE, {}).render(messages) == (
        "System:Be brief.|User:<i>|Assistant:A cat.|User:And this?<i>|Assistant:"
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ([{"content": "hi"}], "message 0"),
        ([{"role": "robot", "content": "hi"}], "expected a role of"),
        ([{"role": "user", "content": []}], "expected text or parts"),
        ([{"role": "user", "content": [{"type": "video"}]}], "expected text or image"),
        (["hello"], "message 0"),
    ],
)
def test_malformed_chats_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        split_messages(messages)


def test_templates_may_use_special_tokens_json_and_refuse_messages() -> None:
    template = "{{ bos_token }}{{ {'a': '<ü>'} | tojson }}{% generation %}x{% endgeneration %}"
    assert ChatTemplate(template, {"bos_token": "<s>"}).render([]) == '<s>{"a": "<ü>"}x'
    with pytest.raises(PromptError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])


def test_a_hostile_template_runs_in_a_sandbox() -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(PromptError, match="refused the messages"):
        ChatTemplate(attack, {}).render([])
    with pytest.raises(PromptError, match="is not valid Jinja"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    ("template", "operator"),
    [
        ('{{ "x" * 10**10 }}', "*"),
        ('{{ "x" * 1000 * 1000 * 1000 }}', "*"),
        ("{{ [1] * 10**10 }}", "*"),
        ("{{ 10**10**10 }}", "**"),
        ('{{ "%9999999999d" % 1 }}', "%"),
    ],
)
def test_an_operator_of_a_template_makes_no_gigabytes(template: str, operator: str) -> None:
    """Reading such a template took minutes, since Jinja computes constants when it compiles."""
    read = ChatTemplate(template, {})
    with pytest.raises(PromptError) as refused:
        read.render([])
    assert str(refused.value).endswith(f"the result of {operator} is too long")


def test_small_results_of_operators_are_computed() -> None:
    template = '{{ "-" * 20 }}{{ 7 % 3 }}{{ 3 * 4 }}{{ 2**3 }}{{ "%s!" % "a" }}'
    assert ChatTemplate(template, {}).render([]) == "--------------------1128a!"
