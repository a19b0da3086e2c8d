"""Chat templates for bridged models: the family's, or a language model's own with images in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolstack.errors import ConfigError, PromptError
from smolstack.processor.prompt import ChatTemplate, Markers, user_message

# The published family's, which drops contents that are strings; this one takes both forms.
FAMILY_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{{- message['role'] | capitalize }}
{%- if message['content'] is string %}
{{- ': ' + message['content'] }}
{%- else %}
{{- ':' if message['content'][0]['type'] == 'image' else ': ' }}
{%- for part in message['content'] %}
{{- '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor %}
{%- endif %}
{{- '<end_of_utterance>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""

# Put before a language model's own template, whose messages have strings for contents: parts
# become one string in which every image is a placeholder.
_PARTS_TO_STRINGS = """{%- set bridged = namespace(messages=[], text='') %}
{%- for message in messages %}
{%- if message['content'] is string or message['content'] is not iterable %}
{%- set bridged.messages = bridged.messages + [message] %}
{%- else %}
{%- set bridged.text = '' %}
{%- for part in message['content'] %}
{%- set bridged.text = bridged.text + ('<image>' if part['type'] == 'image' else part['text']) %}
{%- endfor %}
{%- set bridged.messages = bridged.messages + [dict(message, content=bridged.text)] %}
{%- endif %}
{%- endfor %}
{%- set messages = bridged.messages %}"""
_QUESTION = "What does it say?"


def with_images(source: str, special_tokens: Mapping[str, str]) -> str:
    """A language model's template, taught to write a placeholder for every image.

    One that does so already stays as it is. Chats without images read as they did.
    """
    if _shows(source, special_tokens):
        return source
    # A newline after a block is dropped, and this one was not after a block before.
    gap = "\n" if source.startswith("\n") else ""
    return f"{_PARTS_TO_STRINGS}{gap}{source}"


def check_template(source: str, special_tokens: Mapping[str, str], name: str) -> None:
    """Refuse a template that loses an image or the words about it.

    Raises:
        ConfigError: with what a message of one image and a question became.
        PromptError: it is no Jinja, or refuses such a message.
    """
    rendered = _render(source, special_tokens)
    if rendered.count(Markers.image) != 1 or _QUESTION not in rendered:
        raise ConfigError(
            f"{name} makes {rendered!r:.200} of a message of an image and {_QUESTION!r}, expected "
            f"one {Markers.image} and the question"
        )


def _shows(source: str, special_tokens: Mapping[str, str]) -> bool:
    try:
        rendered = _render(source, special_tokens)
        return rendered.count(Markers.image) == 1 and rendered.count(_QUESTION) == 1
    except PromptError:
        return False  # it expects strings


def _render(source: str, special_tokens: Mapping[str, str]) -> str:
    asked: dict[str, Any] = user_message(1, _QUESTION)
    return ChatTemplate(source, special_tokens).render([asked])
