"""llama.cpp's contenders: the same decoder in its types, converted by its own quantizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench.peers.llama_cpp import LlamaCpp
from smolstack.bench.timing import ReportedValue
from smolstack.bench.worker import Worker
from smolstack.output_files import atomic_file

NAME = LlamaCpp.name
TYPES = ("F32", "BF16", "Q8_0", "Q4_K_M", "Q4_0")
_TABLE, _HEAD = "token_embd.weight", "output.weight"


def missing() -> list[str]:
    """Return the packages that are not installed; llama.cpp takes part only if there are none."""
    return LlamaCpp.missing()


@dataclass
class Peer:
    """The decoder of a checkpoint folder in one of TYPES, in a separate process.

    Attributes:
        root: folder of the GGUF files.
        context: maximum number of tokens, prompt and continuation together.
    """

    precision: str
    folder: Path
    root: Path
    threads: int
    context: int
    by: str = NAME
    _readers: dict[str, Worker] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        return f"{self.by} {self.precision}"

    def scores(self, batch: Batch) -> Tensor:
        """Return logits (T, V) of a batch of one, without images."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "logits.npy"
            self._reader("scorer").tell(prompt=batch.token_ids[0].tolist(), path=str(path))
            return torch.from_numpy(np.load(path))

    def text_bytes(self) -> int:
        """Return the bytes read per decoded token, counted as in :meth:`Ours.text_bytes`."""
        import gguf

        tensors = gguf.GGUFReader(self.file()).tensors
        tied = all(tensor.name != _HEAD for tensor in tensors)
        return sum(int(t.n_bytes) for t in tensors if t.name != _TABLE or tied)

    def decoding(self, ids: Tensor, steps: int) -> Callable[[], object]:
        """Return a run that decodes ``steps`` tokens after a prompt (1, T)."""
        return partial(self._decode, ids[0].tolist(), steps)

    def _decode(self, prompt: list[int], steps: int) -> ReportedValue:
        return ReportedValue(
            float(self._reader("decoder").tell(prompt=prompt, steps=steps)["value"])
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self._readers.values():
            worker.close()
        self._readers.clear()

    def file(self) -> Path:
        """The GGUF file, made on first use."""
        path = self._path(self.precision)
        if path.exists():
            return path
        source = self._path("F32")
        if not source.exists():
            from smolstack.bench.peers.gguf_file import write_decoder

            with atomic_file(source) as partial_file:
                write_decoder(self.folder, partial_file, "float32")
        if path != source:
            with (
                atomic_file(path) as partial_file,
                Worker(f"{__name__}:quantizer", self.threads) as worker,
            ):
                worker.tell(source=str(source), target=str(partial_file), kind=self.precision)
        return path

    def _path(self, kind: str) -> Path:
        return self.root / f"decoder-{kind}.gguf"

    def _reader(self, work: str) -> Worker:
        if work not in self._readers:
            place = __name__ if work == "scorer" else "smolstack.bench.peers.llama_cpp"
            self._readers[work] = Worker(
                f"{place}:{work}", self.threads, file=str(self.file()), context=self.context
            )
        return self._readers[work]


def quantizer(threads: int) -> Callable[..., None]:
    """A worker's work: convert one GGUF file to a type."""

    def quantize(source: str, target: str, kind: str) -> None:
        import llama_cpp

        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread = threads
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)
        if failed:
            raise RuntimeError(f"llama_model_quantize ended with {failed}")

    return quantize


def scorer(file: str, context: int, threads: int) -> Callable[..., None]:
    """A worker's work: write the logits of every position of a prompt to a file."""
    import llama_cpp

    from smolstack.bench.peers.llama_cpp import Model

    api: Any = llama_cpp
    model = Model(file, context, threads)

    def score(prompt: list[int], path: str) -> None:
        import ctypes

        api.llama_memory_clear(api.llama_get_memory(model.context), True)
        batch = api.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for place, token in enumerate(prompt):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = True
        failed = api.llama_decode(model.context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode ended with {failed}")
        address = ctypes.cast(api.llama_get_logits(model.context), ctypes.POINTER(ctypes.c_float))
        np.save(path, np.ctypeslib.as_array(address, shape=(len(prompt), model.tokens)))

    return score
