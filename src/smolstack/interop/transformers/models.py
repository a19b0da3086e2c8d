"""Models with transformers' interface that compute with smolstack.

Parameters, names, configs, loading, saving, ``generate`` and pipelines are transformers'. Only the
base model's forward pass is replaced: tower, connector, packer and decoder are smolstack's, on the
same parameters. For requests that smolstack does not support (attention weights, hidden states of
every layer, adapters, static caches, masks other than padding), transformers' own forward pass
runs, with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.cache_utils import Cache
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from smolstack.interop.transformers.cache import new_cache
from smolstack.interop.transformers.engine import EngineHolder
from smolstack.interop.transformers.images import Pooled, embed, encode, image_outputs
from smolstack.interop.transformers.inputs import (
    filled_grids,
    given_cache,
    left_padding,
    left_to_transformers,
    needs_transformers,
    same_positions,
    trains_padding,
)
from smolstack.interop.transformers.steps import Steps, Task

# Typed as Any: transformers is only partly annotated.
_Idefics3Model: Any = modeling_idefics3.Idefics3Model
_SmolVLMModel: Any = modeling_smolvlm.SmolVLMModel
_Idefics3WithHead: Any = modeling_idefics3.Idefics3ForConditionalGeneration
_SmolVLMWithHead: Any = modeling_smolvlm.SmolVLMForConditionalGeneration


class _ComputesWithSmolstack:
    """The base model's forward pass and image encoding, by smolstack where possible."""

    config: Any
    training: bool
    text_model: Any

    @property
    def _holder(self) -> EngineHolder:
        holder: EngineHolder = self.__dict__.setdefault("_smolstack", EngineHolder())
        return holder

    def get_image_features(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Return visual tokens in transformers' form: one (n·S, D) per row in ``pooler_output``.

        ``last_hidden_state`` is the tower's (N, H·W, C). All-zero tiles are padding, as in
        transformers.
        """
        more = needs_transformers(kwargs, self.config)
        engine = None if more else self._holder.get(self, check=True)
        if engine is None:
            return super().get_image_features(pixel_values, pixel_attention_mask, **kwargs)  # type: ignore[misc]
        rows, most = pixel_values.shape[:2]
        tiles = pixel_values.to(engine.dtype).flatten(0, 1)
        real = (tiles != 0).flatten(1).any(dim=1)
        filled = None
        if pixel_attention_mask is not None:
            masks = pixel_attention_mask.flatten(0, 1)[real]
            fits, filled = filled_grids(masks, engine.config.vision.patch_size)
            if not fits:
                return super().get_image_features(pixel_values, pixel_attention_mask, **kwargs)  # type: ignore[misc]
        states, visual = encode(engine, tiles[real], filled)
        counts: list[int] = real.view(rows, most).sum(dim=1).tolist()
        pooled = [part.flatten(0, 1) for part in torch.split(visual, counts)]
        return Pooled(last_hidden_state=states, pooler_output=pooled)

    def forward(  # noqa: PLR0917 - transformers' own order
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        mm_encoder_outputs: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return normalized states of every token; arguments and result are transformers'."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": given_cache(cache, kwargs),
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "mm_encoder_outputs": mm_encoder_outputs,
            "use_cache": use_cache,
        }
        task = self.smolstack_task(given, kwargs)
        if task is None:
            return super().forward(**given, **kwargs)  # type: ignore[misc]
        return self._output(
            last_hidden_state=task.states(), cache=task.cache, image_outputs=task.images
        )

    def smolstack_task(self, given: dict[str, Any], kwargs: Mapping[str, Any]) -> Task | None:
        """Return a call's embeddings and cache for smolstack's decoder; None: transformers' own
        runs.

        ``given`` are the arguments of :meth:`forward`; ``use_cache`` is set in place.
        """
        recomputes = self.training and getattr(self.text_model, "gradient_checkpointing", False)
        if given["use_cache"] is None:
            given["use_cache"] = bool(getattr(self.config, "use_cache", True))
        if recomputes:
            given["use_cache"] = False
        input_ids, inputs_embeds = given["input_ids"], given["inputs_embeds"]
        cache, pixel_values = given["cache"], given["pixel_values"]
        past = 0 if cache is None else int(cache.get_seq_length())
        engine = self._holder.get(self, check=past == 0)
        alone = cache is None and not given["use_cache"]
        padding, plain = left_padding(given["attention_mask"], past, alone=alone)
        new = _length(input_ids, inputs_embeds)
        images = pixel_values is not None or bool(given["mm_encoder_outputs"])
        if (
            engine is None
            or not plain
            or new == 0
            or (input_ids is None and images)
            or (input_ids is not None and inputs_embeds is not None)
            or (cache is not None and (cache.is_compileable or any(cache.is_sliding)))
            or not same_positions(given["position_ids"], padding, past, new)
            or needs_transformers(kwargs, self.config)
            or recomputes
            or left_to_transformers.get()
        ):
            return None
        if given["use_cache"] and cache is None:
            cache = new_cache(engine.config.text.num_layers)
        outputs = image_outputs(given["mm_encoder_outputs"])
        if pixel_values is not None:
            outputs = self.get_image_features(
                pixel_values, given["pixel_attention_mask"], return_dict=True
            )
        embeddings = embed(engine, input_ids, inputs_embeds, outputs)
        return Task(engine, embeddings, padding, cache, outputs)

    def _output(self, **values: Any) -> Any:
        raise NotImplementedError


class Idefics3Model(_ComputesWithSmolstack, _Idefics3Model):  # type: ignore[misc]
    """transformers' Idefics3Model, computed by smolstack."""

    def _output(self, **values: Any) -> Any:
        return modeling_idefics3.Idefics3BaseModelOutputWithPast(**values)


class SmolVLMModel(_ComputesWithSmolstack, _SmolVLMModel):  # type: ignore[misc]
    """transformers' SmolVLMModel, computed by smolstack."""

    def _output(self, **values: Any) -> Any:
        return modeling_smolvlm.SmolVLMBaseModelOutputWithPast(**values)


class _GeneratesWithSmolstack:
    """``generate`` with a cache that is written in place, by compiled kernels if possible."""

    config: Any
    model: Any
    lm_head: Any

    def forward(  # noqa: PLR0917 - transformers' own order
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        mm_encoder_outputs: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Return logits and loss; arguments and result are transformers'."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": given_cache(cache, kwargs),
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "mm_encoder_outputs": mm_encoder_outputs,
            "use_cache": use_cache,
        }
        last = isinstance(logits_to_keep, int) and (
            logits_to_keep == 1 or _length(input_ids, inputs_embeds) == 1
        )
        # Without gradients and for one position, as in generate, kernels can compute everything.
        task = None
        if last and labels is None and not torch.is_grad_enabled():
            task = self.model.smolstack_task(given, kwargs)
        if task is None:
            own = trains_padding(labels, attention_mask)
            before = left_to_transformers.set(own or left_to_transformers.get())
            try:
                return super().forward(  # type: ignore[misc]
                    **given, labels=labels, logits_to_keep=logits_to_keep, **kwargs
                )
            finally:
                left_to_transformers.reset(before)
        steps: Steps = self.__dict__.setdefault("_smolstack_steps", Steps())
        logits = steps.next_logits(task, self.lm_head)
        return self._output(logits=logits, cache=task.cache, image_outputs=task.images)

    def _output(self, **values: Any) -> Any:
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        kind = generation_config.cache_implementation
        ordinary = kind in (None, "dynamic") and generation_config.use_cache is not False
        if ordinary and all(model_kwargs.get(n) is None for n in ("cache", "past_key_values")):
            model_kwargs["cache"] = new_cache(self.config.text_config.num_hidden_layers)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


class Idefics3ForConditionalGeneration(_GeneratesWithSmolstack, _Idefics3WithHead):  # type: ignore[misc]
    """transformers' Idefics3ForConditionalGeneration, computed by smolstack."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = Idefics3Model

    def _output(self, **values: Any) -> Any:
        return modeling_idefics3.Idefics3CausalLMOutputWithPast(**values)


class SmolVLMForConditionalGeneration(_GeneratesWithSmolstack, _SmolVLMWithHead):  # type: ignore[misc]
    """transformers' SmolVLMForConditionalGeneration, computed by smolstack."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = SmolVLMModel

    def _output(self, **values: Any) -> Any:
        return modeling_smolvlm.SmolVLMCausalLMOutputWithPast(**values)


_REGISTERED: tuple[tuple[Any, Any, Any], ...] = (
    (AutoModelForImageTextToText, transformers.Idefics3Config, Idefics3ForConditionalGeneration),
    (AutoModelForImageTextToText, transformers.SmolVLMConfig, SmolVLMForConditionalGeneration),
    (AutoModel, transformers.Idefics3Config, Idefics3Model),
    (AutoModel, transformers.SmolVLMConfig, SmolVLMModel),
)


def register() -> None:
    """Make transformers' auto classes and pipelines build these models.

    ``AutoModelForImageTextToText.from_pretrained``, ``AutoModel.from_pretrained`` and
    ``pipeline("image-text-to-text")`` then load Idefics3 and SmolVLM checkpoints as the classes of
    this module. Saved files are the same as those of transformers.
    """
    for auto, config, model in _REGISTERED:
        auto.register(config, model, exist_ok=True)


def unregister() -> None:
    """Undo :func:`register`: transformers' auto classes build their own models again."""
    for auto, config, _ in _REGISTERED:
        auto._model_mapping._extra_content.pop(config, None)


def _length(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = input_ids if input_ids is not None else inputs_embeds
    return 0 if given is None else given.shape[1]
