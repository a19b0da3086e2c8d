"""Work is not done twice, and nobody can tell from the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smolstack
from smolstack.batch import VisualTokens
from smolstack.generation.image_cache import ImageCache
from smolstack.model.vision import VisionTower
from smolstack.model.vlm import VisionLanguageModel


@pytest.fixture
def vlm(tiny_folder: Path) -> smolstack.VLM:
    """A model whose caches are empty."""
    return smolstack.load(tiny_folder)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of tiles that went through the tower and tokens that went through the decoder."""
    counts = {"tiles": 0, "tokens": 0}
    tower = VisionTower.forward
    read = VisionLanguageModel.prefill_embeddings
    decode = VisionLanguageModel.decode_one_token

    def count_tiles(self: VisionTower, tiles: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts["tiles"] += tiles.shape[0]
        return tower(self, tiles, *rest)

    def count_read(
        self: VisionLanguageModel, x: torch.Tensor, *rest: Any, **named: Any
    ) -> torch.Tensor:
        counts["tokens"] += x.shape[0] * x.shape[1]
        return read(self, x, *rest, **named)

    def count_decoded(self: VisionLanguageModel, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts["tokens"] += len(tokens)
        return decode(self, tokens, *rest)

    monkeypatch.setattr(VisionTower, "forward", count_tiles)
    monkeypatch.setattr(VisionLanguageModel, "prefill_embeddings", count_read)
    monkeypatch.setattr(VisionLanguageModel, "decode_one_token", count_decoded)
    return counts


def fresh(folder: Path, *args: Any, **options: Any) -> tuple[int, ...]:
    """The answer of a model that has seen nothing before."""
    return smolstack.load(folder).ask(*args, **options).token_ids


def test_an_image_is_encoded_once_however_it_is_given(
    vlm: smolstack.VLM, work: dict[str, int], images: list[Image.Image], tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    images[0].save(path)
    vlm.ask(path, "What?", max_new_tokens=2)
    assert work["tiles"] == 9
    for again in (path, str(path), path.read_bytes()):
        vlm.ask(again, "And what else?", max_new_tokens=2)
    vlm.ask_many([(path, "What?"), ([path, path], "Twice?")], max_new_tokens=2)
    assert work["tiles"] == 9
    vlm.image_cache.clear()
    vlm.ask(path, "What?", max_new_tokens=2)
    assert work["tiles"] == 18


def test_what_changes_the_result_is_part_of_the_key(
    vlm: smolstack.VLM, work: dict[str, int], images: list[Image.Image], tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    images[0].save(path)
    first = vlm.encode(path)
    assert torch.equal(vlm.encode(path, split=False).tokens, vlm.encode(path, split=False).tokens)
    assert len(vlm.encode(path, split=False)) == 4
    images[1].save(path)  # another image under the same name
    assert vlm.encode(path).source == images[1].size
    images[0].save(path)
    with torch.no_grad():
        vlm.model.connector.proj.weight.mul_(2)  # other weights
    torch.testing.assert_close(vlm.encode(path).tokens, first.tokens * 2)


def test_images_that_differ_only_beside_their_pixels_are_two(vlm: smolstack.VLM) -> None:
    indices = Image.fromarray(np.zeros((32, 32), dtype=np.uint8), mode=None).convert("P")
    black, white = indices.copy(), indices.copy()
    black.putpalette([0, 0, 0] + [9] * 765)
    white.putpalette([255, 255, 255] + [9] * 765)
    assert not torch.equal(vlm.encode(black).tokens, vlm.encode(white).tokens)


def test_the_memory_of_images_is_limited(vlm: smolstack.VLM) -> None:
    def visual(tokens: int) -> VisualTokens:
        return VisualTokens(torch.zeros(1, tokens, 1), 0, 0, (1, 1))

    cache = ImageCache(vlm.model, max_bytes=40)
    cache.put(b"a", visual(4))
    cache.put(b"b", visual(4))
    assert cache.get(b"a") is not None  # used just now, so b goes first
    cache.put(b"c", visual(5))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    cache.put(b"huge", visual(11))
    assert cache.get(b"huge") is None
    assert (len(cache), cache.held_bytes) == (2, 36)


def test_images_are_kept_on_disk_for_the_next_process(
    tiny_folder: Path, work: dict[str, int], images: list[Image.Image], tmp_path: Path
) -> None:
    def asked() -> tuple[smolstack.VLM, tuple[int, ...]]:
        vlm = smolstack.load(tiny_folder)
        vlm.image_cache.folder = tmp_path / "kept"
        return vlm, vlm.ask(images[0], "What?", max_new_tokens=4).token_ids

    _, first = asked()
    assert work["tiles"] == 9
    vlm, second = asked()
    assert work["tiles"] == 9  # read from disk
    assert second == first == fresh(tiny_folder, images[0], "What?", max_new_tokens=4)
    work["tiles"] = 0
    with torch.no_grad():
        vlm.model.connector.proj.weight.mul_(2)  # other weights, other entries
    vlm.image_cache.clear()
    vlm.encode(images[0])
    assert work["tiles"] == 9
    (kept, other) = sorted((tmp_path / "kept").iterdir())
    for path in (kept, other):
        path.write_bytes(path.read_bytes()[:100])  # torn by a power cut
    asked()
    assert work["tiles"] == 18


def test_the_folder_of_images_is_limited(tiny_folder: Path, tmp_path: Path) -> None:
    vlm = smolstack.load(tiny_folder)
    vlm.image_cache.folder = tmp_path
    vlm.image_cache.max_folder_bytes = 20_000
    for shade in range(40):
        vlm.encode(np.full((20, 20, 3), shade, dtype=np.uint8), split=False)
    kept = list(tmp_path.iterdir())
    assert 0 < len(kept) < 40
    assert sum(path.stat().st_size for path in kept) <= 20_000


def test_a_folder_that_cannot_be_written_to_costs_no_answer(
    tiny_folder: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    (tmp_path / "file").write_text("no folder")
    vlm = smolstack.load(tiny_folder)
    vlm.image_cache.folder = tmp_path / "file"
    answer = vlm.ask(images[0], "What?", max_new_tokens=4)
    assert answer.token_ids == fresh(tiny_folder, images[0], "What?", max_new_tokens=4)


def test_a_second_question_reads_only_what_is_new(
    vlm: smolstack.VLM, tiny_folder: Path, work: dict[str, int], images: list[Image.Image]
) -> None:
    visual = vlm.encode(images[0])
    first = vlm.ask(visual, "What does it say?", max_new_tokens=3)
    assert work["tokens"] == first.usage.prompt_tokens + 2
    work["tokens"] = 0
    second = vlm.ask(visual, "How many lines are there?", max_new_tokens=3)
    assert work["tokens"] < second.usage.prompt_tokens - visual.tokens.shape[0] * 4
    assert second.token_ids == fresh(
        tiny_folder, images[0], "How many lines are there?", max_new_tokens=3
    )
    again = vlm.ask(visual, "What does it say?", max_new_tokens=3)
    assert again.token_ids == first.token_ids


def test_a_chat_goes_on_where_it_was(
    vlm: smolstack.VLM, tiny_folder: Path, work: dict[str, int], images: list[Image.Image]
) -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    ]
    for turn in range(3):
        answer = vlm.ask(images[0], messages=chat, max_new_tokens=5)
        assert answer.token_ids == fresh(tiny_folder, images[0], messages=chat, max_new_tokens=5)
        chat += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": f"And then, {turn}?"},
        ]
    work.update(tiles=0, tokens=0)
    answer = vlm.ask(images[0], messages=chat, max_new_tokens=1)
    assert work["tiles"] == 0
    assert work["tokens"] < answer.usage.prompt_tokens / 2


def test_another_image_in_the_same_words_is_read_anew(
    vlm: smolstack.VLM, tiny_folder: Path, images: list[Image.Image]
) -> None:
    turned = images[0].transpose(Image.Transpose.ROTATE_180)
    vlm.ask(images[0], "What?", max_new_tokens=5)
    assert vlm.ask(turned, "What?", max_new_tokens=5).token_ids == fresh(
        tiny_folder, turned, "What?", max_new_tokens=5
    )


def test_an_abandoned_answer_spoils_nothing(
    vlm: smolstack.VLM, tiny_folder: Path, images: list[Image.Image]
) -> None:
    one = vlm.stream(images[0], "What?", max_new_tokens=20)
    other = vlm.stream(images[0], "What?", max_new_tokens=20)
    next(one)
    assert "".join(other).strip() == other.answer.text
    next(one)
    third = vlm.ask(images[0], "What?", max_new_tokens=20)
    expected = fresh(tiny_folder, images[0], "What?", max_new_tokens=20)
    assert other.answer.token_ids == third.token_ids == expected


def test_streaming_leaves_autograd_as_it_was(vlm: smolstack.VLM, images: list[Image.Image]) -> None:
    for _ in vlm.stream(images[0], "What?", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_what_the_prompts_of_a_batch_begin_with_is_read_once(
    vlm: smolstack.VLM, work: dict[str, int], images: list[Image.Image]
) -> None:
    questions = ["What?", "And what else is to be seen in this image?", "Is it red or blue?"]
    alone = [vlm.ask(images[0], question, max_new_tokens=6) for question in questions]
    lengths = [answer.usage.prompt_tokens for answer in alone]
    vlm.clear_caches()
    work.update(tiles=0, tokens=0)
    together = vlm.ask_many([(images[0], q) for q in questions], max_new_tokens=6)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    # The beginning once; the ends of all, which alone would be three times the longest prompt.
    assert work["tiles"] == 9
    assert max(lengths) < work["tokens"] < sum(lengths)


def test_prompts_that_begin_otherwise_share_nothing(
    vlm: smolstack.VLM, work: dict[str, int], images: list[Image.Image]
) -> None:
    prompts: list[Any] = [(images[0], "What?"), (images[1], "What?"), ([], "What?")]
    alone = [vlm.ask(*prompt, max_new_tokens=4).token_ids for prompt in prompts]
    vlm.clear_caches()
    work.update(tokens=0)
    together = vlm.ask_many(prompts, max_new_tokens=4)
    assert [answer.token_ids for answer in together] == alone
    assert work["tokens"] == sum(answer.usage.prompt_tokens + 3 for answer in together)
