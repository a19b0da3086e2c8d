"""The settings of a job: what its workers need, and what must be unchanged when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolstack.bulk.batching import Limits
from smolstack.bulk.embeddings import RETRIEVAL, Embeddings, Pages
from smolstack.bulk.partial_results import Parts
from smolstack.bulk.tasks import Questions, Task
from smolstack.checkpoint.adapter import find_adapter
from smolstack.checkpoint.hub import ModelPath
from smolstack.errors import BulkError
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.vlm import VLM, load

# Version of the saved state and of how files are processed; other versions are not resumed.
_FORMAT = 2


@dataclass(frozen=True)
class Work:
    """What to do with the images: everything that a worker process needs."""

    where: ModelPath
    dtype: str
    device: str
    questions: tuple[str, ...]
    embed: str | None
    embed_dtype: str
    options: AnswerOptions
    limits: Limits
    special_tokens_in_text: bool = True

    def task(self, vlm: VLM | None = None) -> Task:
        """Return the task on a loaded checkpoint, which is loaded unless given."""
        if vlm is None:
            vlm = load(self.where, dtype=self.dtype, device=self.device)
            vlm.processor.special_tokens_in_text = self.special_tokens_in_text
        if self.embed is None:
            return Questions(vlm, self.questions, self.options)
        images = read_options(self.options, ()).image_options
        if self.embed == RETRIEVAL:
            return Pages(vlm, self.embed_dtype, images)
        return Embeddings(vlm, self.embed, self.embed_dtype, images)


def settings_of(work: Work, images: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Return the settings that must be unchanged for a job to be resumed, as plain data."""
    what: dict[str, Any] = {"questions": list(work.questions)}
    if work.embed is not None:
        what = {"embed": work.embed, "embed_dtype": work.embed_dtype}
    kept = {name: value for name, value in work.options.items() if not _is_default(name, value)}
    if not work.special_tokens_in_text:
        kept["special_tokens_in_text"] = False
    data = {
        "format": _FORMAT,
        **images,
        **what,
        **kept,
        "model": fingerprint(work.where),
        "dtype": work.dtype,
        "window": window,
    }
    plain: dict[str, Any] = json.loads(json.dumps(data, default=_as_data))
    return plain


def _is_default(name: str, value: Any) -> bool:
    """Return whether an option has its default value; such options are not recorded."""
    if name == "stop":
        return not value
    if name == "password":  # does not change the pages, and must not be saved
        return True
    with_option: Any = {name: value}
    return value is None or read_options(with_option, ()) == read_options({}, ())


def _as_data(value: Any) -> Any:
    """Return a pydantic model's schema, or any other value as text."""
    schema = getattr(value, "model_json_schema", None)
    return schema() if callable(schema) else repr(value)


def check_same(parts: Parts, now: Mapping[str, Any]) -> None:
    """Raise an error that names the first difference if the saved job is another one.

    Raises:
        BulkError: the settings differ.
    """
    begun = parts.settings()
    for name in dict.fromkeys([*now, *begun]):
        if begun.get(name) != now.get(name):
            raise BulkError(
                f"{parts.folder} contains a job with {name} {_short(begun.get(name))}, this one "
                f"has {_short(now.get(name))}; finish it with its own settings, choose another "
                "output, or discard it with restart (--restart)"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if value is None:
        return "not given"
    return text if len(text) <= 80 else f"{text[:77]}…"


def fingerprint(where: ModelPath) -> str:
    """Return a digest of every file that a checkpoint's answers depend on."""
    digest = hashlib.blake2b(digest_size=12)
    for path in _files(where):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _files(where: ModelPath) -> list[Path]:
    """Return the files of a checkpoint and of an adapter's base, or of a GGUF model."""
    if not where.path.is_dir():
        return [path for path in (where.path, where.mmproj) if path is not None]
    adapter = find_adapter(where.path, where.base)
    paths = sorted(where.path.iterdir())
    if adapter is not None:
        paths += sorted(adapter.base.iterdir())
    return [path for path in paths if path.suffix in (".json", ".jinja", ".safetensors", ".txt")]
