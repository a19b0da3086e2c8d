"""A decode step is the whole forward pass, whatever the sizes and however many threads share it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch

from smolstack.backends import accelerate
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.model.kv_cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.native import library as native
from smolstack.quantization.quantize import quantize_model

THREADS = (1, 2, 3, 5, 8, 16)
TOKENS = 7


def sizes(count: int) -> Iterator[dict[str, int]]:
    """Hidden and intermediate sizes that 16 does not divide, few channels for many threads."""
    pick = random.Random(7)
    yield {"hidden": 24, "intermediate": 352, "kv_heads": 1, "group": 3, "head_dim": 8}
    yield {"hidden": 312, "intermediate": 10, "kv_heads": 1, "group": 3, "head_dim": 8}
    for _ in range(count):
        yield {
            "hidden": 8 * pick.randint(1, 44),
            "intermediate": pick.randint(1, 400),
            "kv_heads": pick.randint(1, 3),
            "group": pick.randint(1, 3),
            "head_dim": 8 * pick.randint(1, 4),
        }


def model_of(
    hidden: int, intermediate: int, kv_heads: int, group: int, head_dim: int
) -> VisionLanguageModel:
    text = TextConfig(
        rope=RopeConfig(theta=10000.0),
        vocab_size=101,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=2,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=64,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )
    vision = VisionConfig(16, 16, 1, 2, image_size=16, patch_size=8)
    torch.manual_seed(hidden * 1000 + intermediate)
    config = ModelConfig(vision, text, scale=2, image_token_id=100)
    return accelerate(VisionLanguageModel(config).eval())


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_step_is_the_whole_pass_at_any_number_of_threads(
    kind: str, many_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = native.library()
    for size in sizes(10):
        model = model_of(**size)
        if kind.startswith("int"):
            quantize_model(model, kind)
        else:
            model = model.to(getattr(torch, kind))
        tokens = torch.randint(3, 100, (TOKENS,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            monkeypatch.setattr(native, "library", lambda: None)
            plain = copy.deepcopy(model).float()
            states = plain.decoder(plain.decoder.embedding(tokens[None]))
            expected = plain.logits(states)[0]
            monkeypatch.setattr(native, "library", lambda: kernels)
            alone = None
            for threads in THREADS:
                torch.set_num_threads(threads)
                cache = KVCache(model.config.text, 1, TOKENS + 1, dtype=model.cache_dtype)
                found = torch.cat([model.decode_one_token(t[None], cache) for t in tokens])
                alone = found if alone is None else alone
                assert torch.equal(found, alone), (size, threads)
            assert alone is not None
            error = (alone - expected).norm() / expected.norm()
            assert error < (1e-4 if kind == "float32" else 0.05), (size, float(error))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_prompt_is_the_whole_pass_at_any_number_of_threads(
    kind: str, many_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = native.library()
    same = kernels is not None  # torch sums by the number of threads
    pick = random.Random(3)
    for size in sizes(6):
        model, count = model_of(**size), pick.randint(1, 60)
        if kind.startswith("int"):
            quantize_model(model, kind)
        else:
            model = model.to(getattr(torch, kind))
        tokens = torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            monkeypatch.setattr(native, "library", lambda: None)
            plain = copy.deepcopy(model).float()
            expected = plain.logits(plain.decoder(plain.decoder.embedding(tokens[None])))[0, -1]
            monkeypatch.setattr(native, "library", lambda: kernels)
            embeddings = model.decoder.embedding(tokens[None])
            alone = None
            for threads in THREADS:
                torch.set_num_threads(threads)
                cache = KVCache(model.config.text, 1, count + 1, dtype=model.cache_dtype)
                found = model.prefill_embeddings(embeddings, cache)[0]
                alone = found if alone is None else alone
                assert not same or torch.equal(found, alone), (size, count, threads)
            assert alone is not None
            error = (alone - expected).norm() / expected.norm()
            assert error < (1e-4 if kind == "float32" else 0.05), (size, count, float(error))
