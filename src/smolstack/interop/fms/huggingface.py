"""Hugging Face interfaces of the FMS model: ``to_hf_api``, ``hf_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fms.models.hf.modeling_hf_adapter import HFModelArchitecture
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.idefics3 import configuration_idefics3

from smolstack.checkpoint.files import read_json
from smolstack.checkpoint.verify import settle_head
from smolstack.checkpoint.weights import INDEX, SINGLE, read_entries
from smolstack.config import ModelConfig
from smolstack.errors import ConfigError
from smolstack.interop.fms.config import Idefics3Config, to_fms_config, to_smolstack_config
from smolstack.interop.fms.inputs import attention_mask as fms_mask
from smolstack.interop.fms.inputs import positions
from smolstack.interop.fms.model import Idefics3

# Typed as Any: transformers is only partly annotated.
_TransformersConfig: Any = configuration_idefics3.Idefics3Config
# The name of the KV cache in transformers' outputs changed within version 5.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def build_idefics3_params(config: Any) -> dict[str, Any]:
    """Return FMS's model parameters for a transformers config, for ``get_model("hf_pretrained",
    …)``.

    If the config comes from a folder, the folder's config.json is read strictly instead, and the
    weights determine whether the head is tied or a retrieval head.

    Raises:
        ConfigError, CheckpointError: the folder, its config or its weights cannot be used.
    """
    folder = Path(getattr(config, "name_or_path", "") or "")
    if (folder / "config.json").is_file():
        own = ModelConfig.from_hf(read_json(folder / "config.json"))
        if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
            own = settle_head(own, read_entries(folder))
    else:
        own = ModelConfig.from_hf(config.to_dict())
    return dict(vars(to_fms_config(own)))


class HFAdaptedIdefics3Config(_TransformersConfig):  # type: ignore[misc]
    """transformers' Idefics3Config under a different name, so that saved folders can be loaded."""

    model_type = "hf_adapted_idefics3"

    @classmethod
    def from_fms_config(cls, config: Idefics3Config, **overrides: Any) -> HFAdaptedIdefics3Config:
        """Convert the config of an FMS model."""
        own = to_smolstack_config(config)
        data = own.to_hf()
        data["vision_config"]["model_type"] = "idefics3_vision"
        data |= {
            "model_type": cls.model_type,
            "architectures": ["HFAdaptedIdefics3ForConditionalGeneration"],
            "bos_token_id": own.text.bos_token_id,
            "eos_token_id": list(own.text.eos_token_ids) or None,
            "fused_weights": config.fused_weights,
        }
        found: HFAdaptedIdefics3Config = cls.from_dict(data, **overrides)
        return found


class HFAdaptedIdefics3ForConditionalGeneration(HFModelArchitecture, GenerationMixin):  # type: ignore[misc]
    """An FMS model with transformers' forward pass and ``generate``; weights are shared."""

    config_class = HFAdaptedIdefics3Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _tied_weights_keys = {  # noqa: RUF012 - transformers' own form
        "model.language_model.head.weight": "model.language_model.base_model.embedding.weight"
    }

    def __init__(self, config: Any, model: Idefics3 | None = None) -> None:
        super().__init__(None, config)
        if model is None:
            own = to_fms_config(ModelConfig.from_hf(config.to_dict()))
            model = Idefics3(own, fused_weights=bool(getattr(config, "fused_weights", True)))
        if model.config.embedding_dim is not None or model._vision_only:
            raise ConfigError("to_hf_api needs a model with a language head")
        self.model = model

    @classmethod
    def _hf_model_from_fms(
        cls, model: Idefics3, config: Any
    ) -> HFAdaptedIdefics3ForConditionalGeneration:
        return cls(config, model)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.language_model.base_model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        head: nn.Module = self.model.language_model.head
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.model.language_model.head = value

    def forward(  # noqa: PLR0917 - transformers' own order
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        """As transformers' Idefics3ForConditionalGeneration, without attentions and hidden states.

        Images are read with the prompt; with later tokens they are ignored.
        """
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else int(cache.get_seq_length())
        embeddings = self._embed(input_ids, inputs_embeds, past, pixel_values, pixel_attention_mask)
        use_cache = bool(self.config.use_cache if use_cache is None else use_cache)
        if use_cache and cache is None:
            cache = DynamicCache()
        options = _attention(attention_mask, past, embeddings)
        if position_ids is not None:
            options["position_ids"] = position_ids[:, -embeddings.shape[1] :]
        outputs = self.model.language_model(
            embeddings,
            past_key_value_states=_held(cache, self.config.text_config.num_hidden_layers, past),
            use_cache=use_cache,
            last_n_tokens=0 if labels is not None else int(logits_to_keep),
            **options,
        )
        logits = outputs[0] if use_cache else outputs
        if use_cache:
            for layer, (keys, values) in enumerate(outputs[1]):
                cache.update(keys[:, :, past:], values[:, :, past:], layer)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output: Any = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
        return output if return_dict is not False else output.to_tuple()

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: int,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if past or pixel_values is None or pixel_values.numel() == 0:
            embedded: Tensor = self.model.embedding(input_ids)
            return embedded
        return self.model.merge(
            input_ids,
            pixel_values=pixel_values,
            **(
                {}
                if pixel_attention_mask is None
                else {"pixel_attention_mask": pixel_attention_mask}
            ),
        )


def _attention(mask: Tensor | None, past: int, embeddings: Tensor) -> dict[str, Tensor]:
    """Return FMS's mask and positions for transformers' mask, (B, past + T), 1 on real tokens."""
    rows, new = embeddings.shape[:2]
    if mask is not None and mask.dim() != 2:
        raise ConfigError(
            f"attention_mask has shape {tuple(mask.shape)}, expected (sequences, tokens)"
        )
    if mask is None or bool(mask.all()):
        if past == 0 or new == 1:
            return {}
        mask = torch.ones(rows, past + new, device=embeddings.device)
    return {"mask": fms_mask(mask.bool(), new), "position_ids": positions(mask.bool(), new)}


def _held(cache: Any, layers: int, past: int) -> list[tuple[Tensor, Tensor]] | None:
    """Return keys and values in FMS's form: a pair (B, kv heads, L, K) per layer."""
    if not past:
        return None
    return [(cache.layers[i].keys, cache.layers[i].values) for i in range(layers)]
