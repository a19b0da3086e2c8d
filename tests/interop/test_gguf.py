"""GGUF: a folder that smolstack saved is one that llama.cpp's own converter reads.

The tables of names are llama.cpp's (the package ``gguf``). With LLAMA_CPP set to a checkout of
llama.cpp, its converter itself runs as well, and what it wrote is compared weight by weight; with
LLAMA_CPP_PYTHON set to a Python that has llama-cpp-python (built with mtmd), so are answers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import smolstack
from smolstack.checkpoint.load import load_checkpoint
from smolstack.checkpoint.new import new_checkpoint, side_files
from smolstack.checkpoint.save import config_json, hf_state_dict, save_checkpoint
from smolstack.family import PRESETS, Preset
from smolstack.interop.miniature import miniature
from smolstack.interop.weights import sharp_model
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.prompt import user_message

ANSWERING = [preset for preset in PRESETS.values() if preset.config.embedding_dim is None]
# What the converter calls the classes that it knows: of the whole model and of its decoder.
WHOLE = {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"}
DECODER = "LlamaForCausalLM"
LLAMA_CPP = os.environ.get("LLAMA_CPP")
LLAMA_CPP_PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
ROOT = Path(__file__).parents[2]
# The converter knows tokenizers by a fingerprint, and one trained on the spot is none of them. The
# reader's has no merges, which llama.cpp does not expect: it gets one that never applies.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion import base
import gguf
load = gguf.SpecialVocab._load
def with_a_merge(self, path):
    load(self, path)
    self.merges = self.merges or ["\u0100 \u0100"]
gguf.SpecialVocab._load = with_a_merge
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
program = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [program, *sys.argv[2:]]
runpy.run_path(program, run_name="__main__")
"""


def names_of(preset: Preset) -> list[str]:
    with torch.device("meta"):
        return list(hf_state_dict(VisionLanguageModel(preset.config)))


def to_gguf(name: str, preset: Preset) -> str | None:
    """A weight's name in a GGUF file, by llama.cpp's tables; None where it has none."""
    if "vision_model" in name or "model.connector" in name:
        layers, part = preset.config.vision.num_layers, gguf.MODEL_ARCH.MMPROJ
    else:
        layers, part = preset.config.text.num_layers, gguf.MODEL_ARCH.LLAMA
        name = name.replace("text_model.", "")  # as the converter does
    table = gguf.get_tensor_name_map(part, layers)
    found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
    return found


@pytest.mark.parametrize("preset", ANSWERING, ids=lambda preset: preset.name)
def test_every_weight_has_a_name_of_its_own_in_llama_cpp(preset: Preset) -> None:
    small = miniature(preset)
    names = names_of(small)
    translated = {name: to_gguf(name, small) for name in names}
    assert [name for name, found in translated.items() if found is None] == []
    assert len(set(translated.values())) == len(names)


def test_the_names_are_those_that_mtmd_loads() -> None:
    small = miniature(PRESETS["smolvlm-256m"])
    expected = {
        "model.connector.modality_projection.proj.weight": "mm.model.fc.weight",
        "model.vision_model.embeddings.patch_embedding.bias": "v.patch_embd.bias",
        "model.vision_model.embeddings.position_embedding.weight": "v.position_embd.weight",
        "model.vision_model.encoder.layers.1.self_attn.out_proj.weight": "v.blk.1.attn_out.weight",
        "model.vision_model.post_layernorm.weight": "v.post_ln.weight",
        "model.text_model.embed_tokens.weight": "token_embd.weight",
        "model.text_model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "lm_head.weight": "output.weight",
    }
    assert set(expected) <= set(names_of(small))
    assert {name: to_gguf(name, small) for name in expected} == expected


@pytest.mark.parametrize("preset", ANSWERING, ids=lambda preset: preset.name)
def test_config_json_holds_what_the_converter_asks_for(preset: Preset) -> None:
    data = config_json(preset.config, torch.float32)
    text, vision = data["text_config"], data["vision_config"]
    assert data["architectures"][0] in WHOLE
    assert text["architectures"] == [DECODER]
    assert data["scale_factor"] == preset.config.scale
    assert {
        "num_hidden_layers": preset.config.text.num_layers,
        "hidden_size": preset.config.text.hidden_size,
        "intermediate_size": preset.config.text.intermediate_size,
        "num_attention_heads": preset.config.text.num_heads,
        "num_key_value_heads": preset.config.text.num_kv_heads,
        "head_dim": preset.config.text.head_dim,
        "max_position_embeddings": preset.config.text.max_positions,
        "rms_norm_eps": preset.config.text.rms_norm_eps,
        "vocab_size": preset.config.text.vocab_size,
    }.items() <= text.items()
    assert text["rope_parameters"]["rope_theta"] == preset.config.text.rope.theta
    if preset.config.text.rope.type == "llama3":
        assert {
            "rope_type",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        } <= set(text["rope_parameters"])
    assert {
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
    } <= set(vision)
    pixels = preset.settings.to_hf()
    assert pixels["size"]["longest_edge"] == preset.settings.longest_edge
    assert {"image_mean", "image_std"} <= set(pixels)


