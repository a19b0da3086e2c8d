"""Chats become the same text and the same token ids as through transformers' processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.published.forms import GRANITE_TEMPLATE

import smolstack
from smolstack.checkpoint.new import random_model, side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import load_processor
from smolstack.processor.prompt import split_messages

WIDE, TALL, SQUARE = (Image.new("RGB", size, "teal") for size in ((90, 30), (20, 64), (50, 50)))
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3 = SMOLVLM.replace("<|im_start|>", "<|begin_of_text|>").replace(
    "message['role'] | capitalize", "message['role'].capitalize()"
)
WITHOUT_BOS = IDEFICS3.replace("<|begin_of_text|>", "")
ODD = """{{ bos_token }}
    {% set kept = messages | selectattr('role', 'ne', 'system') | list %}
    {% for message in kept %}
        {% if loop.index > 9 %}{% break %}{% endif %}
        {{ message.role }} {{ message.content | length | tojson }}:
        {% for part in message.content %}
            {% if part.type == 'image' %}<image>{% else %}{{ part.text | trim | tojson }}{% endif %}

        {% endfor %}
        {% generation %}{{ eos_token }}{% endgeneration %}
    {% endfor %}
    {% if add_generation_prompt %}assistant{% endif %}
"""
# A shape for each kind of vocabulary, with the templates it is published or used with.
CASES = [
    ("smolvlm-256m", SMOLVLM),
    ("smolvlm2-256m", SMOLVLM),
    ("smolvlm-2.2b", SMOLVLM),
    ("smolvlm2-2.2b", ODD),
    ("idefics3-8b", IDEFICS3),
    ("idefics3-8b", WITHOUT_BOS),
    ("idefics3-8b", ODD),
    ("granite-docling-258m", GRANITE_TEMPLATE),
]


def _user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [_part(part) for part in parts]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part}


def _say(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [_part(text)]}


CHATS: dict[str, list[dict[str, Any]]] = {
    "an image": [_user(WIDE, "What does it say?")],
    "the question first": [_user("What does it say?\n\n", TALL)],
    "several images": [_user(WIDE, TALL, "Compare them.", SQUARE, " And this?")],
    "images in two turns": [
        _user(WIDE, "What is this?"),
        _say("assistant", "A wide one."),
        _user("And this: ", TALL),
        _say("assistant", "A tall one.\n"),
        _user("Why?"),
    ],
    "a system message": [_say("system", "Answer in one word."), _user(SQUARE, "Colour?")],
    "text alone": [_user("There is nothing here.")],
    "other scripts": [_user(WIDE, "¿Qué dice? 写了什么？ 🙂\n\n\tä")],
    "markers in the text": [_user(WIDE, "the row <row_1_col_1> and <global-img>")],
    "an open answer": [_user(WIDE, "Read."), _say("assistant", "It says")],
}


def _folder(shape: str, template: str, parent: Path, place: str = "chat_template.jinja") -> Path:
    preset = miniature(PRESETS[shape], layers=1)
    files = side_files(preset, preset.config)
    for name in ("chat_template.json", "chat_template.jinja"):
        del files[name]
    tokenizer = json.loads(files["tokenizer_config.json"])
    del tokenizer["chat_template"]
    if place == "chat_template.jinja":
        files[place] = template.encode()
    elif place == "chat_template.json":
        files[place] = json.dumps({"chat_template": template}).encode()
    else:
        tokenizer["chat_template"] = template
        if place == "a list in tokenizer_config.json":
            other = {"name": "tool_use", "template": "no"}
            tokenizer["chat_template"] = [other, {"name": "default", "template": template}]
    files["tokenizer_config.json"] = json.dumps(tokenizer).encode()
    return save_checkpoint(parent / "model", random_model(preset.config), files)


def _assert_same(folder: Path, chats: list[list[dict[str, Any]]], splits: list[bool]) -> None:
    vlm = smolstack.load(folder)
    theirs = load_processor(folder, vlm.config.model_type)
    if theirs.chat_template is None:
        # transformers' processors do not look for a template where tokenizers keep it.
        theirs.chat_template = theirs.tokenizer.get_chat_template()
    for chat in chats:
        plain, _ = split_messages(chat)
        for answer_next in (True, False):
            assert vlm.processor.render(
                plain, answer_next=answer_next
            ) == theirs.apply_chat_template(chat, add_generation_prompt=answer_next)
        for split in splits:
            expected = theirs.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"do_image_splitting": split},
            )["input_ids"][0]
            assert list(vlm.processor.prepare(chat, split=split).token_ids) == expected


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_chat_becomes_the_same_tokens(case: int, tmp_path: Path) -> None:
    _assert_same(_folder(*CASES[case], tmp_path), list(CHATS.values()), [True, False])


@pytest.mark.parametrize(
    "place", ["chat_template.json", "tokenizer_config.json", "a list in tokenizer_config.json"]
)
@pytest.mark.parametrize("shape", ["smolvlm-256m", "idefics3-8b"])
def test_the_template_is_found_wherever_it_is_kept(shape: str, place: str, tmp_path: Path) -> None:
    folder = _folder(shape, "{{ bos_token }}Here." + SMOLVLM, tmp_path, place)
    _assert_same(folder, [CHATS["several images"]], [False])


def test_a_text_given_as_a_string_renders_alike(tmp_path: Path) -> None:
    folder = _folder("granite-docling-258m", GRANITE_TEMPLATE, tmp_path)
    chat = [
        {"role": "system", "content": "Be brief."},
        _user(WIDE, "Convert this page to docling."),
        {"role": "assistant", "content": "<doctag>"},
        {"role": "user", "content": "Go on."},
    ]
    _assert_same(folder, [chat], [False])


def test_a_beginning_token_is_added_once(tmp_path: Path) -> None:
    for number, template in enumerate((IDEFICS3, WITHOUT_BOS)):
        vlm = smolstack.load(_folder("idefics3-8b", template, tmp_path / str(number)))
        bos = vlm.processor.tokenizer.token_id("<|begin_of_text|>")
        ids = vlm.processor.prepare([_user("Why?")]).token_ids
        assert ids.count(bos or 0) == 1
        assert ids[0] == bos


def test_rows_and_columns_are_plain_text_where_the_vocabulary_lacks_them(tmp_path: Path) -> None:
    vlm = smolstack.load(_folder("smolvlm-2.2b", SMOLVLM, tmp_path))
    assert vlm.processor.tokenizer.token_id("<row_1_col_1>") is None
    prompt = vlm.processor.prepare([_user(WIDE, "Read.")], split=True)
    visual = sum(plan.visual_tokens for plan in prompt.plans)
    assert prompt.token_ids.count(vlm.config.image_token_id) == visual
    assert len(prompt.token_ids) > visual + prompt.plans[0].tiles * 5
