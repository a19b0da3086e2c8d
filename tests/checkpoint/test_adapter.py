"""A fine-tune that was published as an adapter is loaded by its name, like any other model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smolstack
from smolstack.checkpoint.adapter import ROWS, WEIGHTS
from smolstack.errors import CheckpointError
from smolstack.interop.reference import load_model

TEXT = "model.text_model"
LAYER = "model.text_model.layers.1.mlp.down_proj"
QUERY = "model.text_model.layers.0.self_attn.q_proj"


def write(
    folder: Path, base: Path | str, tensors: dict[str, torch.Tensor], **settings: Any
) -> Path:
    """An adapter folder with the least that peft writes."""
    folder.mkdir()
    known = {"peft_type": "LORA", "lora_alpha": 16, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **settings}))
    save_file(tensors, str(folder / WEIGHTS))
    return folder


def pair(layer: str, out: int, rank: int, inputs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"base_model.model.{layer}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"base_model.model.{layer}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", tiny_folder, pair(LAYER, 48, 4, 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj", "out_proj"]},
        {"r": 4, "target_modules": "all-linear", "bias": "all", "init_lora_weights": "gaussian"},
        {"r": 2, "use_rslora": True, "target_modules": r".*text_model.*(q_proj|up_proj)"},
        {
            "r": 4,
            "target_modules": ["k_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {r"layers\.0\.self_attn\.k_proj": 3},
            "modules_to_save": ["connector.modality_projection.proj"],
        },
        {
            "r": 4,
            "use_dora": True,
            "target_modules": ["q_proj", "down_proj", "out_proj", "fc1", "proj"],
        },
        {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 861, 900]},
        {
            "r": 4,
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"text_model.embed_tokens": [7, 5]},
        },
    ],
)
def test_logits_are_those_of_peft_on_transformers(
    settings: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(tiny_folder), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            biased = name.endswith("bias") and "bias" in settings
            trained = ("lora_B", "modules_to_save", "magnitude", "trainable_tokens")
            if any(kind in name for kind in trained) or biased:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "config.json").exists()

    vlm = smolstack.load(tmp_path / "adapter")
    batch = vlm.processor([("examples/number.png", "What does it say?")])
    with torch.no_grad():
        theirs = model(
            input_ids=batch.token_ids,
            attention_mask=batch.attention_mask.long(),
            pixel_values=batch.tiles[None],
        ).logits
        ours = vlm.model(batch)
        before = smolstack.load(tiny_folder).model(batch)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - before).abs().max() > 0.1


def test_it_is_saved_as_a_whole_checkpoint(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    vlm = smolstack.load(adapter)
    smolstack.load(vlm.save(tmp_path / "whole"))
    ours, base = (
        load_file(str(place / "model.safetensors")) for place in (tmp_path / "whole", tiny_folder)
    )
    tensors = load_file(str(adapter / WEIGHTS)).values()
    low, high = sorted(tensors, key=lambda tensor: tensor.shape[0])
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {f"{LAYER}.weight"}
    expected = base[f"{LAYER}.weight"] + 16 / 4 * high @ low
    assert torch.allclose(ours[f"{LAYER}.weight"], expected, atol=1e-6)


def test_its_own_files_come_before_those_of_its_base(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    settings["size"] = {"longest_edge": 64}
    (adapter / "preprocessor_config.json").write_text(json.dumps(settings))
    vlm = smolstack.load(adapter)
    assert smolstack.load(tiny_folder).plan((640, 640)).tiles == 17
    assert vlm.plan((640, 640)).tiles == 5
    assert smolstack.load(vlm.save(tmp_path / "whole")).plan((640, 640)).tiles == 5


def test_a_retrieval_model_may_be_one(retrieval_folder: Path, tmp_path: Path) -> None:
    """The published ColSmol checkpoints are adapters."""
    folder = write(tmp_path / "adapter", retrieval_folder, pair(QUERY, 48, 4, 48))
    before, after = (
        smolstack.load(place).embed_queries(["What was the profit?"])[0]
        for place in (retrieval_folder, folder)
    )
    assert before.shape == after.shape
    assert (before - after).abs().max() > 0.01


def test_an_adapter_beside_whole_weights_is_applied_to_the_base_that_it_names(
    adapter: Path, tiny_folder: Path, tied_folder: Path
) -> None:
    """As transformers reads such a folder: vidore/colSmol-256M had both at one revision."""
    expected = smolstack.load(adapter).model.state_dict()
    shutil.copy(tiny_folder / "model.safetensors", adapter)
    found = smolstack.load(adapter).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.copytree(tiny_folder, adapter, dirs_exist_ok=True)
    beside = smolstack.load(adapter, base=adapter).model.state_dict()
    assert all(torch.equal(beside[name], expected[name]) for name in expected)
    other = smolstack.load(adapter, base=tied_folder)
    assert other.config.tied


def test_a_base_that_is_not_there_is_given_another_way(adapter: Path, tiny_folder: Path) -> None:
    expected = smolstack.load(adapter).model.state_dict()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "./models/renamed"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"\(--base\)"):
        smolstack.load(adapter)
    found = smolstack.load(adapter, base=tiny_folder).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.copytree(tiny_folder, adapter / "models" / "renamed")
    found = smolstack.load(adapter).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_is_for_adapters_alone(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not an adapter .* a base was given"):
        smolstack.load(tiny_folder, base=tiny_folder)


def test_every_command_knows_adapters(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from smolstack.checkpoint.diff import diff_checkpoints
    from smolstack.checkpoint.inspect import inspect_checkpoint
    from smolstack.checkpoint.verification.checkpoint import check_checkpoint

    checks = {check.name: check for check in check_checkpoint(adapter, values=True)}
    assert not [problem for check in checks.values() for problem in check.problems]
    assert "1 of them changed by the adapter" in checks["weight files"].found
    found = inspect_checkpoint(adapter)
    assert found.base == (tiny_folder, 1)
    assert set(found.weight_files) == {"model.safetensors", WEIGHTS}
    changes = diff_checkpoints(tiny_folder, adapter).most_changed(9)
    assert [change.name for change in changes] == [f"{LAYER}.weight"]
    whole = smolstack.load(adapter).save(tmp_path / "whole")
    assert not diff_checkpoints(whole, adapter).most_changed(9)


def test_a_base_that_lacks_a_layer_fails_in_every_command_as_in_load(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from smolstack.checkpoint.verification.checkpoint import check_checkpoint

    layer = "model.text_model.layers.7.mlp.down_proj"
    folder = write(tmp_path / "adapter", tiny_folder, pair(layer, 48, 4, 64))
    problems = [problem for check in check_checkpoint(folder) for problem in check.problems]
    assert len(problems) == 1
    assert "layers.7.mlp.down_proj" in problems[0]


@pytest.mark.parametrize(
    ("targets", "absent"),
    [
        (
            "(.*(model.text_model).*(down_proj|gate_proj|up_proj|q_proj).*$"
            "|.*(custom_text_proj).*$)",
            ["custom_text_proj"],
        ),
        (["q_proj", "custom_text_proj"], ["custom_text_proj"]),
        (r"model\.text_model\.layers\.\d+\.mlp\.(?:down|up)_proj", []),
        ("all-linear", []),
        (None, []),
    ],
)
def test_layers_that_the_base_lacks_are_said(
    targets: str | list[str] | None, absent: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    from smolstack.checkpoint.source import open_source

    folder = write(
        tmp_path / "adapter", tiny_folder, pair(LAYER, 48, 4, 64), target_modules=targets
    )
    notes = [f"target_modules names {word}, which the base has nowhere" for word in absent]
    assert list(open_source(folder).notes) == notes


def test_a_folder_with_weights_of_its_own_is_a_whole_checkpoint(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(tiny_folder, whole)
    (whole / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    assert smolstack.load(whole).config == smolstack.load(tiny_folder).config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, r"lora_magnitude_vector None .* use_dora True; expected \[48\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True, expected False"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', expected True",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora', expected True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens \\[1\\], expected None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication .* expected None"),
        (
            {"base_model_name_or_path": None},
            "base_model_name_or_path None",
        ),
        (
            {"base_model_name_or_path": "./gone"},
            "its base .* cannot be found: ./gone",
        ),
        ({"lora_alpha": "16"}, "lora_alpha or alpha_pattern '16', expected a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern {'\\(': 1}, expected a number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern \\['q_proj'\\], expected a number"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    settings: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", tiny_folder, pair(LAYER, 48, 4, 64), **settings)
    with pytest.raises(CheckpointError, match=message):
        smolstack.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("model.text_model.layers.7.mlp.down_proj", 48, 4, 64), "layers.7.mlp.down_proj"),
        (pair(LAYER, 48, 4, 60), r"lora_A \[4, 60\] and lora_B \[48, 4\] .* expected \[rank, 64\]"),
        ({**pair(LAYER, 48, 4, 64), **dict(list(pair(LAYER, 48, 5, 64).items())[1:])}, "lora_A"),
        (dict(list(pair(LAYER, 48, 4, 64).items())[:1]), r"lora_B None"),
        (
            {
                **pair(LAYER, 48, 4, 64),
                f"base_model.model.{LAYER}.lora_magnitude_vector": torch.ones(48),
            },
            r"lora_magnitude_vector \[48\] .* use_dora False; expected none",
        ),
        (
            {f"base_model.model.{TEXT}.embed_tokens.{ROWS}": torch.ones(2, 48)},
            "trainable_token_indices None .* expected rows of",
        ),
        ({f"base_model.model.{TEXT}.embed_tokens.lora_embedding_A": torch.ones(2, 2)}, "A,"),
        ({f"base_model.model.{LAYER}.weight": torch.ones(48, 48)}, r"\[48, 48\], but the base has"),
        (pair("model.vision_model.embeddings.patch_embedding", 32, 2, 192), "patch_embedding"),
        ({LAYER + ".weight": torch.ones(48, 64)}, "expected base_model.model., a weight"),
        ({}, "is empty"),
    ],
)  # fmt: skip
def test_tensors_that_fit_nowhere_are_refused_by_name(
    tensors: dict[str, torch.Tensor], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        smolstack.load(write(tmp_path / "adapter", tiny_folder, tensors))


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "second", adapter, pair(LAYER, 48, 4, 64))
    with pytest.raises(CheckpointError, match="which is an adapter itself"):
        smolstack.load(second)


def test_pickled_adapters_are_never_read(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle file, which is never read"):
        smolstack.load(adapter)