def test_the_tokenizer_is_read_with_its_merges_ends_and_chat_template(tiny_folder: Path) -> None:
    found = gguf.SpecialVocab(tiny_folder, load_merges=True)
    assert found.special_token_ids == {"bos": 1, "eos": 900, "pad": 2}
    assert found.merges
    assert found.chat_template == (tiny_folder / "chat_template.jinja").read_text()


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("name", ["smolvlm-256m", "smolvlm2-2.2b", "granite-docling-258m"])
def test_llama_cpps_converter_writes_every_weight_as_it_is(name: str, tmp_path: Path) -> None:
    small = miniature(PRESETS[name])
    folder = new_checkpoint(small, tmp_path / "model", seed=1)
    written = {**converted(folder, tmp_path, "--mmproj"), **converted(folder, tmp_path)}
    text = small.config.text
    for weight, tensor in hf_state_dict(load_checkpoint(folder).model).items():
        found = written.pop(str(to_gguf(weight, small)))
        expected = tensor.detach().numpy()
        if "text_model" in weight and weight.endswith(("q_proj.weight", "k_proj.weight")):
            heads = text.num_heads if "q_proj" in weight else text.num_kv_heads
            expected = as_llama_cpp_rotates(expected, heads)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected, err_msg=weight)
    assert set(written) <= {"rope_freqs.weight"}
    ours = smolstack.load(folder)
    read = smolstack.load(tmp_path / "model0.gguf", mmproj=tmp_path / "model1.gguf")
    for weight, tensor in hf_state_dict(ours.model).items():
        assert torch.equal(hf_state_dict(read.model)[weight], tensor), weight
    asked = ("examples/number.png", "What does it say, in 1234 words?")
    assert read.processor.prepare(asked).token_ids == ours.processor.prepare(asked).token_ids


@pytest.mark.skipif(
    None in (LLAMA_CPP, LLAMA_CPP_PYTHON), reason="LLAMA_CPP_PYTHON names no llama-cpp-python"
)
@pytest.mark.parametrize("name", ["reader", "smolvlm-256m"])
def test_llama_cpp_answers_as_smolstack_does(name: str, tmp_path: Path) -> None:
    folder = smolstack.load().folder
    if name != "reader":
        small = miniature(PRESETS[name])
        sharp = sharp_model(small.config, seed=1)
        folder = save_checkpoint(tmp_path / "model", sharp, side_files(small, small.config))
    vlm, image, question = smolstack.load(folder), ROOT / "examples/number.png", "What is it?"
    converted(folder, tmp_path)
    converted(folder, tmp_path, "--mmproj")
    files = [str(tmp_path / f"model{number}.gguf") for number in (0, 1)]
    prompt = vlm.processor.render([user_message(1, question)])
    newlines = json.dumps(vlm.processor.tokenizer.encode("\n") * 2)
    script = str(ROOT / "tests" / "interop" / "gguf_answers.py")
    command = [str(LLAMA_CPP_PYTHON), script, *files, prompt, "10", newlines, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = vlm.ask(image, question, max_new_tokens=10).token_ids
    assert tuple(json.loads(done.stdout)) == expected


def converted(folder: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Weights of the file that the converter writes, by name."""
    out = tmp_path / f"model{len(options)}.gguf"
    arguments = [str(LLAMA_CPP), str(folder), "--outtype", "f32", "--outfile", str(out), *options]
    subprocess.run([sys.executable, "-c", CONVERT, *arguments], check=True, capture_output=True)
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}


def as_llama_cpp_rotates(weight: Any, heads: int) -> Any:
    """Rows in the order of llama.cpp's rotation: pairs (2i, 2i + 1), not (i, i + K/2)."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "interop-gguf.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(block, "docs/interop-gguf.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == "mm.model.fc.weight\n"
