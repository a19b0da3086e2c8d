"""What trainers do to a registered model counts: smolstack steps aside where it was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.interop.conftest import Folder
from torch import nn
from torch.nn.utils import prune

transformers = pytest.importorskip("transformers")

from smolstack.model.decoder import Decoder  # noqa: E402

Inputs = dict[str, torch.Tensor]
BOUND = 1e-4


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs of smolstack's decoder."""
    found: list[int] = []
    own = Decoder.forward

    def counted(self: Decoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", counted)
    return found


class FakeQuantized(nn.Linear):
    """A linear layer as quantization-aware training has it: the same parameters, other results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 4).round() / 4, self.bias)


def fake_quantize(model: Any) -> None:
    attention = model.model.text_model.layers[0].self_attn
    layer = FakeQuantized(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    layer.weight = attention.q_proj.weight
    attention.q_proj = layer


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def parametrize_layer(model: Any) -> None:
    layer = model.model.text_model.layers[0].mlp.up_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())


def prune_layer(model: Any) -> None:
    layer = model.model.text_model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def normalize_weight(model: Any) -> None:
    layer = model.model.text_model.layers[0].mlp.up_proj
    nn.utils.weight_norm(layer).weight_g.data.mul_(0.5)


def replace_method(model: Any) -> None:
    own = model.model.connector.pixel_shuffle
    model.model.connector.pixel_shuffle = lambda *args: own(*args) * 0.5


def exchange_activation(model: Any) -> None:
    model.model.text_model.layers[1].mlp.act_fn = nn.ReLU()


def exchange_activation_of_tower(model: Any) -> None:
    model.model.vision_model.encoder.layers[0].mlp.activation_fn = nn.ReLU()


def replace_forward(model: Any) -> None:
    norm = model.model.text_model.norm
    norm.forward = lambda states: states * 0.5


def change_scale(model: Any) -> None:
    model.model.text_model.layers[1].self_attn.scaling *= 0.1


def change_scale_of_tower(model: Any) -> None:
    model.model.vision_model.encoder.layers[0].self_attn.scale *= 0.1


def change_epsilon(model: Any) -> None:
    model.model.text_model.norm.variance_epsilon = 0.5


def change_rotation(model: Any) -> None:
    model.model.text_model.rotary_emb.inv_freq.mul_(0.5)


def register_attention(model: Any) -> None:
    """An attention function of the user's own, as libraries of attention kernels add it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def half(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        states, weights = sdpa_attention_forward(*args, **kwargs)
        return states * 0.5, weights

    transformers.AttentionInterface.register("half", half)
    AttentionMaskInterface.register("half", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("half")


CHANGES = [fake_quantize, exchange_activation, exchange_activation_of_tower, replace_forward]
CHANGES += [change_scale, change_scale_of_tower, change_epsilon, change_rotation]
CHANGES += [register_attention, parametrize_layer, prune_layer, normalize_weight]
CHANGES += [replace_method]


@pytest.mark.parametrize(
    "change",
    CHANGES,
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "used"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's older weight_norm
def test_exchanged_parts_compute(
    folder: Folder,
    prompts: Inputs,
    runs: list[int],
    change: Callable[[Any], None],
    before: bool,
) -> None:
    theirs, ours = folder.theirs(), folder.ours()
    with torch.no_grad():
        plain = ours(**prompts).logits if before else folder.ours()(**prompts).logits
        del runs[:]
        for model in (theirs, ours):
            change(model)
        expected, found = theirs(**prompts).logits, ours(**prompts).logits
    real = prompts["attention_mask"].bool()
    assert not runs
    assert (expected - found)[real].abs().max() < BOUND
    assert (plain - found)[real].abs().max() > 1e-3


@pytest.mark.parametrize("how", ["forward", "class", "method"])
def test_a_patched_class_computes(
    folder: Folder, prompts: Inputs, runs: list[int], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Libraries of fused kernels replace the classes of transformers' modules, or their forward."""
    from transformers.models.llama import modeling_llama

    own: Any = modeling_llama.LlamaMLP

    class Halved(own):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(states)  # type: ignore[no-any-return]

    with torch.no_grad():
        plain = folder.ours()(**prompts).logits
        del runs[:]
        if how == "class":
            monkeypatch.setattr(modeling_llama, "LlamaMLP", Halved)
        elif how == "method":
            kind: Any = type(folder.theirs().model.connector)
            shuffle = kind.pixel_shuffle
            monkeypatch.setattr(kind, "pixel_shuffle", lambda *args: 0.5 * shuffle(*args))
        else:
            forward = own.forward
            monkeypatch.setattr(own, "forward", lambda self, states: 0.5 * forward(self, states))
        expected, found = (m(**prompts).logits for m in (folder.theirs(), folder.ours()))
    real = prompts["attention_mask"].bool()
    assert not runs
    assert (expected - found)[real].abs().max() < BOUND
    assert (plain - found)[real].abs().max() > 1e-3


def test_dropout_of_the_config_trains(folder: Folder, prompts: Inputs, runs: list[int]) -> None:
    ours = folder.ours()
    for part in ours.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    expected = ours(**prompts).logits
    assert runs
    del runs[:]
    ours.train()
    found = [ours(**prompts).logits for _ in range(2)]
    assert not runs
    assert (found[0] - found[1]).abs().max() > 1e-3
    ours.eval()
    assert torch.equal(ours(**prompts).logits, expected)
    assert runs


@contextmanager
def everywhere(register: Any, hook: Any) -> Iterator[None]:
    handle = register(hook)
    yield
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*backward hook")  # torch's, about outputs in dataclasses
@pytest.mark.parametrize(
    "kind", ["backward", "backward pre", "global forward", "global pre", "global backward", "head"]
)
def test_every_kind_of_hook_is_called(
    folder: Folder, prompts: Inputs, runs: list[int], kind: str
) -> None:
    model, seen = folder.ours(), []
    model(**prompts)  # the engine is there
    del runs[:]
    layer, every = model.model.text_model.layers[1], nn.modules.module

    def hook(part: nn.Module, *_: Any) -> None:
        if part is layer or part is model.lm_head:
            seen.append(part)

    around: AbstractContextManager[Any] = nullcontext()
    if kind == "backward":
        layer.register_full_backward_hook(hook)
    elif kind == "backward pre":
        layer.register_full_backward_pre_hook(hook)
    elif kind == "head":
        model.lm_head.register_forward_hook(hook)
    else:
        name = kind.removeprefix("global ").replace("pre", "forward_pre")
        name = name.replace("backward", "full_backward")
        around = everywhere(getattr(every, f"register_module_{name}_hook"), hook)
    with around:
        if kind == "head":
            with torch.no_grad():
                model.generate(**prompts, max_new_tokens=2, do_sample=False, eos_token_id=None)
        else:
            model(**prompts, labels=prompts["input_ids"]).loss.backward()
    assert seen
    if kind != "head":
        assert not runs


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_wishes_of_the_config_count(folder: Folder, prompts: Inputs, name: str) -> None:
    outs = []
    for model in (folder.theirs(), folder.ours()):
        model.set_attn_implementation("eager")
        setattr(model.config.text_config, name, True)
        with torch.no_grad():
            outs.append(model(**prompts, use_cache=False)[name.removeprefix("output_")])
    assert len(outs[0]) == len(outs[1]) > 1
    for theirs, ours in zip(*outs, strict=True):
        assert torch.equal(theirs, ours)


def test_return_dict_of_the_config_counts(folder: Folder, prompts: Inputs) -> None:
    outs = []
    for model in (folder.theirs(), folder.ours()):
        model.config.return_dict = False
        with torch.no_grad():
            outs.append(model(**prompts, use_cache=False, logits_to_keep=1))
            assert isinstance(model.model(**prompts, use_cache=False), tuple)
    assert isinstance(outs[1], tuple)
    assert (outs[0][0] - outs[1][0]).abs().max() < BOUND


@pytest.mark.parametrize("masked", [False, True])
def test_loss_on_left_padding_is_transformers(
    folder: Folder, prompts: Inputs, runs: list[int], masked: bool
) -> None:
    """A padded row's first word is predicted from padding, and its label is seldom masked."""
    labels = prompts["input_ids"].clone()
    labels[prompts["attention_mask"] == 0] = -100
    if masked:
        first = prompts["attention_mask"].argmax(dim=1)
        labels[torch.arange(len(labels)), first] = -100
    losses = [m(**prompts, labels=labels).loss for m in (folder.theirs(), folder.ours())]
    assert abs(float((losses[0] - losses[1]).detach())) < 1e-5
    assert bool(runs) is masked


def test_the_cache_is_a_dynamic_cache(folder: Folder, prompts: Inputs) -> None:
    ours = folder.ours()
    with torch.no_grad():
        assert isinstance(ours(**prompts, use_cache=True).cache, transformers.DynamicCache)
        out = ours.generate(**prompts, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, transformers.DynamicCache)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_of_two_caches_the_one_of_the_new_name_counts(folder: Folder) -> None:
    """peft's prefix tuning gives one by the old name beside that of ``generate``."""
    logits, ids = [], torch.tensor([[5, 6, 7]])
    for model in (folder.theirs(), folder.ours()):
        with torch.no_grad():
            first, second = (model(input_ids=ids + n, use_cache=True).cache for n in (0, 9))
            logits.append(model(input_ids=ids, cache=first, past_key_values=second).logits)
    assert (logits[0] - logits[1]).abs().max() < BOUND
