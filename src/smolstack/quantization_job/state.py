"""State saved beside the output folder, so that an interruption loses at most one layer.

A hidden folder, ``.OUT.quantizing``: the job's settings, the samples that the model generated, the
embeddings and the chosen formats, and one file of tensors for each block. Every file is written
atomically.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smolstack.errors import ConfigError
from smolstack.output_files import atomic_file, exclusive_writer

_JOB = "job.json"


class State:
    """The folder of one job.

    Args:
        out: the output folder.
        job: settings that must be equal when the job is resumed, as plain data.
        restart: discard the state of an earlier run.

    Raises:
        ConfigError: it contains another job's state, or another process is using it.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = out.parent / f".{out.name}.quantizing"
        self._writer = ExitStack()
        self._writer.enter_context(exclusive_writer(self.folder, ConfigError, out))
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        found = self._json(_JOB)
        if found is None:  # a process was killed while it removed the folder
            shutil.rmtree(self.folder, ignore_errors=True)
        if found is not None and found != dict(job):
            self.close()
            other = [key for key in job if found.get(key) != job[key]]
            raise ConfigError(
                f"{self.folder} contains an unfinished job that differs in {', '.join(other)} "
                f"({other[0]}: {found.get(other[0])!r}, now {job[other[0]]!r}); --restart discards "
                "it, or choose another folder"
            )
        self._job = dict(job)
        self.errors: dict[str, float] = {}

    def close(self) -> None:
        """Release the lock on the job."""
        self._writer.close()

    def get(self, block: str) -> Mapping[str, Tensor] | None:
        """Return a block's tensors; see :class:`smolstack.quantization.quantize.BlockStore`."""
        found = self.tensors(block)
        error = self._json(f"{block}.json")
        if found is None or error is None:
            return None
        self.errors[block] = error["error"]
        return found

    def put(self, block: str, tensors: Mapping[str, Tensor], error: float) -> None:
        """Save a block."""
        self.put_tensors(block, tensors)
        self.put_json(block, {"error": error})
        self.errors[block] = error

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors saved under a name."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._begin()
        path = self.folder / f"{name}.safetensors"
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with atomic_file(path) as beside:
            try:
                save_file(kept, beside)
            except SafetensorError as error:  # for example a full disk
                raise OSError(str(error)) from error

    def json(self, name: str) -> Any:
        """Return the data saved under a name, or None."""
        return self._json(f"{name}.json")

    def put_json(self, name: str, data: Any) -> None:
        self._begin()
        self._write(f"{name}.json", data)

    def remove(self) -> None:
        """Remove the folder, after the job is complete or discarded."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._writer.close()

    def _begin(self) -> None:
        """Create the folder when something is saved, so that a refused job leaves none."""
        if not (self.folder / _JOB).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(_JOB, self._job)

    def _write(self, name: str, data: Any) -> None:
        with atomic_file(self.folder / name) as beside:
            beside.write_text(json.dumps(data), encoding="utf-8")

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
