"""transformers' model, image processor and processor, for comparison with smolstack's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3Model
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

from smolstack.batch import Batch
from smolstack.checkpoint.save import config_json, hf_state_dict
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.settings import ImageSettings

VERSION: str = transformers.__version__
# Typed as Any: transformers is only partly annotated.
_AUTO_MODEL: Any = AutoModelForImageTextToText
BASE_MODELS = {"idefics3": Idefics3Model, "smolvlm": SmolVLMModel}
SmolVLMProcessor = processing_smolvlm.SmolVLMProcessor
IMAGE_PROCESSORS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}


def share_model(model: VisionLanguageModel) -> Any:
    """Return transformers' model on smolstack's tensors: built on the meta device, nothing copied.

    A retrieval model (``embedding_dim``) becomes a :class:`RetrievalReference`.
    """
    config = CONFIG_MAPPING[model.config.model_type].from_dict(
        config_json(model.config, model.dtype)
    )
    retrieval = model.config.embedding_dim is not None
    with torch.device("meta"):
        if retrieval:
            theirs = BASE_MODELS[model.config.model_type](config)
        else:
            theirs = _AUTO_MODEL.from_config(config)
    state = hf_state_dict(model)
    head = {name: state.pop(name) for name in list(state) if name.startswith("linear.")}
    if retrieval:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    _, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    left = [name for name, tensor in theirs.named_parameters() if tensor.is_meta]
    if unexpected or left:
        raise RuntimeError(
            f"transformers' model has no values for {left} and no parameters {unexpected}"
        )
    base = theirs if retrieval else theirs.model
    # The only buffer that is not in checkpoints: computed on the real device.
    base.text_model.rotary_emb = LlamaRotaryEmbedding(config.text_config)
    return RetrievalReference(theirs, head).eval() if retrieval else theirs.eval()


class RetrievalReference(nn.Module):
    """The structure of ColSmol: transformers' base model, a linear layer, unit length per token.

    Args:
        model: an Idefics3Model or SmolVLMModel.
        head: "linear.weight" and "linear.bias".
    """

    def __init__(self, model: Any, head: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        weight = head["linear.weight"]
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.linear.load_state_dict(
            {name.removeprefix("linear."): value for name, value in head.items()}, assign=True
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return embeddings (B, T, E), zero on padding, as colpali-engine computes them."""
        states = self.model(**inputs).last_hidden_state
        unit: Tensor = self.linear(states)
        unit = unit / unit.norm(dim=-1, keepdim=True)
        return unit * inputs["attention_mask"][..., None]


def load_model(folder: str | Path, dtype: str = "float32", attention: str | None = None) -> Any:
    """Return transformers' model of a checkpoint folder, with "sdpa" or "eager" attention if
    given.
    """
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    options = {} if attention is None else {"attn_implementation": attention}
    return _AUTO_MODEL.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()


def image_processor(settings: ImageSettings, model_type: str = "idefics3") -> Any:
    """Return transformers' Pillow image processor with the settings of a checkpoint."""
    data = settings.to_hf()
    for name in ("image_processor_type", "processor_class"):
        data.pop(name)
    return IMAGE_PROCESSORS[model_type](**data)


def load_processor(folder: str | Path, model_type: str = "idefics3", **options: Any) -> Any:
    """Return transformers' processor of a checkpoint folder, without video support.

    ``AutoProcessor`` requires torchvision for SmolVLM folders, even for images; here the parts are
    loaded separately.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = IMAGE_PROCESSORS[model_type].from_pretrained(folder)
    if model_type == "idefics3":
        return Idefics3Processor.from_pretrained(
            folder, image_processor=images, tokenizer=tokenizer, **options
        )
    settings, _ = SmolVLMProcessor.get_processor_dict(folder)
    module: Any = processing_smolvlm
    if module.num2words is None:
        module.num2words = str  # only used to spell out a video's number of frames
    return _ImagesOnly(
        images,
        tokenizer,
        _NoVideos(),
        image_seq_len=settings["image_seq_len"],
        chat_template=settings.get("chat_template"),
        **options,
    )


class _NoVideos:
    """Placeholder for the video processor of SmolVLM's processor."""

    num_frames, fps = 0, 1
    model_input_names = ("pixel_values",)


class _ImagesOnly(SmolVLMProcessor):
    """SmolVLM's processor without the check of its video processor's type."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        check: Any = super().check_argument_for_proper_class
        return check(argument_name, argument)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return a Batch in the form of transformers' models: tiles (B, most tiles, 3, P, P), padded
    with zeros.

    Partly filled tiles result in a ``pixel_attention_mask`` (the caller's tiles must be cropped or
    padded accordingly).
    """
    inputs = {
        "input_ids": batch.token_ids,
        "attention_mask": batch.attention_mask.long(),
    }
    counts = batch.tiles_per_sequence
    if not sum(counts):
        return inputs
    pixels = batch.tiles.new_zeros(len(batch), max(counts), *batch.tiles.shape[1:])
    start = 0
    for row, count in enumerate(counts):
        pixels[row, :count] = batch.tiles[start : start + count]
        start += count
    return {**inputs, "pixel_values": pixels}


def pixel_mask(grids: list[tuple[int, int]], size: int, patch: int) -> Tensor:
    """Return which pixels of tiles contain image, (N, size, size) bool, for (rows, columns) of
    patches.
    """
    mask = torch.zeros(len(grids), size, size, dtype=torch.bool)
    for index, (rows, columns) in enumerate(grids):
        mask[index, : rows * patch, : columns * patch] = True
    return mask
