"""smolstack verify: every way in which a checkpoint can be wrong, all of them in one report."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
Weights = dict[str, torch.Tensor]
CONNECTOR = "model.connector.modality_projection.proj.weight"
NORM = "model.text_model.norm.weight"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Spread the weights over two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def problems(run: Run, spoilt: Path) -> Callable[..., list[str]]:
    """All differences that are reported of the spoilt checkpoint; the exit code must be 1."""

    def invoke(*options: str) -> list[str]:
        result = run("verify", spoilt, "--json", *options)
        assert result.exit_code == 1, result.output
        data = json.loads(result.stdout)
        assert data["ok"] is False
        return [problem for check in data["checks"] for problem in check["problems"]]

    return invoke


def test_a_good_checkpoint_passes_every_check(
    run: Run, tiny_folder: Path, tied_folder: Path
) -> None:
    for folder in (tiny_folder, tied_folder):
        result = run("verify", folder, "--values")
        assert result.exit_code == 0, result.stdout
        assert "9 checks, nothing is wrong" in result.stdout
        assert "note" not in result.stdout


def test_a_sharded_one_passes_too(run: Run, spoilt: Path) -> None:
    shard(spoilt)
    result = run("verify", spoilt, "--values")
    assert result.exit_code == 0, result.stdout
    assert "2 files" in result.stdout


def test_what_a_trainer_keeps_beside_the_weights_is_not_looked_at(
    run: Run, problems: Callable[..., list[str]], spoilt: Path
) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (spoilt / name).write_bytes(b"\x80\x02 a pickle")
    (spoilt / "trainer_state.json").write_text('{"best_metric": NaN}')
    assert run("verify", spoilt).exit_code == 0
    # Without processing_class= the processor's files are not there, and that is what is said.
    (spoilt / "preprocessor_config.json").unlink()
    (problem,) = problems()
    assert "a Trainer saves the processor's files where it is given processing_class" in problem
    assert "save_pretrained(FOLDER) adds them afterwards" in problem


def test_an_adapter_is_verified_on_its_base(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    settings["base_model_name_or_path"] = str(tiny_folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    layer = "base_model.model.model.text_model.layers.1.mlp.down_proj"
    pair = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(48, 2),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"\x80\x02")
    result = run("verify", folder)
    assert result.exit_code == 0, result.stdout
    assert "1 of them changed by the adapter" in result.stdout
    assert "changed by the adapter" in run("inspect", folder).stdout
    assert "1 of 59 tensors differ" in run("diff", tiny_folder, folder).stdout
    exported = run("export", folder, tmp_path / "onnx")
    assert exported.exit_code == 0, exported.stderr


def test_what_transformers_refuses_is_said(run: Run, spoilt: Path) -> None:
    def widths(config: dict[str, Any]) -> None:
        config["text_config"] |= {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}

    edit(spoilt / "config.json", widths)
    data = json.loads(run("verify", spoilt, "--json").stdout)
    (remark,) = data["checks"][0]["remarks"]
    assert remark == (
        "transformers refuses this config.json: hidden_size 48 of text_config is not a multiple of "
        "its 5 attention heads, which head_dim 8 makes no difference to"
    )


def test_a_token_that_only_transformers_adds_is_noted(run: Run, spoilt: Path) -> None:
    (spoilt / "added_tokens.json").write_text('{"<image>": 1, "<extra>": 100352}')
    checks = json.loads(run("verify", spoilt, "--json").stdout)["checks"]
    (noted,) = [remark for check in checks for remark in check["remarks"]]
    assert "added_tokens.json" in noted
    assert "<extra>" in noted
    assert "<image>" not in noted


def test_another_chat_template_in_another_file_is_noted(run: Run, spoilt: Path) -> None:
    def other(config: dict[str, Any]) -> None:
        config["chat_template"] = "another"

    edit(spoilt / "tokenizer_config.json", other)
    checks = json.loads(run("verify", spoilt, "--json").stdout)["checks"]
    (noted,) = [remark for check in checks for remark in check["remarks"]]
    assert "tokenizer_config.json has another chat template" in noted


def test_every_difference_is_listed(
    problems: Callable[..., list[str]], run: Run, spoilt: Path
) -> None:
    def spoil(weights: Weights) -> None:
        weights[CONNECTOR] = torch.zeros(48, 64)
        weights["model.text_model.rotary.inv_freq"] = torch.zeros(3)
        del weights[NORM], weights["lm_head.weight"]

    edit_weights(spoilt, spoil)
    edit(spoilt / "processor_config.json", lambda data: data.update(image_seq_len=9))
    found = problems()
    assert len(found) == 5
    for told in (
        f"{CONNECTOR} is [48, 64], expected [48, 128]",
        f"{NORM} is missing, expected [48]",
        "model.text_model.rotary.inv_freq [3] is one too many, which no model of the family has",
        "tie_word_embeddings false, but there is no lm_head.weight",
        "has image_seq_len 9, config.json makes 4 visual tokens",
    ):
        assert any(told in problem for problem in found), told
    report = run("verify", spoilt)
    assert report.exit_code == 1
    assert all(problem in " ".join(report.stdout.split()) for problem in found)
    assert "5 differences" in report.stdout


def test_a_config_is_checked_part_by_part(problems: Callable[..., list[str]], spoilt: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        for key in ("rope_theta", "rope_parameters"):
            del data["text_config"][key]
        data["text_config"]["num_attention_heads"] = 5
        data["vision_config"]["hidden_act"] = "tanh"
        del data["image_token_id"]

    edit(spoilt / "config.json", spoil)
    found = "\n".join(problems())
    assert "has no rope_theta" in found
    assert "num_attention_heads 5 is not divisible" in found
    assert "hidden_act is 'tanh'" in found
    assert "image_token_id is None, expected an integer" in found


def test_a_scale_that_does_not_divide_the_grid(
    problems: Callable[..., list[str]], spoilt: Path
) -> None:
    edit(spoilt / "config.json", lambda data: data.update(scale_factor=3))
    assert any("scale_factor 3 does not divide the patch grid 4×4" in p for p in problems())


def test_token_ids_are_compared(problems: Callable[..., list[str]], spoilt: Path) -> None:
    edit(spoilt / "config.json", lambda data: data.update(image_token_id=860))
    edit(spoilt / "generation_config.json", lambda data: data.update(eos_token_id=[900, 5000]))
    found = "\n".join(problems())
    assert "gives <image> the id 861, but config.json's image_token_id is 860" in found
    assert "generation_config.json eos_token_id is 5000, which is not a token" in found


def test_preprocessing_is_compared_with_the_tower(
    problems: Callable[..., list[str]], spoilt: Path
) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["max_image_size"]["longest_edge"] = 64
        data["image_std"] = [0.5, 0, 0.5]

    edit(spoilt / "preprocessor_config.json", spoil)
    found = "\n".join(problems())
    assert "tiles are cut 64 pixels wide" in found
    assert "divides by zero" in found


def test_nan_and_infinity_are_found_when_asked_for(
    run: Run, problems: Callable[..., list[str]], spoilt: Path
) -> None:
    def spoil(weights: Weights) -> None:
        weights[NORM][3] = torch.nan
        weights[CONNECTOR][0, :2] = torch.inf

    edit_weights(spoilt, spoil)
    assert run("verify", spoilt).exit_code == 0
    assert problems("--values") == [
        f"{CONNECTOR} holds 0 NaN and 2 infinities",
        f"{NORM} holds 1 NaN and 0 infinities",
    ]


def test_integer_weights_are_named_one_by_one(
    problems: Callable[..., list[str]], spoilt: Path
) -> None:
    def spoil(weights: Weights) -> None:
        weights[NORM] = weights[NORM].to(torch.int8)
        weights[CONNECTOR] = weights[CONNECTOR].to(torch.float64)

    edit_weights(spoilt, spoil)
    found = problems()
    assert any(f"{NORM} is stored as I8" in problem for problem in found)
    assert any(f"{CONNECTOR} is stored as F64" in problem for problem in found)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"oops",
        struct.pack("<Q", 10) + b'{"a":"b"} ',
    ],
    ids=["empty", "short", "huge header", "no JSON", "odd JSON"],
)
def test_a_hostile_weight_file(
    problems: Callable[..., list[str]], refuses: Run, spoilt: Path, sign: Path, content: bytes
) -> None:
    (spoilt / "model.safetensors").write_bytes(content)
    assert any("is not a complete safetensors file" in problem for problem in problems())
    for command in (("ask", sign, "Hi", "--model"), ("inspect",)):
        assert "is not a complete safetensors file" in refuses(*command, spoilt)


def test_a_truncated_weight_file(
    problems: Callable[..., list[str]], refuses: Run, spoilt: Path, sign: Path
) -> None:
    path = spoilt / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert any("is not a complete safetensors file" in problem for problem in problems())
    assert "model.safetensors" in refuses("ask", sign, "Hi", "--model", spoilt)


def test_shards_that_do_not_keep_the_index_s_promise(
    problems: Callable[..., list[str]], spoilt: Path
) -> None:
    shard(spoilt)
    index = spoilt / "model.safetensors.index.json"
    edit(index, lambda data: data["weight_map"].update(ghost="a.safetensors"))
    assert any("promises ghost in a.safetensors" in problem for problem in problems())
    (spoilt / "a.safetensors").write_bytes(b"oops")
    (spoilt / "b.safetensors").unlink()
    found = "\n".join(problems())
    assert "a.safetensors (4 bytes) is not a complete safetensors file" in found
    assert "b.safetensors does not exist" in found
    edit(index, lambda data: data["weight_map"].update(ghost="../../secret.safetensors"))
    assert any("expected a .safetensors file" in problem for problem in problems())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_file_that_is_no_json_or_absent(
    problems: Callable[..., list[str]], spoilt: Path, name: str
) -> None:
    (spoilt / name).write_text("{")
    assert any(name in problem for problem in problems())
    (spoilt / name).unlink()
    assert any(name in problem for problem in problems())


def test_every_broken_file_is_named(problems: Callable[..., list[str]], spoilt: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        (spoilt / name).write_text("[1]")
    found = problems()
    assert [p for p in found if "tokenizer_config.json" in p]
    assert [p for p in found if "generation_config.json" in p]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop(NORM), f"1 missing: {NORM}"),
        (lambda w: w.update(extra=torch.zeros(2)), "1 extra: extra"),
        (lambda w: w.update({NORM: torch.zeros(2)}), f"{NORM} [2] instead of [48]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_asking_a_wrong_checkpoint_is_refused(
    refuses: Run, spoilt: Path, sign: Path, change: Callable[[Weights], object], told: str
) -> None:
    edit_weights(spoilt, change)
    assert told in refuses("ask", sign, "Hi", "--model", spoilt)


def test_asking_without_rope_theta_is_refused(refuses: Run, spoilt: Path, sign: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        for key in ("rope_theta", "rope_parameters"):
            del data["text_config"][key]

    edit(spoilt / "config.json", spoil)
    assert "has no rope_theta" in refuses("ask", sign, "Hi", "--model", spoilt)


def test_nothing_to_look_at_is_refused(refuses: Run, tmp_path: Path) -> None:
    assert "expected a checkpoint folder" in refuses("verify", tmp_path / "nothing")
