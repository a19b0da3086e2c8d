"""transformers: float32 and bfloat16, attention by torch's fused operator ("sdpa") and "eager"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smolstack.bench import sizes
from smolstack.bench.peers import transformers_training
from smolstack.bench.peers.fresh import import_seconds
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.peers.training_run import TrainingRun, TrainingTask
from smolstack.bench.timing import Contender, ReportedValue, later
from smolstack.bench.worker import Worker
from smolstack.bench.workload import BITS, QUESTION, Scene, Workload, torch_dtype
from smolstack.checkpoint.files import read_files
from smolstack.checkpoint.processor_files import build_processor
from smolstack.config import ModelConfig

NAME = "transformers"
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("sdpa", "eager")


class Transformers(Implementation):
    """Models loaded in the usual way, on first use."""

    name = NAME
    packages = ("transformers",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._loaded: dict[tuple[str, str], Any] = {}

    def model(self, dtype: str, attention: str = "sdpa") -> Any:
        """Return the checkpoint as transformers loads it."""
        key = (dtype, attention)
        if key not in self._loaded:
            self._loaded[key] = load(str(self.workload.folder), dtype, attention)
        return self._loaded[key]

    def connector(self, patches: Tensor) -> Sequence[Contender]:
        def make(dtype: str) -> Callable[[], object]:
            return partial(self.model(dtype).model.connector, patches.to(torch_dtype(dtype)))

        return [Contender(NAME, later(partial(make, dtype)), dtype) for dtype in DTYPES]

    def vision(self, tile: Tensor) -> Sequence[Contender]:
        def make(dtype: str, attention: str) -> Callable[[], object]:
            tower = self.model(dtype, attention).model.vision_model
            return partial(tower, pixel_values=tile.to(torch_dtype(dtype)))

        return self._each(make, sizes.tower(self.workload.config))

    def prefill(self, ids: Tensor) -> Sequence[Contender]:
        def make(dtype: str, attention: str) -> Callable[[], object]:
            model = self.model(dtype, attention)
            return partial(model, input_ids=ids, logits_to_keep=1, use_cache=True)

        return self._each(make, sizes.decoder(self.workload.config))

    def decode(self, ids: Tensor, steps: int) -> Sequence[Contender]:
        def make(dtype: str, attention: str) -> Callable[[], object]:
            return Decoding(self.model(dtype, attention), ids, steps)

        return self._each(make, steps * sizes.decoder(self.workload.config))

    def images(self, scene: Scene) -> Sequence[Contender]:
        from smolstack.interop.reference import image_processor

        processor = image_processor(self.workload.preset.settings)
        image = Image.open(scene.path).convert("RGB")
        run = partial(
            processor, images=[image], do_image_splitting=scene.split, return_tensors="pt"
        )
        return [Contender(NAME, run)]

    def ask(self, scene: Scene) -> Sequence[Contender]:
        prompts = _Prompts(self.workload.folder)
        small, tokens = self.workload.scenes[0], self.workload.new_tokens

        def run(dtype: str, scene: Scene, tokens: int) -> None:
            prompts.generate(self.model(dtype), str(scene.path), scene.split, tokens)

        return [
            Contender(
                NAME,
                partial(run, dtype, scene, tokens),
                dtype,
                warm=partial(run, dtype, small, 2),
            )
            for dtype in DTYPES
        ]

    def load(self) -> Sequence[Contender]:
        folder = str(self.workload.folder)
        return [Contender(NAME, partial(load, folder, dtype), dtype) for dtype in DTYPES]

    def memory(self, scene: Scene) -> Sequence[Contender]:
        return [Contender(NAME, partial(self._peak, dtype, scene), dtype) for dtype in DTYPES]

    def imports(self) -> Sequence[Contender]:
        return [Contender(NAME, lambda: ReportedValue(import_seconds(NAME)))]

    def train(self, task: TrainingTask) -> Sequence[TrainingRun]:
        return transformers_training.runs(NAME, self.workload, task)

    def _peak(self, dtype: str, scene: Scene) -> ReportedValue:
        work = f"{__name__}:asking"
        with Worker(
            work, self.workload.threads, folder=str(self.workload.folder), dtype=dtype
        ) as worker:
            told = worker.tell(
                path=str(scene.path), split=scene.split, tokens=self.workload.new_tokens
            )
        return ReportedValue(float(told["peak_bytes"]))

    def _each(
        self, make: Callable[[str, str], Callable[[], object]], weights: float
    ) -> list[Contender]:
        return [
            Contender(
                NAME,
                later(partial(make, dtype, attention)),
                dtype,
                attention,
                bytes_read=weights * BITS[dtype] / 8,
            )
            for dtype, attention in _forms()
        ]


def _forms() -> Iterator[tuple[str, str]]:
    return ((dtype, attention) for dtype in DTYPES for attention in ATTENTIONS)


def load(folder: str, dtype: str, attention: str = "sdpa") -> Any:
    from smolstack.interop.reference import load_model

    return load_model(folder, dtype, attention)


class Decoding:
    """Greedy steps after a prompt; the cache is cropped back to the prompt before each run."""

    def __init__(self, model: Any, ids: Tensor, steps: int) -> None:
        self.model, self.ids, self.steps = model, ids, steps
        self.cache: Any = None

    def __call__(self) -> None:
        if self.cache is None:
            prompt = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
            self.cache = prompt.cache
        surplus = self.cache.get_seq_length() - self.ids.shape[1]
        if surplus:
            self.cache.crop(-surplus)
        token = self.ids[:, -1:]
        for _ in range(self.steps):
            out = self.model(input_ids=token, cache=self.cache, use_cache=True)
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)


class _Prompts:
    """Images through transformers' image processor, with given prompt token ids."""

    def __init__(self, folder: Any) -> None:
        from smolstack.interop.reference import image_processor

        files = read_files(Path(folder))
        self.processor = build_processor(files, ModelConfig.from_hf(files.config))
        self.images = image_processor(self.processor.settings)

    def generate(self, model: Any, path: str, split: bool, tokens: int) -> None:
        """Generate tokens for an image file and a question, greedily."""
        with Image.open(path) as image:
            pixels = self.images(images=[image], do_image_splitting=split, return_tensors="pt")
            prompt = self.processor.prepare((image, QUESTION), split=split)
        ids = torch.tensor([prompt.token_ids])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"].to(model.dtype),
            pixel_attention_mask=pixels["pixel_attention_mask"],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=2,
        )


def asking(folder: str, dtype: str, threads: int) -> Callable[..., None]:
    """A worker's work: answer questions about image files."""
    torch.set_num_threads(threads)
    model, prompts = load(folder, dtype), _Prompts(folder)
    return lambda path, split, tokens: prompts.generate(model, path, split, tokens)
