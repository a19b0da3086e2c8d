"""llama.cpp for text, through llama-cpp-python: BF16, Q8_0 and Q4_0 of the same weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from smolstack.bench import sizes
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import Contender, ReportedValue
from smolstack.bench.worker import Worker
from smolstack.bench.workload import BITS, Workload
from smolstack.output_files import atomic_file

# Q8_0 has a 16-bit scale per 32 weights.
_BITS = {**BITS, "int8": 8.5}
FORMATS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class LlamaCpp(Implementation):
    """The decoder in each format, each in a separate process."""

    name = "llama.cpp"
    packages = ("gguf", "llama-cpp-python")

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._workers: dict[str, Worker] = {}

    def prefill(self, ids: Tensor) -> Sequence[Contender]:
        prompt = ids[0].tolist()
        return [
            self._contender(precision, 1.0, partial(self._run, precision, prompt, steps=0))
            for precision in FORMATS
        ]

    def decode(self, ids: Tensor, steps: int) -> Sequence[Contender]:
        prompt = ids[0].tolist()
        return [
            self._contender(precision, steps, partial(self._run, precision, prompt, steps=steps))
            for precision in FORMATS
        ]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def top_tokens(self, precision: str, ids: Tensor) -> list[int]:
        """Return the most likely next tokens after a prompt, best first, to check that it
        computes the same.
        """
        told = self._worker(precision).tell(prompt=ids[0].tolist(), steps=0, give=True)
        return [int(token) for token in told["value"]]

    def _contender(self, precision: str, passes: float, run: Callable[[], object]) -> Contender:
        read = passes * sizes.decoder(self.workload.config) * _BITS[precision] / 8
        return Contender(self.name, run, precision, FORMATS[precision], bytes_read=read)

    def _run(self, precision: str, prompt: list[int], steps: int) -> ReportedValue:
        return ReportedValue(self._worker(precision).tell(prompt=prompt, steps=steps)["value"])

    def _worker(self, precision: str) -> Worker:
        if precision not in self._workers:
            from smolstack.bench.peers.gguf_file import write_decoder

            path = self.workload.root / f"decoder-{FORMATS[precision]}.gguf"
            if not path.exists():
                with atomic_file(path) as partial_file:
                    write_decoder(self.workload.folder, partial_file, precision)
            self._workers[precision] = Worker(
                f"{__name__}:decoder",
                self.workload.threads,
                file=str(path),
                context=min(2048, self.workload.config.text.max_positions),
            )
        return self._workers[precision]


def decoder(file: str, context: int, threads: int) -> Callable[..., Any]:
    """A worker's work: read a prompt, then decode tokens one at a time.

    The context keeps its prompt between runs; only ``steps=0`` reads it again.
    """
    model = Model(file, context, threads)
    return model.run


class Model:
    """A minimal wrapper of llama.cpp's interface: one Python call per token."""

    def __init__(self, file: str, context: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = context  # the whole prompt in one call
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.held: list[int] = []

    def run(self, prompt: list[int], steps: int, give: bool = False) -> Any:
        """Return the seconds of reading the prompt (``steps=0``) or of the steps after it."""
        from time import perf_counter

        memory = self.api.llama_get_memory(self.context)
        if steps == 0 or self.held != prompt:
            self.api.llama_memory_clear(memory, True)
            began = perf_counter()
            self._read(prompt)
            self._logits()
            seconds = perf_counter() - began
            self.held = list(prompt)
        if steps:
            self.api.llama_memory_seq_rm(memory, 0, len(prompt), -1)
            token = prompt[-1]
            began = perf_counter()
            for _ in range(steps):
                self._read([token])
                token = int(self._logits().argmax())
            seconds = perf_counter() - began
        return np.argsort(-self._logits())[:10].tolist() if give else seconds

    def _read(self, tokens: list[int]) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        failed = self.api.llama_decode(
            self.context, self.api.llama_batch_get_one(array, len(tokens))
        )
        if failed:
            raise RuntimeError(f"llama_decode ended with {failed}")

    def _logits(self) -> npt.NDArray[np.float32]:
        """Return the logits after the last token."""
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(self.tokens,))
