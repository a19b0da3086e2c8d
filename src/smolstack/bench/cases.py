"""The cases of ``smolstack bench``: the same weights and inputs for smolstack and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from smolstack.batch import Batch
from smolstack.bench import answers
from smolstack.bench.timing import OURS, Case, Contender
from smolstack.checkpoint.new import new_checkpoint, random_model
from smolstack.family import Preset
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan, plan_tiles
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import cut_tiles, normalise
from smolstack.vlm import VLM, load

TRANSFORMERS = "transformers"
TILES = (1, 5, 17)
CONTEXTS = (100, 1200)
PROMPTS = (94, 1188)
NEW_TOKENS = 64
DECODE_STEPS = 8
# (width, height), and whether they are split: 1, 5, 13 and 17 tiles at 512 pixels.
PICTURES = (
    ((512, 512), False),
    ((1600, 300), True),
    ((1920, 1080), True),
    ((1024, 1024), True),
)


@dataclass
class Bench:
    """Models and inputs that cases share; made when first needed."""

    preset: Preset
    dtype: torch.dtype
    seed: int = 0

    @property
    def label(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def model(self) -> VisionLanguageModel:
        return random_model(self.preset.config, seed=self.seed, dtype=self.dtype)

    @cached_property
    def peer(self) -> Any | None:
        """transformers' model on the same tensors, or None where it is not installed."""
        try:
            from smolstack.interop.reference import share_model
        except ImportError:
            return None
        return share_model(self.model)

    def contenders(
        self, ours: Callable[[], object], theirs: Callable[[Any], object]
    ) -> list[Contender]:
        """smolstack's way and, where it is installed, transformers' way."""
        found = [Contender(OURS, ours)]
        if self.peer is not None:
            found.append(Contender(TRANSFORMERS, partial(theirs, self.peer)))
        return found

    def connector(self) -> Iterator[Case]:
        """Patch states to visual tokens."""
        config = self.preset.config
        for tiles in TILES:
            patches = self._noise(tiles, config.vision.side**2, config.vision.hidden_size)
            yield Case(
                f"connector, {tiles} tiles, {self.label}",
                self.contenders(
                    partial(self.model.connector, patches),
                    partial(_peer_connector, patches),
                ),
                flops=2 * tiles * config.tokens_per_tile * _weights(self.model.connector),
            )

    def vision(self) -> Iterator[Case]:
        """One tile through the tower."""
        vision = self.preset.config.vision
        tile = self._noise(1, 3, vision.image_size, vision.image_size)
        patches = vision.side**2
        linear = 2 * patches * _weights(self.model.vision.layers)
        attention = 4 * patches**2 * vision.hidden_size * vision.num_layers
        yield Case(
            f"vision, one tile, {self.label}",
            self.contenders(
                partial(self.model.vision, tile),
                lambda peer: peer.model.vision_model(pixel_values=tile),
            ),
            flops=linear + attention,
        )

    def prefill(self) -> Iterator[Case]:
        """A prompt of text tokens, up to the logits of the token after it."""
        for length in PROMPTS:
            ids = self._ids(length)
            yield Case(
                f"prefill, {length} tokens, {self.label}",
                self.contenders(
                    partial(self._prefill, ids),
                    partial(_peer_prefill, ids),
                ),
                flops=2 * length * _weights(self.model.decoder.layers),
            )

    def decode(self) -> Iterator[Case]:
        """New tokens one at a time, per token, after a context of some length."""
        head = self.model.head or self.model.decoder.embedding
        weights = _weights(self.model.decoder.layers) + _weights(head)
        size = self.dtype.itemsize
        for length in CONTEXTS:
            ids = self._ids(length)
            yield Case(
                f"decode, after {length} tokens, {self.label}",
                self.contenders(self._decoding(ids), _PeerDecoding(ids)),
                bytes_read=DECODE_STEPS * weights * size,
                units=DECODE_STEPS,
            )

    def images(self) -> Iterator[Case]:
        """A decoded picture to normalised tiles."""
        config, settings = self.preset.config, self.preset.settings
        for size, split in PICTURES:
            image = _picture(size)
            plan = plan_tiles(size, settings, config.tokens_per_tile, split)
            contenders = [
                Contender(
                    OURS,
                    partial(_tiles, image, plan, settings),
                )
            ]
            if self.peer is not None:
                from smolstack.interop.reference import image_processor

                peer = image_processor(settings)
                contenders.append(
                    Contender(
                        TRANSFORMERS,
                        partial(
                            peer, images=[image], do_image_splitting=split, return_tensors="pt"
                        ),
                    )
                )
            yield Case(f"images, {plan.tiles} tiles", contenders)

    def ask(self) -> Iterator[Case]:
        """A decoded picture and a question to an answer of 64 tokens."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            new_checkpoint(self.preset, path, seed=self.seed, dtype=self.label)
            vlm = load(path, dtype=self.label)
            vlm.eos_token_ids = ()
            for size, split in PICTURES:
                image = _picture(size)
                yield Case(
                    f"ask, {vlm.plan(size, split=split).tiles} tiles, {NEW_TOKENS} tokens, "
                    f"{self.label}",
                    self.contenders(
                        partial(_ask, vlm, image, split),
                        partial(_generate, vlm, image, split),
                    ),
                )

    def load(self) -> Iterator[Case]:
        """A checkpoint folder to a model that can be asked."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            new_checkpoint(self.preset, path, seed=self.seed, dtype=self.label)
            yield Case(
                f"load, {self.label}",
                self.contenders(
                    lambda: load(path, dtype=self.label),
                    lambda peer: type(peer).from_pretrained(path, dtype=self.dtype),
                ),
            )

    def structured(self) -> Iterator[Case]:
        """Tokens of answers that keep to a form."""
        return answers.structured(self.preset, self.dtype, self.seed)

    def questions(self) -> Iterator[Case]:
        """Several questions about one picture."""
        return answers.questions(self.preset, self.dtype, self.seed)

    def _noise(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def _ids(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        limit = min(self.preset.config.image_token_id, 40_000)
        return torch.randint(3, limit, (1, length), generator=generator)

    def _prefill(self, ids: Tensor) -> Tensor:
        batch = _text_batch(ids)
        return self.model.prefill(batch, self.model.new_cache(batch, ids.shape[1] + 1))

    def _decoding(self, ids: Tensor) -> Callable[[], object]:
        batch = _text_batch(ids)
        cache = self.model.new_cache(batch, ids.shape[1] + DECODE_STEPS)

        def run() -> None:
            if cache.length == 0:
                self.model.prefill(batch, cache)
            cache.truncate(ids.shape[1])
            token = ids[:, -1]
            for _ in range(DECODE_STEPS):
                token = self.model.decode_one_token(token, cache).argmax(dim=-1)

        return run


def _tiles(image: Image.Image, plan: TilePlan, settings: ImageSettings) -> Tensor:
    return normalise(cut_tiles(image, plan, settings), settings)


def _peer_connector(patches: Tensor, peer: Any) -> Any:
    return peer.model.connector(patches)


def _peer_prefill(ids: Tensor, peer: Any) -> Any:
    return peer(input_ids=ids, logits_to_keep=1, use_cache=True)


class _PeerDecoding:
    """transformers' decoding from the same context; its cache is cropped back after each run."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.cache = ids, None

    def __call__(self, peer: Any) -> None:
        if self.cache is None:
            self.cache = peer(input_ids=self.ids, use_cache=True, logits_to_keep=1).cache
        cache: Any = self.cache
        surplus = cache.get_seq_length() - self.ids.shape[1]
        if surplus:
            cache.crop(-surplus)
        token = self.ids[:, -1:]
        for _ in range(DECODE_STEPS):
            out = peer(input_ids=token, cache=cache, use_cache=True)
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)


def _ask(vlm: VLM, image: Image.Image, split: bool) -> None:
    """Ask as for the first time: what earlier rounds left to reuse is dropped."""
    vlm.forget()
    vlm.ask(image, "What does it say?", max_new_tokens=NEW_TOKENS, split=split)


def _generate(vlm: VLM, image: Image.Image, split: bool, peer: Any) -> None:
    """The same through transformers' image processor and generate; the prompt's ids are given."""
    from smolstack.interop.reference import image_processor

    processor = image_processor(vlm.processor.settings)
    pixels = processor(images=[image], do_image_splitting=split, return_tensors="pt")
    prompt = vlm.processor.prepare((image, "What does it say?"), split=split)
    ids = torch.tensor([prompt.token_ids])
    peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels["pixel_values"].to(peer.dtype),
        pixel_attention_mask=pixels["pixel_attention_mask"],
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=2,
    )


def _text_batch(ids: Tensor) -> Batch:
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, mask, torch.empty(0, 3, 1, 1), (), (0,) * len(ids))


def _picture(size: tuple[int, int]) -> Image.Image:
    """Noise that is smooth enough to be a picture: no two tiles are equal."""
    width, height = size
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def _weights(module: nn.Module) -> int:
    """Weights in matrices; norms and biases do not count."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
