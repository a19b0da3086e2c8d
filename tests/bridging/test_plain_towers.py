"""Any SigLIP and any Llama become one checkpoint, in which both are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tests.bridging.conftest import LINEAR, LLAMA3, MakeText, MakeVision

import smolstack
from smolstack.bridging import bridge_towers

TEXTS: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False, "head_dim": 16},
    {"rope_parameters": LLAMA3, "num_attention_heads": 4, "num_key_value_heads": 4},
    {"rope_parameters": LINEAR},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    {"vocab_size": 400, "tie_word_embeddings": False},
    {"dtype": "bfloat16"},
]


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return Image.effect_noise((120, 70), 90).convert("RGB")


@pytest.mark.parametrize("changes", TEXTS, ids="-".join)
def test_text_answers_are_those_of_the_plain_model(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = make_text(**changes)
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged", dtype="float32")
    plain: Any = transformers.LlamaForCausalLM.from_pretrained(text, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(text)
    vlm = smolstack.load(bridged, device="cpu")
    for question in ("How are you today?", "Which number is larger, and why? It is 42."):
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        assert list(vlm.processor.prepare(question).token_ids) == ids[0].tolist()
        out = plain.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)
        answer = vlm.ask(None, question, max_new_tokens=24)
        expected = out[0, ids.shape[1] :].tolist()
        assert list(answer.token_ids) == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("changes", TEXTS[:4], ids="-".join)
def test_transformers_computes_the_same(
    make_vision: MakeVision,
    make_text: MakeText,
    photo: Image.Image,
    tmp_path: Path,
    changes: dict[str, Any],
    whole: bool,
) -> None:
    bridged = bridge_towers(make_vision(whole=whole), make_text(**changes), tmp_path / "bridged")
    theirs: Any = transformers.Idefics3ForConditionalGeneration.from_pretrained(bridged)
    auto: Any = transformers.AutoProcessor
    processor = auto.from_pretrained(bridged)
    vlm = smolstack.load(bridged, device="cpu")
    content = [{"type": "image"}, {"type": "text", "text": "What is the total?"}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[photo], return_tensors="pt")
    batch = vlm.processor([(photo, "What is the total?")])
    assert batch.token_ids.tolist() == inputs["input_ids"].tolist()
    torch.testing.assert_close(batch.tiles, inputs["pixel_values"][0], atol=1e-6, rtol=0)
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, vlm.model(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert int((batch.token_ids == vlm.config.image_token_id).sum()) == 13 * 36


def test_the_vision_tower_is_the_siglip(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """Patch states after the last norm, which the connector reads."""
    folder = make_vision()
    bridged = bridge_towers(folder, make_text(), tmp_path / "bridged")
    plain: Any = transformers.SiglipVisionModel.from_pretrained(folder)
    tiles = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = plain(pixel_values=tiles).last_hidden_state
        found = smolstack.load(bridged, device="cpu").model.vision(tiles)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ({"image_size": 52, "patch_size": 8}, 36),  # as SigLIP-so400m, 384 pixels by 14
        ({"image_size": 56, "patch_size": 8, "hidden_act": "gelu"}, 49),
        ({"image_size": 64, "patch_size": 4, "num_attention_heads": 4}, 64),
    ],
)
def test_grids_of_other_sizes(
    make_vision: MakeVision,
    make_text: MakeText,
    photo: Image.Image,
    tmp_path: Path,
    sizes: dict[str, Any],
    tokens: int,
) -> None:
    bridged = bridge_towers(make_vision(**sizes), make_text(), tmp_path / "bridged")
    theirs: Any = transformers.Idefics3ForConditionalGeneration.from_pretrained(bridged)
    auto: Any = transformers.AutoProcessor
    processor, vlm = auto.from_pretrained(bridged), smolstack.load(bridged, device="cpu")
    assert vlm.config.tokens_per_tile == tokens
    inputs = processor(text="<image>Which?", images=[photo], return_tensors="pt")
    batch = vlm.processor([(photo, "Which?")])
    torch.testing.assert_close(batch.tiles, inputs["pixel_values"][0], atol=1e-6, rtol=0)
    with torch.no_grad():
        pooled = theirs.model.get_image_features(
            inputs["pixel_values"], inputs["pixel_attention_mask"]
        ).pooler_output
        found = vlm.model.encode_tiles(batch.tiles)
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(list(pooled)), atol=1e-4, rtol=0)
