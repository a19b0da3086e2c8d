"""Whether modules are the ones that the compiled kernels compute.

Users modify models: they replace layers (fake-quantized ones are subclasses of ``nn.Linear``, and
parametrizations change a layer's class), activations or a ``forward``, or register hooks. The
kernels read weights and ignore all of these, so torch must compute such a model.
"""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle

from smolstack.config import TextConfig, VisionConfig
from smolstack.model.decoder import Decoder, TextAttention, TextLayer
from smolstack.model.hooks import globally_hooked, is_hooked
from smolstack.model.layers import ACTIVATION, Embedding, RMSNorm, TokenEmbedding
from smolstack.model.quantized import QuantizedLinear
from smolstack.model.vision import VisionAttention, VisionLayer

_CLASSES: tuple[type[nn.Module], ...] = (
    nn.ModuleList,
    nn.Linear,
    nn.LayerNorm,
    Embedding,
    TokenEmbedding,
    RMSNorm,
    QuantizedLinear,
    Decoder,
    TextLayer,
    TextAttention,
    VisionLayer,
    VisionAttention,
)
_BARE = frozenset({nn.ModuleList, nn.Linear, Embedding, TokenEmbedding, QuantizedLinear, Decoder})
_FORWARDS = {kind: kind.forward for kind in _CLASSES}


def is_plain(whole: nn.Module, config: TextConfig | VisionConfig) -> bool:
    """Return whether a module and its submodules have exactly the classes of ``model/``, their
    ``forward``, the numbers and activation of the config, and no hooks.
    """
    parts = list(whole.modules())
    kinds = set(map(type, parts))
    if not all(kind in _FORWARDS and kind.forward is _FORWARDS[kind] for kind in kinds):
        return False
    if globally_hooked() or any(map(is_hooked, parts)):
        return False
    return all(type(part) in _BARE or _as_configured(part, config) for part in parts)


def _as_configured(part: nn.Module, config: TextConfig | VisionConfig) -> bool:
    if isinstance(part, (TextLayer, VisionLayer)):
        return part.activation is ACTIVATION[config.hidden_act]
    if isinstance(part, VisionAttention):
        return part.num_heads == config.num_heads
    if isinstance(part, TextAttention):
        assert isinstance(config, TextConfig)
        return (part.num_heads, part.num_kv_heads) == (config.num_heads, config.num_kv_heads)
    if isinstance(part, (RMSNorm, nn.LayerNorm)):
        eps = config.rms_norm_eps if isinstance(config, TextConfig) else config.layer_norm_eps
        return part.eps == eps
    return True


class PlainDecoder:
    """Whether a decoder and its head are plain: checked completely at every prompt, and before a
    token only if a hook was registered since.
    """

    def __init__(self) -> None:
        self._plain, self._handles = False, -1

    def check(self, decoder: Decoder, head: nn.Module) -> bool:
        """Check all modules."""
        self._handles = RemovableHandle.next_id
        self._plain = is_plain(decoder, decoder.config) and (
            head is decoder.embedding or is_plain(head, decoder.config)
        )
        return self._plain

    def still(self, decoder: Decoder, head: nn.Module) -> bool:
        """Return the result of the last check; check again if torch has registered hooks since."""
        if self._handles != RemovableHandle.next_id:
            return self.check(decoder, head)
        return self._plain
