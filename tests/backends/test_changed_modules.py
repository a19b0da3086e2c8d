"""What users change in a model is computed, with and without compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations, prune

import smolstack
from smolstack.model.backend import TORCH
from smolstack.model.decoder import TextLayer
from smolstack.model.vision import VisionLayer
from smolstack.model.vlm import VisionLanguageModel

TEXT = "What does it say?"


class FakeQuantized(nn.Linear):
    """A linear layer as quantization-aware training has it: the same parameters, other results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def halve_output(_part: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def fake_quantize(parent: nn.Module, name: str) -> None:
    old: Any = getattr(parent, name)
    new = FakeQuantized(old.in_features, old.out_features, bias=old.bias is not None)
    new.weight, new.bias = old.weight, old.bias
    setattr(parent, name, new)


def layers(model: VisionLanguageModel) -> list[Any]:
    """The first layer of the decoder and that of the tower."""
    return [model.decoder.layers[0], model.vision.layers[0]]


def fake_quantized(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        fake_quantize(layer.attention, "value")
        fake_quantize(layer, "up")


def fake_quantized_head(model: VisionLanguageModel) -> None:
    fake_quantize(model, "head")
    fake_quantize(model.connector, "proj")


class FakeQuantizedTable(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, (self.weight * 8).round() / 8)


def fake_quantized_tables(model: VisionLanguageModel) -> None:
    for whole, name in ((model.decoder, "embedding"), (model.vision, "position_embedding")):
        old: Any = getattr(whole, name)
        new = FakeQuantizedTable(old.num_embeddings, old.embedding_dim)
        new.weight = old.weight
        setattr(whole, name, new)


def parametrized(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        nn.utils.parametrize.register_parametrization(layer.up, "weight", Halved())


def pruned(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        prune.l1_unstructured(layer.up, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def weight_normed(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        parametrizations.weight_norm(layer.up).parametrizations.weight.original0.data.mul_(0.5)


def weight_normed_by_hooks(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        nn.utils.weight_norm(layer.up).weight_g.data.mul_(0.5)


def other_activation(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        layer.activation = torch.relu


def other_epsilon(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        layer.mlp_norm.eps = 5.0


def other_class(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        own: Any = type(layer.mlp_norm)

        class Doubled(own):  # type: ignore[misc]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)  # type: ignore[no-any-return]

        layer.mlp_norm.__class__ = Doubled


def other_forward(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        forward = layer.mlp_norm.forward
        layer.mlp_norm.forward = lambda x, forward=forward: 2 * forward(x)


def adapters(model: VisionLanguageModel) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "up"], init_lora_weights=False)
    peft.LoraModel(model, config, "default")


def hooked_layers(model: VisionLanguageModel) -> None:
    for layer in layers(model):
        layer.register_forward_hook(halve_output)


def hooked_embeddings(model: VisionLanguageModel) -> None:
    model.vision.patch_embedding.register_forward_hook(halve_output)
    model.decoder.embedding.register_forward_hook(halve_output)


def hooked_connector_and_head(model: VisionLanguageModel) -> None:
    assert model.head is not None
    for part in (model.connector, model.head):
        part.register_forward_hook(halve_output)


CHANGES = [fake_quantized, fake_quantized_head, fake_quantized_tables]
CHANGES += [parametrized, pruned, weight_normed]
CHANGES += [weight_normed_by_hooks, other_activation, other_epsilon, other_class, other_forward]
CHANGES += [adapters, hooked_layers, hooked_embeddings, hooked_connector_and_head]


@pytest.fixture(params=["float32", "bfloat16"])
def load(request: pytest.FixtureRequest, tiny_folder: Path) -> Callable[[], smolstack.VLM]:
    return lambda: smolstack.load(tiny_folder, dtype=request.param)


def visual(vlm: smolstack.VLM, image: Image.Image) -> torch.Tensor:
    return vlm.encode(image).tokens.float()


@torch.inference_mode()
def logits(vlm: smolstack.VLM) -> torch.Tensor:
    """Logits after a prompt without images, and after one more token: (2, V)."""
    model = vlm.model
    batch = vlm.processor.batch([vlm.processor.prepare(TEXT)])
    cache = model.new_cache(batch, batch.token_ids.shape[1] + 1)
    first = model.prefill(batch, cache)
    return torch.cat((first, model.decode_one_token(torch.tensor([5]), cache))).float()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_computes_what_its_modules_compute(
    load: Callable[[], smolstack.VLM],
    images: list[Image.Image],
    change: Callable[[VisionLanguageModel], None],
) -> None:
    vlm, modules = load(), load()
    modules.model.use(TORCH)
    plain = visual(vlm, images[0]), logits(vlm)  # kernels and caches are there
    for one in (vlm, modules):
        change(one.model)
    close = 0.05 if vlm.model.dtype == torch.bfloat16 else 1e-4
    for found, expected, before in zip(
        (visual(vlm, images[0]), logits(vlm)),
        (visual(modules, images[0]), logits(modules)),
        plain,
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        assert (found - before).abs().max() > 0.01


@pytest.fixture
def halving() -> Iterator[Callable[[type], None]]:
    """Halves the outputs of all modules of a class by a hook of the whole process."""
    handles: list[Any] = []
    register: Any = nn.modules.module.register_module_forward_hook

    def halve(kind: type) -> None:
        def hook(part: nn.Module, _inputs: Any, output: torch.Tensor) -> Any:
            return output / 2 if isinstance(part, kind) else None

        handles.append(register(hook))

    yield halve
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", [TextLayer, VisionLayer, nn.Conv2d])
def test_a_hook_of_the_whole_process_computes(
    tiny_vlm: smolstack.VLM,
    images: list[Image.Image],
    halving: Callable[[type], None],
    kind: type,
) -> None:
    plain = visual(tiny_vlm, images[0]), logits(tiny_vlm)
    halving(kind)
    changed = [
        bool((new - old).abs().max() > 0.001)
        for new, old in zip((visual(tiny_vlm, images[0]), logits(tiny_vlm)), plain, strict=True)
    ]
    assert changed == [kind is not TextLayer, kind is TextLayer]


@pytest.mark.parametrize("kind", [TextLayer, VisionLayer])
def test_a_patched_class_computes(
    tiny_folder: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    vlm = smolstack.load(tiny_folder)
    plain = logits(vlm) if kind is TextLayer else visual(vlm, images[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args: forward(*args) / 2)
    fresh = smolstack.load(tiny_folder)
    found = logits(fresh) if kind is TextLayer else visual(fresh, images[0])
    assert (found - plain).abs().max() > 0.001


def test_a_hook_is_called_for_an_image_and_a_prompt_that_are_cached(
    tiny_folder: Path, images: list[Image.Image]
) -> None:
    vlm, calls = smolstack.load(tiny_folder), []
    plain = vlm.ask(images[0], TEXT, max_new_tokens=3).text
    handles = [
        part.register_forward_hook(lambda part, *_: calls.append(type(part).__name__))
        for part in (vlm.model.vision, vlm.model.decoder)
    ]
    for _ in range(2):
        del calls[:]
        assert vlm.ask(images[0], TEXT, max_new_tokens=3).text == plain
        assert set(calls) == {"VisionTower", "Decoder"}
        assert calls.count("Decoder") >= 3  # the prompt and every token
    for handle in handles:
        handle.remove()
    del calls[:]
    vlm.ask(images[0], TEXT, max_new_tokens=3)
    assert calls == []


def test_an_entry_on_disk_is_that_of_the_same_modules(
    tiny_folder: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    found = []
    for change in (lambda _: None, fake_quantized, other_activation, hooked_layers):
        vlm = smolstack.load(tiny_folder)
        vlm._image_cache.folder = tmp_path
        change(vlm.model)
        found.append(visual(vlm, images[0]))
    assert all((one - found[0]).abs().max() > 0.001 for one in found[1:])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # none with a hook


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replaced_or_trained_bias_counts(
    tiny_folder: Path, images: list[Image.Image], dtype: str
) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    layer: Any = vlm.model.vision.layers[0]
    first = visual(vlm, images[0])
    with torch.no_grad():
        layer.up.bias.add_(1)
    second = visual(vlm, images[0])
    layer.mlp_norm.bias = nn.Parameter(layer.mlp_norm.bias + 1)
    third = visual(vlm, images[0])
    assert (second - first).abs().max() > 0.001
    assert (third - second).abs().max() > 0.001
