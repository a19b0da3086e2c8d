"""Language models of other shapes with other tokenizers: bridged, verified, asked and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tests.bridging.conftest import CHAT, LINEAR, LLAMA3, WORDS, MakeText, MakeVision
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import smolstack
from smolstack.bridging import bridge_towers
from smolstack.cli.app import app
from smolstack.train import Recipe, train

IMAGE = Image.effect_noise((120, 70), 90).convert("RGB")
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LINEAR_ROPE = {"rope_parameters": LINEAR}
LLAMA3_ROPE = {"rope_parameters": LLAMA3}


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=[*MARKS, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(WORDS, trainer)
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=[*MARKS, "[UNK]"], show_progress=False
    )
    made.train_from_iterator(WORDS, trainer)
    return made


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2 and TinyLlama have it: a space is ▁, and unknown characters are bytes."""
    octets = [f"<0x{number:02X}>" for number in range(256)]
    vocabulary = {t: i for i, t in enumerate(["<unk>", *MARKS, *octets, "▁", *"Howareyutd?"])}
    merges = [("H", "o"), ("Ho", "w"), ("▁", "a"), ("▁a", "r"), ("▁ar", "e")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(MARKS)
    return made


KINDS = {"unigram": unigram, "wordpiece": wordpiece, "sentencepiece": sentencepiece_bpe}


def retokenize(folder: Path, kind: str, *, begins: bool, named: dict[str, str]) -> None:
    """Give a language model's folder another tokenizer with at most as many tokens."""
    made = KINDS[kind]()
    if begins:
        number = made.token_to_id("<|im_start|>")
        made.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)]
        )
    fast: Any = transformers.PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=made, **named)
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder)


ALL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("unigram", LINEAR_ROPE, {"begins": True, "named": ALL}),
    ("wordpiece", {"num_key_value_heads": 1}, {"begins": False, "named": ALL}),
    (
        "wordpiece",
        {**LLAMA3_ROPE, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2},
        {"begins": False, "named": {"eos_token": "<|im_end|>"}},
    ),
    (
        "sentencepiece",
        {"head_dim": 16, "tie_word_embeddings": False, "dtype": "bfloat16", "eos_token_id": 3},
        {"begins": True, "named": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
    ),
    (
        "unigram",
        {"attention_bias": True, "mlp_bias": True, "dtype": "float16"},
        {"begins": False, "named": {**ALL, "unk_token": "<unk>"}},
    ),
]


@pytest.mark.parametrize(("kind", "shape", "tokens"), CASES)
def test_a_language_model_of_another_kind_lives_on(
    make_vision: MakeVision,
    make_text: MakeText,
    tmp_path: Path,
    kind: str,
    shape: dict[str, Any],
    tokens: dict[str, Any],
) -> None:
    # Rows without a token are replaced by those of the image tokens, so that a model with random
    # weights must not have any that it generates.
    text = make_text(**{"vocab_size": KINDS[kind]().get_vocab_size(), **shape})
    retokenize(text, kind, **tokens)
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged", dtype="float32")
    checked = CliRunner().invoke(app, ["verify", str(bridged)])
    assert checked.exit_code == 0, checked.output

    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (text, bridged))
    for words in (*WORDS, "Übergröße 42 €"):
        assert before.encode(words).ids == after.encode(words).ids

    plain: Any = transformers.LlamaForCausalLM.from_pretrained(text, dtype=torch.float32)
    vlm = smolstack.load(bridged, device="cpu")
    for question in ("How are you today?", "Which number is larger, and why?"):
        ids = torch.tensor([vlm.processor.prepare(question).token_ids])
        auto: Any = transformers.AutoTokenizer.from_pretrained(text)
        asked = [{"role": "user", "content": question}]
        chat = auto.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        assert ids[0].tolist()[-len(chat["input_ids"]) :] == chat["input_ids"]
        out = plain.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
        answer = vlm.ask(None, question, max_new_tokens=16)
        assert list(answer.token_ids) == out[0, ids.shape[1] :].tolist()

    theirs: Any = transformers.Idefics3ForConditionalGeneration.from_pretrained(bridged)
    processors: Any = transformers.AutoProcessor
    processor = processors.from_pretrained(bridged)
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is the total?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = vlm.processor([(IMAGE, "What is the total?")])
    assert batch.token_ids.tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, vlm.model(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert vlm.ask(IMAGE, "Which?", max_new_tokens=2).usage.visual_tokens == 13 * 36

    IMAGE.save(tmp_path / "1.png")
    row = {"image": str(tmp_path / "1.png"), "question": "Which?", "text": "it is 42"}
    stage = {"steps": 1, "batch": 1, "warmup": 0, "learning_rate": 1e-2}
    recipe = Recipe.from_dict(
        {
            "model": str(bridged),
            "output": str(tmp_path / "run"),
            "data": {"train": "images", "split": False},
            "evaluation": {"answers": 0},
            "stages": [{**stage, "train": "connector+text"}],
        }
    )
    trained = train(recipe, rows=[row], quiet=True)
    one, other = (load_file(f / "model.safetensors") for f in (bridged, Path(trained.model)))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert any("connector" in name for name in changed)
    assert any("text_model" in name for name in changed)
    assert not any("vision_model" in name for name in changed)


def test_weights_in_several_files_are_one_model(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    text, sharded = make_text(tie_word_embeddings=False), tmp_path / "sharded"
    plain: Any = transformers.LlamaForCausalLM.from_pretrained(text)
    plain.save_pretrained(sharded, max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (sharded / name).write_bytes((text / name).read_bytes())
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    vision = make_vision()
    one, two = (
        bridge_towers(vision, source, tmp_path / name) / "model.safetensors"
        for source, name in ((text, "one"), (sharded, "two"))
    )
    assert one.read_bytes() == two.read_bytes()


def test_pickled_weights_are_refused(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    text, vision = make_text(), make_vision()
    for folder in (text, vision):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        pair = (vision, make_text()) if folder is vision else (make_vision(), text)
        with pytest.raises(smolstack.errors.CheckpointError, match="safetensors"):
            bridge_towers(*pair, tmp_path / "bridged")
