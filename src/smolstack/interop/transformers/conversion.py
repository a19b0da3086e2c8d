"""Converts models between smolstack and transformers without copying weights."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smolstack.backends import accelerate
from smolstack.checkpoint import keys
from smolstack.checkpoint.files import read_files
from smolstack.checkpoint.load import Checkpoint
from smolstack.checkpoint.processor_files import build_processor, end_tokens
from smolstack.checkpoint.save import to_json
from smolstack.errors import ConfigError
from smolstack.interop.reference import share_model
from smolstack.interop.transformers.engine import config_of
from smolstack.model.vlm import VisionLanguageModel
from smolstack.vlm import VLM


def to_transformers(vlm: VLM | VisionLanguageModel) -> Any:
    """Return transformers' model on smolstack's weights: storage is shared, nothing is copied.

    Returns:
        An ``Idefics3ForConditionalGeneration`` or ``SmolVLMForConditionalGeneration`` in
        evaluation mode. (For a retrieval checkpoint, the base model with its embedding head.)
    """
    return share_model(vlm.model if isinstance(vlm, VLM) else vlm)


def from_transformers(model: Any, processor: Any = None) -> Any:
    """Return smolstack's model on the weights of a transformers model: storage is shared.

    Args:
        model: an Idefics3 or SmolVLM ``ForConditionalGeneration`` model.
        processor: its transformers processor (with tokenizer); None for the model alone.

    Returns:
        A :class:`smolstack.VLM` if a processor is given, else a ``VisionLanguageModel``.

    Raises:
        ConfigError: the model has parameters that this family does not have (adapters that were
            not merged, other architectures), or lacks some.
    """
    config = config_of(model)
    tied = "lm_head.weight" not in dict(model.named_parameters())
    config = replace(config, tied=tied)
    with torch.device("meta"):
        ours = VisionLanguageModel(config)
    expected = {keys.to_hf(name): name for name in ours.state_dict()}
    found = dict(model.named_parameters())
    extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if extra or missing:
        raise ConfigError(
            f"{type(model).__name__} has parameters that this family does not have "
            f"({', '.join(extra[:3]) or 'none'}) and lacks {', '.join(missing[:3]) or 'none'}"
        )
    ours.load_state_dict(
        {expected[name]: value.detach() for name, value in found.items()}, assign=True
    )
    accelerate(ours.eval())
    return ours if processor is None else _with_processor(ours, model, processor)


def _with_processor(network: VisionLanguageModel, model: Any, processor: Any) -> VLM:
    """Return a VLM with the side files that the transformers processor writes."""
    folder = tempfile.TemporaryDirectory(prefix="smolstack-")
    place = Path(folder.name)
    # Separately: SmolVLM's processor requires a video processor, which images do not need.
    processor.tokenizer.save_pretrained(place)
    processor.image_processor.save_pretrained(place)
    _write_template(processor, place)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(place)
    (place / "config.json").write_text(to_json(model.config.to_dict()), encoding="utf-8")
    made = {"image_seq_len": getattr(processor, "image_seq_len", None)}
    (place / "processor_config.json").write_text(to_json(made), encoding="utf-8")
    files = read_files(place)
    built = build_processor(files, network.config)
    eos = end_tokens(files, network.config, built)
    vlm = VLM(Checkpoint(files, network.config, network, built, eos))
    weakref.finalize(vlm, folder.cleanup)
    return vlm


def _write_template(processor: Any, place: Path) -> None:
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
