"""Loss is on the assistant's words and the end of its turn, whatever the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import chat, draw

import smolstack
from smolstack.errors import DataError
from smolstack.processor.processor import Processor
from smolstack.processor.prompt import ChatTemplate
from smolstack.train.data import Example
from smolstack.train.loss_mask import IGNORED, Supervisor, TokenizedExample
from smolstack.train.preview import mask_shown
from smolstack.vlm import VLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGED = {"role": "assistant", "content": [{"type": "image", "image": draw("8", 0)}]}


@pytest.fixture
def vlm(tiny_folder: Path) -> VLM:
    return smolstack.load(tiny_folder)


def supervise(
    vlm: VLM, messages: Any, template: str | None = None, **options: Any
) -> TokenizedExample:
    if template is not None:
        special = vlm.processor.tokenizer.special_tokens
        vlm.processor.template = ChatTemplate(template, special)
    supervisor = Supervisor(vlm.processor, vlm.eos_token_ids, tiling={"split": False}, **options)
    return supervisor(Example("the example", tuple(messages)))


def spans(tokenized: TokenizedExample, processor: Processor) -> list[str]:
    """The texts that contribute to the loss, span by span."""
    texts, span = [], []
    for label in [*tokenized.labels, IGNORED]:
        if label != IGNORED:
            span.append(label)
        elif span:
            texts.append(processor.tokenizer.decode(span, skip_special=False))
            span = []
    return texts


def conversation(*answers: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = chat(draw("7", 0), answers[0])["messages"]
    for answer in answers[1:]:
        messages.append({"role": "user", "content": "And then?"})
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("template", [None, CHATML], ids=["of the family", "chatml"])
def test_only_the_answers_and_their_ends_carry_loss(vlm: VLM, template: str | None) -> None:
    system = {"role": "system", "content": "You are brief."}
    tokenized = supervise(vlm, [system, *conversation("the answer", "no more")], template)
    space = " " if template is None else ""
    assert spans(tokenized, vlm.processor) == [
        f"{space}the answer<end_of_utterance>",
        f"{space}no more<end_of_utterance>",
    ]


def test_the_tokens_before_an_answer_are_those_of_the_prompt_when_asked(vlm: VLM) -> None:
    messages = conversation("the answer")
    tokenized = supervise(vlm, messages)
    start = next(i for i, label in enumerate(tokenized.labels) if label != IGNORED)
    asked = vlm.processor.prepare(messages[:-1], split=False)
    assert tokenized.token_ids[:start] == asked.token_ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # The prompt opens a thought that the whole chat does not have.
        (
            CHATML.replace("assistant\n{% endif", "assistant\nHm {% endif"),
            "renders a prompt that is not a prefix",
        ),
        (CHATML.replace("<end_of_utterance>", ""), "writes no end token"),
    ],
)
def test_a_template_that_hides_the_answers_place_is_refused(
    vlm: VLM, template: str, words: str
) -> None:
    with pytest.raises(DataError, match=f"the example: the chat template {words}"):
        supervise(vlm, conversation("the answer"), template)


def test_an_example_that_would_be_cut_is_refused_by_name(vlm: VLM) -> None:
    length = len(supervise(vlm, conversation("short")).token_ids)
    assert len(supervise(vlm, conversation("short"), max_tokens=length).token_ids) == length
    with pytest.raises(DataError, match=rf"{length} tokens \(4 of them visual\)"):
        supervise(vlm, conversation("short"), max_tokens=length - 1)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "Hi"}], "no assistant message"),
        ([{"role": "assistant", "content": "Hi"}], "begins with an assistant"),
        (chat(None, "x")["messages"], "image part without an image"),
        (chat("/no/such.png", "x")["messages"], "found no file"),
        (conversation("an <image> in words"), "<image> in the text of message 1"),
        (conversation("<end_of_utterance> too soon"), "<end_of_utterance> in its text"),
        ([*conversation("a"), {"role": "judge", "content": "b"}], "expected a role"),
        ([*conversation("a"), IMAGED], "image in an assistant"),
    ],
)  # fmt: skip
def test_chats_that_teach_nothing_are_refused_by_name(vlm: VLM, messages: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"the example.*{words}"):
        supervise(vlm, messages)


def test_the_mask_can_be_seen(vlm: VLM) -> None:
    tokenized = supervise(vlm, conversation("the answer"))
    shown = mask_shown(tokenized, vlm.processor).plain
    assert shown.endswith("\nAssistant:⟦ the answer<end_of_utterance>⟧\n")
    assert "<global-img><image>×4<fake_token_around_image>What does it say?" in shown
