"""The decoder: one token at a time is the same as all at once; padding is seen by nobody."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from smolstack.config import RopeConfig, TextConfig
from smolstack.errors import ContextLengthError
from smolstack.model.decoder import Decoder, rope_frequencies
from smolstack.model.kv_cache import KVCache

CONFIG = TextConfig(
    rope=RopeConfig(theta=10000.0),
    vocab_size=50,
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(2)
    return Decoder(CONFIG).eval()


@torch.no_grad()
@pytest.mark.parametrize("split", [(7,), (1,) * 7, (3, 4), (2, 1, 1, 3)])
def test_a_cache_filled_in_any_steps_gives_the_same_states(
    decoder: Decoder, split: tuple[int, ...]
) -> None:
    x = torch.randn(2, 7, 24)
    cache = KVCache(CONFIG, 2, 7)
    parts = [decoder(part, cache=cache) for part in torch.split(x, list(split), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("split", [(8,), (5, 1, 1, 1), (5, 3)])
def test_left_padding_changes_nothing(decoder: Decoder, split: tuple[int, ...]) -> None:
    short, padded = torch.randn(1, 5, 24), torch.randn(2, 8, 24)
    padded[0, 3:] = short
    cache = KVCache(CONFIG, 2, 8, padding=torch.tensor([3, 0]))
    together = torch.cat(
        [decoder(p, cache=cache) for p in torch.split(padded, list(split), 1)], dim=1
    )
    torch.testing.assert_close(together[:1, 3:], decoder(short), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], decoder(padded[1:]), atol=1e-5, rtol=1e-4)
    assert torch.isfinite(together).all()


@torch.no_grad()
def test_a_kernel_may_lay_out_its_result_as_it_likes(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's for float32 has heads and tokens the other way round in memory."""
    x = torch.randn(2, 4, 24)
    expected = decoder(x)
    attend = functional.scaled_dot_product_attention

    def strided(*args: Any, **options: Any) -> torch.Tensor:
        return attend(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", strided)
    cache = KVCache(CONFIG, 2, 4)
    parts = [decoder(part, cache=cache) for part in torch.split(x, 1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_state(decoder: Decoder) -> None:
    x = torch.randn(1, 6, 24)
    changed = x.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(decoder(x)[:, :4], decoder(changed)[:, :4])


@torch.no_grad()
def test_a_truncated_cache_goes_on_from_the_shared_prefix(decoder: Decoder) -> None:
    x, y = torch.randn(1, 6, 24), torch.randn(1, 6, 24)
    y[:, :4] = x[:, :4]
    cache = KVCache(CONFIG, 1, 6)
    decoder(x, cache=cache)
    cache.truncate(4)
    torch.testing.assert_close(
        decoder(y[:, 4:], cache=cache), decoder(y)[:, 4:], atol=1e-5, rtol=1e-4
    )


def test_a_full_cache_refuses_more(decoder: Decoder) -> None:
    cache = KVCache(CONFIG, 1, 3)
    with pytest.raises(ContextLengthError, match=r"4 tokens .* for 3"):
        decoder(torch.zeros(1, 4, 24), cache=cache)


def test_plain_frequencies_are_powers_of_theta() -> None:
    found = rope_frequencies(RopeConfig(theta=10000.0), 8)
    assert found.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_linear_scaling_divides_every_frequency() -> None:
    plain = rope_frequencies(RopeConfig(theta=10000.0), 8)
    assert torch.equal(
        rope_frequencies(RopeConfig(theta=10000.0, type="linear", factor=4.0), 8), plain / 4
    )


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = rope_frequencies(RopeConfig(500000.0), 128), rope_frequencies(rope, 128)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
