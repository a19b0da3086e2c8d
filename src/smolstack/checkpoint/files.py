"""Reads the files of a checkpoint folder, in the layouts of old and new transformers versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolstack.checkpoint.defaults import derive_config, derive_image
from smolstack.checkpoint.unsupported import refuse_other_kinds
from smolstack.errors import CheckpointError, ConfigError

# Small files that describe the processor; copied unchanged when a checkpoint is saved.
SIDE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "video_preprocessor_config.json",
    "additional_chat_templates/sentence_transformers.jinja",
)
RETRIEVAL_TEMPLATE = SIDE_FILES[-1]  # text around pages and queries, in newer retrieval models
ADAPTER_CONFIG = "adapter_config.json"  # marks an adapter folder
# Advice if the weights are present but the processor's files are missing.
_UNPROCESSED = "; AutoProcessor.from_pretrained(BASE).save_pretrained(FOLDER) writes them"
_TRAINED = (
    "; a Trainer saves the processor's files where it is given processing_class=processor, and "
    "AutoProcessor.from_pretrained(BASE).save_pretrained(FOLDER) adds them afterwards"
)
# Models that are a single tower, and how to make a complete model of them.
_TOWERS = {
    "llama": ("a language model", "smolstack bridge VISION {} OUT"),
    "siglip": ("a vision tower", "smolstack bridge {} TEXT OUT"),
    "siglip_vision_model": ("a vision tower", "smolstack bridge {} TEXT OUT"),
}
MAX_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True)
class CheckpointFiles:
    """The contents of a checkpoint's small files, without the weights.

    Attributes:
        folder: the folder that was read.
        config: config.json.
        image: the image processor's settings (preprocessor_config.json, or the ``image_processor``
            object of a newer processor_config.json).
        video: the video processor's settings, from video_preprocessor_config.json or the
            ``video_processor`` object of a newer processor_config.json, or an empty object.
        processor: processor_config.json, or an empty object.
        generation: generation_config.json, or an empty object.
        tokenizer_config: tokenizer_config.json, or an empty object.
        chat_template: the Jinja source, or None.
        side: contents of the side files by name.
        notes: values that were missing and derived from other files, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    image: Mapping[str, Any]
    video: Mapping[str, Any]
    processor: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    chat_template: str | None
    side: Mapping[str, bytes] = field(repr=False)
    notes: tuple[str, ...] = ()


def read_files(folder: Path, base: Path | None = None) -> CheckpointFiles:
    """Read the JSON and text files of ``folder``, not the weights.

    Args:
        base: for an adapter folder, the folder of its base checkpoint. config.json is read from
            there, as are all other files that the adapter folder does not have.

    Raises:
        CheckpointError: the folder or a required file does not exist, or is not JSON.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{folder} is {found}, expected a checkpoint folder")
    refuse_other_kinds(folder)
    whole = (folder / "config.json").is_file()
    if base is None and not whole and (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is an adapter, expected a whole checkpoint; "
            "smolstack.load(it).save(folder) makes one"
        )

    def place(name: str) -> Path:
        own = folder / name
        return own if base is None or own.is_file() else base / name

    config = read_json((base or folder) / "config.json")
    if config.get("model_type") in _TOWERS and "scale_factor" not in config:
        kind, order = _TOWERS[config["model_type"]]
        raise CheckpointError(
            f"{folder} is only {kind} (model_type {config['model_type']!r}); "
            f"{order.format(folder)} combines two towers to a model"
        )
    processor = _optional(place("processor_config.json"))
    image: Mapping[str, Any] = _optional(place("preprocessor_config.json"))
    nested = processor.get("image_processor")
    if not image and isinstance(nested, Mapping):
        image = nested
    if not image:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor an image_processor object in "
            "processor_config.json; the image's preprocessing is unknown"
            + (_TRAINED if (folder / "training_args.bin").is_file() else _UNPROCESSED)
        )
    if not place("tokenizer.json").is_file():
        trained = (folder / "training_args.bin").is_file()
        raise CheckpointError(f"{folder} has no tokenizer.json{_TRAINED if trained else ''}")
    video = _optional(place("video_preprocessor_config.json")) or processor.get("video_processor")
    tokenizer_config = _optional(place("tokenizer_config.json"))
    image, told = derive_image(config, image)
    config, more = derive_config(config, processor, place("tokenizer.json").read_bytes())
    return CheckpointFiles(
        folder=folder,
        config=config,
        image=image,
        video=video if isinstance(video, Mapping) else {},
        processor=processor,
        generation=_optional(place("generation_config.json")),
        tokenizer_config=tokenizer_config,
        chat_template=chat_template_of(place, processor, tokenizer_config),
        side={n: place(n).read_bytes() for n in SIDE_FILES if place(n).is_file()},
        notes=(*told, *more, *_unlike_transformers(config)),
    )


def _unlike_transformers(config: Mapping[str, Any]) -> list[str]:
    """Return notes about configs that smolstack reads and transformers rejects: it checks this even
    if head_dim is given.
    """
    text = config.get("text_config")
    sizes = text if isinstance(text, Mapping) else {}
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or not hidden % heads:
        return []
    return [
        f"transformers refuses this config.json: hidden_size {hidden} of text_config is not a "
        f"multiple of its {heads} attention heads, which head_dim {sizes.get('head_dim')} makes no "
        "difference to"
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes, too large for JSON")
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse the content of the file ``path``, which has to be a JSON object."""
    try:
        data = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} contains a {type(data).__name__}, expected a JSON object")
    return data


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def chat_template_of(
    place: Callable[[str], Path], processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> str | None:
    """Return the chat template, looking in the newest location first; in a list of named templates,
    "default" is used.
    """
    jinja = place("chat_template.jinja")
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{jinja} cannot be read as text: {error}") from None
    places = (
        _optional(place("chat_template.json")).get("chat_template"),
        processor.get("chat_template"),
        tokenizer_config.get("chat_template"),
    )
    for template in places:
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            if isinstance(named.get("default"), str):
                return str(named["default"])
            raise ConfigError(
                f"{jinja.parent} has chat templates {sorted(named)}, none named default"
            )
    return None
