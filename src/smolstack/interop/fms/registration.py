"""Registers Idefics3 with the Foundation Model Stack: variants, adapters, Hugging Face
interfaces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fms import models
from fms.models.hf import _fms_to_hf_adapt_map
from fms.models.hf.config_utils import _FMS_MODEL_CONFIG_REGISTRY
from fms.utils import serialization
from transformers import AutoConfig, AutoModelForImageTextToText

from smolstack.interop.fms import weights
from smolstack.interop.fms.config import Idefics3Config, variants
from smolstack.interop.fms.conversion import ARCHITECTURE
from smolstack.interop.fms.huggingface import (
    HFAdaptedIdefics3Config,
    HFAdaptedIdefics3ForConditionalGeneration,
    build_idefics3_params,
)
from smolstack.interop.fms.model import Idefics3

# Names of this architecture in Hugging Face config files ("architectures").
HF_ARCHITECTURES = (
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Idefics3Model",
    "SmolVLMModel",
    "ColIdefics3",
)
_NAMES_IN: tuple[Callable[..., Any], ...] = (weights.hf_to_fms_rope, weights.weight_fusion)
_NAMES_OUT: tuple[Callable[..., Any], ...] = (weights.weight_unfusion, weights.fms_to_hf_rope)
# Source → steps. "hf" is used by get_model(source="hf"), "fms" by default; the others are for
# get_adapted.
ADAPTERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "hf": (weights.hf_to_fms_names, *_NAMES_IN),
    "fms": (weights.weight_layout,),
    "smolstack": (weights.smolstack_to_fms_names, *_NAMES_IN),
    "fms_to_hf": (*_NAMES_OUT, weights.fms_to_hf_names),
    "fms_to_smolstack": (*_NAMES_OUT, weights.fms_to_smolstack_names),
}


def register() -> None:
    """Register everything, once; a second call changes nothing."""
    if ARCHITECTURE in models.list_models():
        return
    for steps in ADAPTERS.values():
        for step in steps:
            _register_step(step)
    for source, steps in ADAPTERS.items():
        serialization.register_adapter(ARCHITECTURE, source, [step.__name__ for step in steps])
    for name in HF_ARCHITECTURES:
        _FMS_MODEL_CONFIG_REGISTRY.register_model_arch_info(
            name, ARCHITECTURE, build_idefics3_params
        )
    _fms_to_hf_adapt_map[Idefics3] = HFAdaptedIdefics3ForConditionalGeneration
    auto: Any = AutoModelForImageTextToText
    AutoConfig.register(HFAdaptedIdefics3Config.model_type, HFAdaptedIdefics3Config, exist_ok=True)
    auto.register(HFAdaptedIdefics3Config, HFAdaptedIdefics3ForConditionalGeneration, exist_ok=True)
    for name, config in variants().items():
        models.register_model(ARCHITECTURE, name, partial(_build, config))


def _build(config: Idefics3Config, **kwargs: Any) -> Idefics3:
    return Idefics3(config, **kwargs)


_registered_steps: set[str] = set()


def _register_step(step: Callable[..., Any]) -> None:
    if step.__name__ not in _registered_steps:
        serialization.register_adapter_step(ARCHITECTURE, step.__name__, step)
        _registered_steps.add(step.__name__)
