"""Locates a checkpoint: a folder, the bundled reader, or a repository on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smolstack.errors import CheckpointError
from smolstack.output_files import replaced_folder

READER = Path(__file__).resolve().parent.parent / "reader"
BUNDLED = "smolstack's bundled reader"  # its name in files that cannot contain None
GGUF = ".gguf"
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt"]  # never pickles, never code
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class ModelPath:
    """The location of a model's files.

    Attributes:
        path: a checkpoint folder, an adapter folder, or a GGUF file of the language model.
        base: for an adapter, the base checkpoint's folder, instead of the one that it names.
        mmproj: for a GGUF file, the file of the vision tower and the connector.
    """

    path: Path
    base: Path | None = None
    mmproj: Path | None = None

    def __str__(self) -> str:
        return str(self.path)

    def absolute(self) -> ModelPath:
        """Return the same location with absolute paths."""
        base, mmproj = (p if p is None else p.absolute() for p in (self.base, self.mmproj))
        return ModelPath(self.path.absolute(), base, mmproj)


def locate(
    model: str | Path | ModelPath | None,
    revision: str | None = None,
    *,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
) -> ModelPath:
    """Locate a model's files; a hub repository that is not cached is downloaded.

    Args:
        model, revision: as for :func:`find`, or a ModelPath.
        base: the base checkpoint of an adapter: a folder or a hub id.
        mmproj: the file of a GGUF model's vision tower.

    Raises:
        CheckpointError: as :func:`find`; or ``mmproj`` does not exist.
    """
    if isinstance(model, ModelPath):
        return model
    path = find(model, revision)
    tower = None if mmproj is None else Path(mmproj)
    if tower is not None and not tower.is_file():
        found = "a folder" if tower.exists() else "nothing"
        raise CheckpointError(f"{tower}: found {found}, expected a GGUF file of a vision tower")
    return ModelPath(path, None if base is None else find(base), tower)


def find(model: str | Path | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, or a GGUF file.

    Args:
        model: a folder, a GGUF file, a hub id such as ``HuggingFaceTB/SmolVLM-256M-Instruct``, or
            None for the bundled reader.
        revision: branch, tag or commit, for a hub id.
        weights: False downloads the small files only.

    Raises:
        CheckpointError: the folder does not exist; a hub id is given but huggingface_hub is not
            installed, or the download fails.
    """
    if model is None:
        return READER
    folder = Path(model)
    if folder.is_dir() or (folder.is_file() and folder.suffix.lower() == GGUF):
        return folder
    name = str(model)
    if (replaced := replaced_folder(folder)) is not None:
        raise CheckpointError(
            f"{name} is missing, because a process that was replacing it was killed; its content "
            f"is in {replaced}; move it back, or write {name} again"
        )
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            f"{name}: found {found}, expected a checkpoint folder, a {GGUF} file or a hub id such "
            "as HuggingFaceTB/SmolVLM-256M-Instruct"
        )
    return _download(name, revision, weights=weights)


def _download(repo: str, revision: str | None, *, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repo} is not a local folder; to download it from the hub, "
            "pip install 'smolstack[hf]'"
        ) from None
    try:
        folder: str = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=PATTERNS,
            ignore_patterns=None if weights else WEIGHTS,
        )
    except Exception as error:  # the hub client raises many error types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repo} is not a local folder and could not be downloaded from the hub: {reason}"
        ) from error
    return Path(folder)
