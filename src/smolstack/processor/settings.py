"""Image preprocessing settings of a checkpoint, strictly validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolstack.errors import ConfigError

# Class defaults of transformers' Idefics3ImageProcessor for keys that a file may omit.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "do_image_splitting": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
}
RESAMPLE_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ImageSettings:
    """Preprocessing of images.

    Attributes:
        longest_edge: pixels that an image's longer side is resized to before tiling.
        tile_edge: pixels of a tile's side.
        split: whether images are split into tiles (with one more of the whole image).
        resize: whether the first resize, to ``longest_edge``, takes place.
        resample: Pillow's filter number (1 is Lanczos).
        rescale: factor on the 0–255 values, None for none.
        mean, std: per channel, applied after rescaling; None for no normalization.
    """

    longest_edge: int
    tile_edge: int
    split: bool = True
    resize: bool = True
    resample: int = 1
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.tile_edge < 1 or self.longest_edge < 1:
            raise ConfigError(
                f"preprocessor_config.json has longest_edge {self.longest_edge} and tile edge "
                f"{self.tile_edge}, expected positive integers"
            )
        if self.resample not in RESAMPLE_FILTERS:
            raise ConfigError(
                f"preprocessor_config.json resample is {self.resample}, expected one of "
                f"{sorted(RESAMPLE_FILTERS)}"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ImageSettings:
        """Build from preprocessor_config.json. ``size`` and ``max_image_size`` have no default."""
        get = {**_DEFAULTS, **{key: value for key, value in data.items() if value is not None}}
        normalize = bool(get["do_normalize"])
        return cls(
            longest_edge=_edge(data, "size"),
            tile_edge=_edge(data, "max_image_size"),
            split=bool(get["do_image_splitting"]),
            resize=bool(get["do_resize"]),
            resample=int(get["resample"]),
            rescale=float(get["rescale_factor"]) if get["do_rescale"] else None,
            mean=_channels(get["image_mean"], "image_mean") if normalize else None,
            std=_channels(get["image_std"], "image_std") if normalize else None,
        )

    def to_hf(self, processor_class: str = "Idefics3Processor") -> dict[str, Any]:
        """A complete preprocessor_config.json."""
        defaults = _DEFAULTS
        return {
            "do_convert_rgb": True,
            "do_image_splitting": self.split,
            "do_normalize": self.mean is not None,
            "do_pad": True,
            "do_rescale": self.rescale is not None,
            "do_resize": self.resize,
            "image_mean": list(self.mean or defaults["image_mean"]),
            "image_processor_type": processor_class.replace("Processor", "ImageProcessor"),
            "image_std": list(self.std or defaults["image_std"]),
            "max_image_size": {"longest_edge": self.tile_edge},
            "processor_class": processor_class,
            "resample": self.resample,
            "rescale_factor": defaults["rescale_factor"] if self.rescale is None else self.rescale,
            "size": {"longest_edge": self.longest_edge},
        }


def _edge(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    edge = value.get("longest_edge") if isinstance(value, Mapping) else None
    if isinstance(edge, bool) or not isinstance(edge, int):
        raise ConfigError(
            f"preprocessor_config.json {key} is {value!r}, expected {{'longest_edge': integer}}"
        )
    return edge


def _channels(value: Any, key: str) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ConfigError(f"preprocessor_config.json {key} is {value!r}, expected 3 numbers")
    return tuple(float(item) for item in value)
