"""smolstack's contenders, one per precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smolstack.bench import sizes
from smolstack.bench.peers import ours_training
from smolstack.bench.peers.fresh import import_seconds
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.peers.training_run import TrainingRun, TrainingTask
from smolstack.bench.timing import OURS, Contender, ReportedValue, later
from smolstack.bench.worker import Worker
from smolstack.bench.workload import BITS, QUESTION, Scene, Workload, text_batch
from smolstack.checkpoint.load import QUANTIZED
from smolstack.processor.tiles import cut_tiles, normalize
from smolstack.vlm import VLM, load

SAVED = "saved so"


class Ours(Implementation):
    """Models in every precision of the workload, loaded on first use."""

    name = OURS

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._loaded: dict[str, VLM] = {}

    def vlm(self, dtype: str) -> VLM:
        """Return the checkpoint in one precision; answers do not end by themselves."""
        if dtype not in self._loaded:
            # May be loaded during a measurement: weights must not be inference tensors.
            with torch.inference_mode(False):
                self._loaded[dtype] = _load(self.workload.folder, dtype)
        return self._loaded[dtype]

    def connector(self, patches: Tensor) -> Sequence[Contender]:
        def make(dtype: str) -> Callable[[], object]:
            model = self.vlm(dtype).model
            return partial(model.connector, patches.to(model.dtype))

        return self._each(make)

    def vision(self, tile: Tensor) -> Sequence[Contender]:
        def make(dtype: str) -> Callable[[], object]:
            model = self.vlm(dtype).model
            return partial(model.vision, tile.to(model.dtype))

        return self._each(make, sizes.tower(self.workload.config))

    def prefill(self, ids: Tensor) -> Sequence[Contender]:
        def make(dtype: str) -> Callable[[], object]:
            model, batch = self.vlm(dtype).model, text_batch(ids)
            return lambda: model.prefill(batch, model.new_cache(batch, ids.shape[1] + 1))

        return self._each(make, sizes.decoder(self.workload.config))

    def decode(self, ids: Tensor, steps: int) -> Sequence[Contender]:
        return self._each(
            lambda dtype: decoding(self.vlm(dtype), ids, steps),
            steps * sizes.decoder(self.workload.config),
        )

    def images(self, scene: Scene) -> Sequence[Contender]:
        settings = self.workload.preset.settings
        image = Image.open(scene.path).convert("RGB")
        return [
            Contender(OURS, lambda: normalize(cut_tiles(image, scene.plan, settings), settings))
        ]

    def ask(self, scene: Scene) -> Sequence[Contender]:
        tokens = self.workload.new_tokens
        small = self.workload.scenes[0]

        def run(dtype: str, scene: Scene, tokens: int) -> None:
            ask_once(self.vlm(dtype), scene.path, scene.split, tokens)

        return [
            Contender(
                OURS,
                partial(run, dtype, scene, tokens),
                dtype,
                warm=partial(run, dtype, small, 2),
            )
            for dtype in self.workload.dtypes
        ]

    def load(self) -> Sequence[Contender]:
        """From the checkpoint in bfloat16, and from one saved in the precision."""
        return [
            *self._each(lambda dtype: partial(load, self.workload.folder, dtype=dtype)),
            *(
                Contender(OURS, later(partial(self._loading_saved, dtype)), dtype, SAVED)
                for dtype in self.workload.dtypes
                if dtype in QUANTIZED
            ),
        ]

    def memory(self, scene: Scene) -> Sequence[Contender]:
        return [
            Contender(OURS, partial(self._peak, dtype, form, scene), dtype, form)
            for dtype in self.workload.dtypes
            for form in (("", SAVED) if dtype in QUANTIZED else ("",))
        ]

    def _loading_saved(self, dtype: str) -> Callable[[], object]:
        return partial(load, self.workload.saved(dtype))

    def imports(self) -> Sequence[Contender]:
        return [Contender(OURS, lambda: ReportedValue(import_seconds("smolstack")))]

    def train(self, task: TrainingTask) -> Sequence[TrainingRun]:
        return ours_training.runs(self.workload, task)

    def _peak(self, dtype: str, form: str, scene: Scene) -> ReportedValue:
        folder = self.workload.saved(dtype) if form == SAVED else self.workload.folder
        work = f"{__name__}:asking"
        with Worker(work, self.workload.threads, folder=str(folder), dtype=dtype) as worker:
            told = worker.tell(
                path=str(scene.path), split=scene.split, tokens=self.workload.new_tokens
            )
        return ReportedValue(float(told["peak_bytes"]))

    def _each(
        self, make: Callable[[str], Callable[[], object]], weights: float = 0.0
    ) -> list[Contender]:
        return [
            Contender(
                OURS, later(partial(make, dtype)), dtype, bytes_read=weights * BITS[dtype] / 8
            )
            for dtype in self.workload.dtypes
        ]


def decoding(vlm: VLM, ids: Tensor, steps: int) -> Callable[[], object]:
    """Greedy steps after a prompt; the cache is truncated to the prompt before each run."""
    model, batch = vlm.model, text_batch(ids)
    cache = model.new_cache(batch, ids.shape[1] + steps)

    def run() -> None:
        if cache.length == 0:
            model.prefill(batch, cache)
        cache.truncate(ids.shape[1])
        token = ids[:, -1]
        for _ in range(steps):
            token = model.decode_one_token(token, cache).argmax(dim=-1)

    return run


def ask_once(vlm: VLM, path: Any, split: bool, tokens: int) -> None:
    """Ask with empty caches."""
    vlm.clear_caches()
    answer = vlm.ask(path, QUESTION, max_new_tokens=tokens, split=split)
    assert answer.usage.completion_tokens == tokens


def asking(folder: str, dtype: str, threads: int) -> Callable[..., None]:
    """A worker's work: answer questions about image files."""
    vlm = _load(folder, dtype)
    torch.set_num_threads(threads)
    return partial(_ask_by_worker, vlm)


def _ask_by_worker(vlm: VLM, path: str, split: bool, tokens: int) -> None:
    ask_once(vlm, path, split, tokens)


def _load(folder: Any, dtype: str) -> VLM:
    vlm = load(folder, dtype=dtype)
    vlm.eos_token_ids = ()
    return vlm
