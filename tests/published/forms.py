"""The form of the table of published checkpoints: templates, vocabularies, files that repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# Chat templates. Instruct models of the first generation filter, their bases call a method.
_TURN = (
    "{{% for message in messages %}}{{{{message['role']{upper}}}}}"
    "{{% if message['content'][0]['type'] == 'image' %}}{{{{':'}}}}"
    "{{% else %}}{{{{': '}}}}{{% endif %}}"
    "{{% for line in message['content'] %}}{{% if line['type'] == 'text' %}}{{{{line['text']}}}}"
    "{{% elif line['type'] == 'image' %}}{{{{ '<image>' }}}}{{% endif %}}{{% endfor %}}{end}\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'Assistant:' }}}}{{% endif %}}"
)
INSTRUCT_TEMPLATE = "<|im_start|>" + _TURN.format(upper=" | capitalize", end="<end_of_utterance>")
BASE_TEMPLATE = "<|im_start|>" + _TURN.format(upper=".capitalize()", end="<|endoftext|>")
IDEFICS3_TEMPLATE = "<|begin_of_text|>" + _TURN.format(
    upper=".capitalize()", end="<end_of_utterance>"
)
GRANITE_TEMPLATE = """{%- for message in messages -%}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'image' -%}
{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end_of_text|>
' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_of_role|>assistant' -}}
{%- if controls -%}{{- ' ' + controls | tojson() -}}{%- endif -%}
{{- '<|end_of_role|>' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with ids of their own; all other ids are ordinary.

    Attributes:
        size: rows of the embedding.
        ids: special tokens.
        digits: whether digits are split one by one before merging.
        add_bos: a token that the tokenizer itself puts before every text.
    """

    size: int
    ids: dict[str, int]
    digits: bool = False
    add_bos: str | None = None


@dataclass(frozen=True)
class Published:
    """One repository at one revision, or a variation that was found of it.

    Attributes:
        config, preprocessor, processor, generation, tokenizer: the JSON files; an empty one is
            not there.
        files: further text files by name.
        preset: smolstack's preset of this shape.
        head: "lm_head.weight", "tied" (no such tensor) or "linear" (a retrieval model's).
    """

    repository: str
    config: Json
    preprocessor: Json
    vocabulary: Vocabulary
    tokenizer: Json
    generation: Json = field(default_factory=dict)
    processor: Json = field(default_factory=dict)
    files: Mapping[str, str | Json] = field(default_factory=dict)
    preset: str | None = None
    head: str = "lm_head.weight"


def _grid(first: int, rows: int = 6, cols: int = 6) -> dict[str, int]:
    names = [f"<row_{r}_col_{c}>" for r in range(1, rows + 1) for c in range(1, cols + 1)]
    return {name: first + place for place, name in enumerate(names)}


_BASE_NAMES = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename>
<gh_stars> <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text>
<jupyter_code> <jupyter_output> <jupyter_script> <empty_output>"""
_BASE_TOKENS = {token: number for number, token in enumerate(_BASE_NAMES.split())}
SMOL = Vocabulary(
    49280,
    {
        **_BASE_TOKENS,
        "<global-img>": 49152,
        **_grid(49153),
        "<fake_token_around_image>": 49189,
        "<image>": 49190,
        **{f"<|reserved_special_token_{n}|>": 49191 + n for n in range(88)},
        "<end_of_utterance>": 49279,
    },
    digits=True,
)
SMOL_2B = Vocabulary(
    49155,
    {
        **_BASE_TOKENS,
        "<fake_token_around_image>": 49152,
        "<image>": 49153,
        "<end_of_utterance>": 49154,
    },
    digits=True,
)
LLAMA3 = Vocabulary(
    128259,
    {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        **{f"<|reserved_special_token_{n}|>": 128002 + n for n in range(4)},
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        **{f"<|reserved_special_token_{n + 5}|>": 128010 + n for n in range(246)},
        "<fake_token_around_image>": 128256,
        "<image>": 128257,
        "<end_of_utterance>": 128258,
    },
    add_bos="<|begin_of_text|>",
)
# Rows and columns up to 4×4 alone, here and there among the others; which id is whose is assumed.
GRANITE = Vocabulary(
    100352,
    {
        "<|end_of_text|>": 100257,
        "<|start_of_role|>": 100264,
        "<|end_of_role|>": 100265,
        "<global-img>": 100268,
        "<fake_token_around_image>": 100269,
        "<image>": 100270,
        **{
            f"<row_{r}_col_{c}>": 100290 + 7 * (r - 1) + c for r in range(1, 5) for c in range(1, 5)
        },
    },
)


def image_processor(family: str, longest: int, tile: int | None, **more: Any) -> Json:
    """preprocessor_config.json as transformers 4 writes it."""
    edges = {} if tile is None else {"max_image_size": {"longest_edge": tile}}
    return {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": f"{family}ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        **edges,
        "processor_class": f"{family}Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": longest},
        **more,
    }


def generation(bos: int, eos: int | list[int], pad: int, version: str = "4.46.0") -> Json:
    return {
        "_from_model_config": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "transformers_version": version,
    }


def tokenizer_config(family: str, bos: str, eos: str, pad: str, **more: Any) -> Json:
    return {
        "add_prefix_space": False,
        "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "legacy": False,
        "model_max_length": 16384,
        "pad_token": pad,
        "processor_class": f"{family}Processor",
        "tokenizer_class": "GPT2Tokenizer",
        "truncation_side": "left",
        "unk_token": "<|endoftext|>",
        **more,
    }
