"""Presets, and what ``smolstack new`` writes of them, are what is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.published.checkpoints import LANGUAGE_MODELS, RETRIEVAL_MODELS
from tests.published.forms import GRANITE, Published

from smolstack.checkpoint.defaults import derive_image
from smolstack.checkpoint.new import new_checkpoint, side_files
from smolstack.config import ModelConfig
from smolstack.family import PRESETS, Preset
from smolstack.interop.miniature import miniature
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import named_tokens

PUBLISHED = [one for one in (*LANGUAGE_MODELS, *RETRIEVAL_MODELS) if one.preset is not None]


def test_every_preset_has_its_published_files() -> None:
    assert {one.preset for one in PUBLISHED} == set(PRESETS)


@pytest.fixture(params=PUBLISHED, ids=lambda one: one.repository)
def published(request: pytest.FixtureRequest) -> Published:
    chosen: Published = request.param
    return chosen


@pytest.fixture
def preset(published: Published) -> Preset:
    return PRESETS[str(published.preset)]


def test_its_config_has_the_published_sizes(published: Published, preset: Preset) -> None:
    found = ModelConfig.from_hf(published.config)
    text = found.text
    if text.bos_token_id is None:  # LlamaConfig's defaults
        text = replace(text, bos_token_id=1, eos_token_ids=(2,))
    tied = published.head == "tied"
    dim = 128 if published.head == "linear" else None
    assert preset.config == replace(found, text=text, tied=tied, embedding_dim=dim)


def test_its_images_are_prepared_as_published(published: Published, preset: Preset) -> None:
    found, _ = derive_image(published.config, published.preprocessor)
    assert preset.settings == ImageSettings.from_hf(found)


def test_its_special_tokens_have_their_published_ids(published: Published, preset: Preset) -> None:
    assert preset.config.text.vocab_size == published.vocabulary.size
    known = published.vocabulary.ids
    assert preset.tokens.ids.keys() <= known.keys()
    if published.vocabulary is not GRANITE:  # whose markers' ids are not known
        assert preset.tokens.ids == {token: known[token] for token in preset.tokens.ids}
    markers = [token for token in known if token.startswith("<row_")]
    assert [token for token in preset.tokens.ids if token.startswith("<row_")] == markers
    named = named_tokens(published.tokenizer)
    tokens = preset.tokens
    assert [tokens.bos, tokens.eos, tokens.pad] == [
        named["bos_token"],
        named["eos_token"],
        named["pad_token"],
    ]
    assert tokens.add_bos == (published.vocabulary.add_bos is not None)


def test_it_writes_the_published_files(published: Published, preset: Preset) -> None:
    small = miniature(preset)  # whose special tokens have other ids
    small = replace(small, tokens=preset.tokens)
    small = replace(small, config=replace(small.config, text=preset.config.text))
    written = side_files(small, small.config)

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(written.get(name, b"{}"))
        return found

    generation = read("generation_config.json")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert generation == {key: published.generation[key] for key in ids if published.generation}
    image = read("preprocessor_config.json")
    assert image.keys() == published.preprocessor.keys()
    assert image.get("video_sampling") == published.preprocessor.get("video_sampling")
    processor = read("processor_config.json")
    assert processor.get("image_seq_len") == published.processor.get("image_seq_len")
    assert bool(processor) == bool(published.processor)
    templates = [
        file if isinstance(file, str) else file["chat_template"]
        for name, file in published.files.items()
        if name.startswith("chat_template")
    ]
    assert [written["chat_template.jinja"].decode()] == templates


def test_a_new_checkpoints_config_has_the_published_keys(
    published: Published, preset: Preset, tmp_path: Path
) -> None:
    small = replace(
        miniature(preset), config_keys=preset.config_keys, added_tokens=preset.added_tokens
    )
    folder = new_checkpoint(small, tmp_path / "new")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    noise = {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}
    unread = {"image_seq_len", "use_reentrant_checkpointing"}
    assert published.config.keys() - noise - unread <= written.keys()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in published.config:
            assert written[key] == published.config[key]
    if (added := published.files.get("added_tokens.json")) is not None:
        assert json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")) == added
