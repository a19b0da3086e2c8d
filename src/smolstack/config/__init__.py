"""Configurations as frozen dataclasses, read strictly from Hugging Face files and written back.

Two kinds of missing keys exist. Sizes that old files leave out when they equal the default of the
library's config class (files written by transformers 4 omit such keys) are filled from those
class defaults, listed below. Keys that change results without changing any weight's shape
(``rope_theta``, ``rms_norm_eps``, ``scale_factor``, ``image_token_id``) have no default: a file
without them raises :class:`ConfigError`.
"""

from __future__ import annotations

from smolstack.config.model import ModelConfig
from smolstack.config.reading import as_ids
from smolstack.config.text import RopeConfig, TextConfig
from smolstack.config.vision import SIGLIP_DEFAULTS, VisionConfig

__all__ = [
    "SIGLIP_DEFAULTS",
    "ModelConfig",
    "RopeConfig",
    "TextConfig",
    "VisionConfig",
    "as_ids",
]
