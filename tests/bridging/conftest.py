"""Plain towers of other projects, made by transformers in miniature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

MakeText: TypeAlias = Callable[..., Path]
MakeVision: TypeAlias = Callable[..., Path]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
# RoPE parameters of language models.
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WORDS = (
    "How are you today? The quick brown fox jumps over the lazy dog. What is the total? It is 42.",
    "user assistant system: which number is larger, and why? Describe the image in detail, please.",
)


@pytest.fixture(scope="session")
def make_vision(tmp_path_factory: pytest.TempPathFactory) -> MakeVision:
    """``make_vision(whole=…, …)``: a SiglipVisionModel's folder, or a whole SiglipModel's."""

    def make(*, whole: bool = False, processor: bool = True, **changes: Any) -> Path:
        sizes = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 48,
            "patch_size": 8,
            **changes,
        }
        folder = tmp_path_factory.mktemp("siglip") / "model"
        torch.manual_seed(1)
        model: Any
        if whole:
            text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
            text |= {"num_attention_heads": 2, "vocab_size": 50}
            model = transformers.SiglipModel(
                transformers.SiglipConfig(text_config=text, vision_config=sizes)
            )
        else:
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
        _roughen(model)
        model.save_pretrained(folder)
        if processor:
            edge = sizes["image_size"]
            transformers.SiglipImageProcessor(
                size={"height": edge, "width": edge}, image_mean=[0.4, 0.5, 0.6]
            ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_text(tmp_path_factory: pytest.TempPathFactory) -> MakeText:
    """``make_text(…)``: a LlamaForCausalLM's folder with a tokenizer and a chat template."""

    def make(*, chat: str | None = CHAT, dtype: str = "float32", **changes: Any) -> Path:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(WORDS, trainer)
        fast: Any = transformers.PreTrainedTokenizerFast
        wrapped = fast(
            tokenizer_object=tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            additional_special_tokens=["<|endoftext|>"],
        )
        if chat is not None:
            wrapped.chat_template = chat
        sizes = {
            "vocab_size": len(wrapped),
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            **changes,
        }
        folder = tmp_path_factory.mktemp("llama") / "model"
        torch.manual_seed(2)
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        _roughen(model)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        wrapped.save_pretrained(folder)
        return folder

    return make


def _roughen(model: torch.nn.Module) -> None:
    """Weights by which every forgotten bias, norm or position shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in name else parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(std=0.1)
