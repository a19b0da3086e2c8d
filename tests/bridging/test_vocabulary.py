"""Image tokens join a tokenizer without moving anybody; templates learn to show images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from tests.bridging.conftest import MakeText, MakeVision

import smolstack
from smolstack.bridging import bridge_towers, plan_bridge
from smolstack.errors import ConfigError

IMAGE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def test_no_other_token_moves_and_new_rows_are_near_the_mean(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    text = make_text(tie_word_embeddings=False)
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged", longest_edge=96)
    before, after = (
        tokenizers.Tokenizer.from_file(str(f / "tokenizer.json")).get_vocab()
        for f in (text, bridged)
    )
    size = len(before)
    assert {token: after[token] for token in before} == before
    new = sorted(set(after) - set(before), key=after.__getitem__)
    assert new == [
        "<global-img>",
        "<row_1_col_1>",
        "<row_1_col_2>",
        "<row_2_col_1>",
        "<row_2_col_2>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
    ]
    assert [after[token] for token in new] == list(range(size, size + 8))
    model: Any = smolstack.load(bridged, device="cpu").model.requires_grad_(False)
    plain: Any = transformers.LlamaForCausalLM.from_pretrained(text).requires_grad_(False)
    for ours, theirs in (
        (model.decoder.embedding.weight, plain.model.embed_tokens.weight),
        (model.head.weight, plain.lm_head.weight),
    ):
        assert torch.equal(ours[:size], theirs)
        apart = ours[size:] - theirs.mean(dim=0)
        assert 0.01 < float(apart.std() / theirs.square().mean().sqrt()) < 0.03
        assert len({tuple(row) for row in ours[size:].tolist()}) == 8


def test_a_seed_gives_the_same_bytes(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    vision, text = make_vision(), make_text()
    folders = [
        bridge_towers(vision, text, tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2))
    ]
    found = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert found[0] == found[1] != found[2]


def test_rows_that_no_token_had_are_used_first(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """Tables are often padded to a round number of rows."""
    text = make_text(vocab_size=400)
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged")
    vlm = smolstack.load(bridged, device="cpu")
    assert vlm.config.text.vocab_size == 400
    plain: Any = transformers.LlamaForCausalLM.from_pretrained(text)
    same = (vlm.model.decoder.embedding.weight == plain.model.embed_tokens.weight).all(dim=1)
    new = vlm.processor.tokenizer.size - 330
    assert [i for i, equal in enumerate(same.tolist()) if not equal] == list(range(330, 330 + new))


def test_a_row_without_a_token_is_not_chosen_once_an_image_token_has_it(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """The rows that the image tokens do not take are chosen as before."""
    vision, found = make_vision(), {}
    for row in (335, 399):
        text = make_text(vocab_size=400, tie_word_embeddings=False)
        plain: Any = transformers.LlamaForCausalLM.from_pretrained(text)
        with torch.no_grad():
            states = plain.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
            plain.lm_head.weight[row] = 10 * states
        plain.save_pretrained(text)
        vlm = smolstack.load(bridge_towers(vision, text, tmp_path / str(row)), device="cpu")
        assert int(plain(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax()) == row
        with torch.no_grad():
            embeddings = vlm.model.decoder.embedding(torch.tensor([[5, 6, 7]]))
            logits = vlm.model.logits(vlm.model.decoder(embeddings))[0, -1]
            expected = plain(torch.tensor([[5, 6, 7]])).logits[0, -1]
        others = torch.tensor([*range(330), *range(vlm.processor.tokenizer.size, 400)])
        torch.testing.assert_close(logits[others], expected[others], atol=1e-4, rtol=0)
        found[row] = int(logits.argmax())
    assert found[335] != 335
    assert found[399] == 399


def test_a_tokenizer_that_has_image_tokens_keeps_them(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    text = make_text(vocab_size=340)
    tokenizer = tokenizers.Tokenizer.from_file(str(text / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>", "<end_of_utterance>"])
    tokenizer.save(str(text / "tokenizer.json"))
    planned = plan_bridge(make_vision(), text, longest_edge=48)
    assert planned.config.image_token_id == 330
    assert planned.added == {332: "<global-img>", 333: "<fake_token_around_image>"}


def test_ids_with_gaps_leave_no_room(make_vision: MakeVision, make_text: MakeText) -> None:
    text = make_text(vocab_size=600)
    data = json.loads((text / "tokenizer.json").read_text())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    data["model"]["merges"] = data["model"]["merges"][:-1]
    data["model"]["vocab"][last] = 340
    (text / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="ids up to 340; expected ids without gaps"):
        plan_bridge(make_vision(), text)


@pytest.mark.parametrize("flag", [True, False])
def test_a_begin_that_only_the_config_asks_for_is_told(
    make_vision: MakeVision, make_text: MakeText, flag: bool
) -> None:
    text = make_text()
    config = json.loads((text / "tokenizer_config.json").read_text())
    (text / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": flag}))
    notes = plan_bridge(make_vision(), text).notes
    said = "add_bos_token True, and tokenizer.json does not add one; the latter counts"
    assert any(said in note for note in notes) is flag


def test_a_begin_that_the_template_does_not_write_is_told(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    """transformers' tokenizers leave it out of chats, its processors do not."""
    text = make_text(chat="{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    tokenizer = tokenizers.Tokenizer.from_file(str(text / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(text / "tokenizer.json"))
    planned = plan_bridge(make_vision(), text)
    assert any(note.startswith("chats begin with <|endoftext|>") for note in planned.notes)
    bridged = planned.write(tmp_path / "bridged")
    auto: Any = transformers.AutoProcessor
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Which?"}]
    theirs = auto.from_pretrained(bridged).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    ours = smolstack.load(bridged, device="cpu").processor([(IMAGE, "Which?")]).token_ids
    assert ours.tolist() == theirs.tolist()
    assert ours[0, 0] == 0


def test_the_text_models_own_template_shows_images(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    bridged = bridge_towers(make_vision(), make_text(), tmp_path / "bridged")
    processor = smolstack.load(bridged, device="cpu").processor
    part, image = {"type": "text", "text": "Which?"}, {"type": "image"}
    assert processor.render([{"role": "user", "content": [image, part, image]}]) == (
        "<|im_start|>user\n<image>Which?<image><|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.render([{"role": "user", "content": "Which?"}]) == (
        "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("chosen", ["family", None])
def test_the_familys_template_is_for_models_without_their_own(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path, chosen: str | None
) -> None:
    text = make_text(chat=None)
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged", chat_template=chosen)
    vlm = smolstack.load(bridged, device="cpu")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    expected = "<|im_start|>User:<image>Which?<end_of_utterance>\nAssistant:"
    assert vlm.processor.render(asked) == expected
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    assert vlm.processor.render(said, answer_next=False) == (
        "<|im_start|>User: Which?<end_of_utterance>\nAssistant: This.<end_of_utterance>\n"
    )
    assert vlm.ask(IMAGE, "Which?", max_new_tokens=2).usage.visual_tokens == 13 * 36
    ends = json.loads((bridged / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, vlm.processor.tokenizer.token_id("<end_of_utterance>")]


def test_a_template_that_loses_the_image_is_refused(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    file = tmp_path / "lossy.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"lossy.jinja .*'user'.*<image>"):
        plan_bridge(make_vision(), make_text(), chat_template=file)
    with pytest.raises(ConfigError, match="expected 'text', 'family' or a Jinja file"):
        plan_bridge(make_vision(), make_text(), chat_template="mine")
    with pytest.raises(ConfigError, match=r"no chat template.*'family'"):
        plan_bridge(make_vision(), make_text(chat=None), chat_template="text")
