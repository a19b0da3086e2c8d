"""Chat templates for bridged models: the family's, or a language model's with images added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolstack.errors import ConfigError, PromptError
from smolstack.processor.prompt import ChatTemplate, Markers, user_message

# The template of the published models, extended to accept contents that are strings.
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

# Put before a language model's template that expects strings as contents: joins the parts to one
# string, with a placeholder for each image.
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
    """Extend a language model's template to write a placeholder for each image.

    Templates that already do this are unchanged. Chats without images are rendered as before.
    """
    if _shows(source, special_tokens):
        return source
    # Jinja drops a newline after a block; before, the template did not begin after one.
    gap = "\n" if source.startswith("\n") else ""
    return f"{_PARTS_TO_STRINGS}{gap}{source}"


def check_template(source: str, special_tokens: Mapping[str, str], name: str) -> None:
    """Check that a template writes both the image and the question of a message.

    Raises:
        ConfigError: it does not; contains the rendered message.
        PromptError: it is not valid Jinja, or raises an error.
    """
    rendered = _render(source, special_tokens)
    if rendered.count(Markers.image) != 1 or _QUESTION not in rendered:
        raise ConfigError(
            f"{name} renders a message with an image and {_QUESTION!r} as {rendered!r:.200}, "
            f"expected one {Markers.image} and the question"
        )


def _shows(source: str, special_tokens: Mapping[str, str]) -> bool:
    try:
        rendered = _render(source, special_tokens)
        return rendered.count(Markers.image) == 1 and rendered.count(_QUESTION) == 1
    except PromptError:
        return False  # the template expects strings


def _render(source: str, special_tokens: Mapping[str, str]) -> str:
    asked: dict[str, Any] = user_message(1, _QUESTION)
    return ChatTemplate(source, special_tokens).render([asked])
