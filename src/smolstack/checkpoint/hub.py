"""Where a checkpoint is: a folder, the bundled reader, or a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from smolstack.errors import CheckpointError

READER = Path(__file__).resolve().parent.parent / "reader"
BUNDLED = "smolstack's bundled reader"  # its name in files, where None cannot stand
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt"]  # never pickles, never code


def find(model: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        model: a folder, a hub id such as ``HuggingFaceTB/SmolVLM-256M-Instruct``, or None for the
            bundled reader.
        revision: branch, tag or commit, for a hub id.

    Raises:
        CheckpointError: no such folder; or a hub id without huggingface_hub, or unreachable.
    """
    if model is None:
        return READER
    folder = Path(model)
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            f"{name}: found {found}, expected a checkpoint folder or a hub id such as "
            "HuggingFaceTB/SmolVLM-256M-Instruct"
        )
    return _download(name, revision)


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repo} is no folder here; to fetch it from the hub, pip install 'smolstack[hf]'"
        ) from None
    try:
        folder: str = snapshot_download(repo, revision=revision, allow_patterns=PATTERNS)
    except Exception as error:  # the hub's client raises many kinds, all of them "not fetched"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repo} is no folder here and could not be fetched from the hub: {reason}"
        ) from error
    return Path(folder)
