"""The small files of published checkpoints, as data: their own keys and values.

Gathered from the files of the repositories named here; keys that no reader uses are represented by
a few of their kind. Nothing here is computed by smolstack, so that its presets and its readers are
checked against it. Values that were not seen in a file are marked "assumed".
"""

from __future__ import annotations

from dataclasses import replace

from tests.published import smol
from tests.published.forms import (
    GRANITE,
    GRANITE_TEMPLATE,
    IDEFICS3_TEMPLATE,
    INSTRUCT_TEMPLATE,
    LLAMA3,
    Json,
    Published,
    generation,
    image_processor,
    tokenizer_config,
)
from tests.published.smol import DEAD, SMOL_TOKENIZER, config_json

IDEFICS3_8B = Published(
    "HuggingFaceM4/Idefics3-8B-Llama3",
    config_json(
        "Idefics3",
        128257,
        2,
        {
            "architectures": ["VLlama3ForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "model_type": "llama",
            "neftune_noise_alpha": 0.0,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pad_token_id": 128002,
            "perceiver_config": DEAD,
            "pixel_shuffle_factor": 2,
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "use_resampler": False,
            "vocab_size": 128259,
        },
        {
            "hidden_size": 1152,
            "image_size": 364,
            "intermediate_size": 4304,
            "model_type": "idefics3",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
        transformers_version="4.44.0.dev0",
    ),
    image_processor("Idefics3", 1456, None),
    LLAMA3,
    tokenizer_config(
        "Idefics3",
        "<|begin_of_text|>",
        "<end_of_utterance>",
        "<|reserved_special_token_0|>",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=131072,
        unk_token=None,
    ),
    generation(128000, [128001, 128008, 128009, 128258], 128002, "4.44.0.dev0"),
    files={"chat_template.json": {"chat_template": IDEFICS3_TEMPLATE}},
    preset="idefics3-8b",
)
SMOLDOCLING = replace(
    smol.SMOLVLM_256M,
    repository="docling-project/SmolDocling-256M-preview",
    config={**smol.SMOLVLM_256M.config, "transformers_version": "4.50.0.dev0"},
    preset="smoldocling-256m",
)
GRANITE_DOCLING = Published(
    "ibm-granite/granite-docling-258M",
    {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "bos_token_id": 100264,
        "dtype": "bfloat16",
        "eos_token_id": 100257,
        "image_token_id": 100270,
        "model_type": "idefics3",
        "pad_token_id": 100257,
        "scale_factor": 4,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 100264,
            "dtype": "bfloat16",
            "eos_token_id": 100257,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 100257,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 100000.0,
            "use_cache": False,
            "vocab_size": 100352,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.56.1",
        "use_cache": False,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 768,
            "image_size": 512,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-06,
            "model_type": "idefics3_vision",
            "num_attention_heads": 12,
            "num_channels": 3,
            "num_hidden_layers": 12,
            "patch_size": 16,
        },
        "vocab_size": 100352,
    },
    image_processor("Idefics3", 2048, 512),
    GRANITE,
    {
        "additional_special_tokens": ["<fake_token_around_image>", "<image>"],
        "bos_token": "<|start_of_role|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|end_of_text|>",
        "extra_special_tokens": {},
        "model_max_length": 8192,
        "pad_token": "<|end_of_text|>",
        "padding_side": "right",
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "GPT2Tokenizer",
    },
    generation(100264, 100257, 100257, "4.56.1"),
    {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
    {
        "chat_template.jinja": GRANITE_TEMPLATE,
        "added_tokens.json": {"<end_of_utterance>": 100352},  # outside the vocabulary
    },
    preset="granite-docling-258m",
    head="tied",
)
# The flags of ties disagree, and so do the two bases of rotary positions; the text's counts.
CODE_FORMULA = replace(
    GRANITE_DOCLING,
    repository="docling-project/CodeFormulaV2",
    config={
        **GRANITE_DOCLING.config,
        "rope_theta": 100000.0,
        "text_config": {
            **GRANITE_DOCLING.config["text_config"],
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 100480,
        },
        "vocab_size": 100480,
    },
    vocabulary=replace(GRANITE, size=100480),
    preset=None,
)
_COLSMOL_FILES = {"chat_template.json": {"chat_template": INSTRUCT_TEMPLATE}}
COLSMOL_256M_BASE = replace(
    smol.SMOLVLM_256M,
    repository="vidore/ColSmolVLM-Instruct-256M-base",
    config={
        **smol.SMOLVLM_256M.config,
        "_name_or_path": "models/SmolVLM-Instruct-250M",
        "architectures": ["ColIdefics3"],
    },
    preprocessor={
        **image_processor("ColIdefics3", 2048, 512),
        "image_processor_type": "Idefics3ImageProcessor",
    },
    processor={"image_seq_len": 64, "processor_class": "ColIdefics3Processor"},
    tokenizer={**SMOL_TOKENIZER, "padding_side": "left"},
    generation={},
    files=_COLSMOL_FILES,
    preset="colsmol-256m",
    head="linear",
)
COLSMOL_500M_BASE = replace(
    COLSMOL_256M_BASE,
    repository="vidore/ColSmolVLM-Instruct-500M-base",
    config={
        **smol.SMOLVLM_500M.config,
        "_name_or_path": "models/SmolVLM-Instruct-500M",
        "architectures": ["ColIdefics3"],
    },
    preset="colsmol-500m",
)
COLSMOL_ADAPTER: Json = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "vidore/ColSmolVLM-Instruct-256M-base",
    "bias": "none",
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 32,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 32,
    "rank_pattern": {},
    "revision": None,
    "target_modules": (
        "(.*(model.text_model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
        "|.*(custom_text_proj).*$)"
    ),
    "task_type": "FEATURE_EXTRACTION",
    "use_dora": False,
    "use_rslora": False,
}

LANGUAGE_MODELS = (
    smol.SMOLVLM_256M,
    smol.SMOLVLM_256M_BASE,
    smol.SMOLVLM_500M,
    smol.SMOLVLM_500M_BASE,
    smol.SMOLVLM_2B,
    smol.SMOLVLM_2B_SYNTHETIC,
    smol.SMOLVLM_2B_BASE,
    smol.SMOLVLM2_256M,
    smol.SMOLVLM2_500M,
    smol.SMOLVLM2_500M_FIRST,
    smol.SMOLVLM2_2B,
    smol.SMOLVLM2_2B_BASE,
    IDEFICS3_8B,
    SMOLDOCLING,
    GRANITE_DOCLING,
    CODE_FORMULA,
)
RETRIEVAL_MODELS = (COLSMOL_256M_BASE, COLSMOL_500M_BASE)
