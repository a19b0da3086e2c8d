"""Plans and writes a checkpoint that combines two separately trained towers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from smolstack.bridging.files import check_files, files_alone, files_of_family
from smolstack.bridging.grid import choose_scale, tiles_along
from smolstack.bridging.tokens import Vocabulary, add_image_tokens
from smolstack.bridging.towers import open_text, open_vision
from smolstack.checkpoint.load import DTYPES
from smolstack.checkpoint.save import save_checkpoint
from smolstack.checkpoint.tower import TextSource, VisionSource
from smolstack.config import ModelConfig
from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.settings import ImageSettings

NOISE = 0.02  # relative noise of new tokens' rows, enough to distinguish them
_TABLES = ("decoder.embedding.weight", "head.weight")


@dataclass(frozen=True)
class Bridge:
    """A planned and checked model of two towers that is not yet written.

    Attributes:
        vision, text: the towers.
        config: the model's config.
        settings: image preprocessing.
        side: the processor's files by name.
        added: image tokens added to the tokenizer, by id.
        dtype: number format of the stored weights.
        notes: what was left out or derived, one sentence each.
    """

    vision: VisionSource
    text: TextSource
    config: ModelConfig
    settings: ImageSettings
    side: Mapping[str, bytes]
    added: Mapping[int, str]
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    def write(self, folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
        """Write the checkpoint atomically.

        Args:
            folder: must not exist or be empty, unless ``overwrite``.
            seed: of the connector, and of the noise in new tokens' rows.
        """
        with torch.device("meta"):
            model = VisionLanguageModel(self.config)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = model.connector.proj.weight.shape
        noise = torch.randn(rows, columns, generator=generator)
        state = {name: tensor.to(self.dtype) for name, tensor in self.vision.weights()}
        words = dict(self.text.weights())
        size = _size(words["decoder.embedding.weight"])
        # Scaled to the token embeddings; the tower's final norm makes its states about 1 in size.
        state["connector.proj.weight"] = (noise * size / math.sqrt(columns)).to(self.dtype)
        for name in _TABLES:
            if name in words:
                words[name] = _grown(
                    words[name], self.config.text.vocab_size, sorted(self.added), generator
                )
        state |= {name: tensor.to(self.dtype) for name, tensor in words.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return save_checkpoint(folder, model, self.side, overwrite=overwrite)


def bridge_towers(
    vision: str | Path | None,
    text: str | Path | None,
    folder: str | Path,
    *,
    scale: int | None = None,
    visual_tokens: int | None = None,
    longest_edge: int | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with one model's vision tower and another's text tower.

    The connector is initialized randomly, scaled so that visual tokens have the mean norm of the
    text tower's token embeddings; train it with a "connector" stage. Image tokens are added to the
    tokenizer of a plain language model. No other token id changes, and its answers to text without
    images stay the same.

    Args:
        vision: a checkpoint of the family, or a plain SigLIP folder; None is the bundled reader.
        text: a checkpoint of the family, a plain LlamaForCausalLM folder, or a GGUF file of a
            Llama; None is the bundled reader.
        folder: where to write; must not exist or be empty, unless ``overwrite``.
        scale: edge of the square of patches that becomes one visual token.
        visual_tokens: visual tokens of a tile, instead of ``scale``. Without either, the vision
            checkpoint's own, or for a SigLIP the scale that comes closest to 64 tokens.
        longest_edge: pixels that an image's longer side is resized to before it is cut into tiles;
            None: the vision checkpoint's own, or for a SigLIP four tiles.
        chat_template: "text" for the text model's own, "family" for that of Idefics3, or a Jinja
            file. None: the text model's own if it has one.
        dtype: "float32", "bfloat16", "float16", or "auto": one that stores both towers exactly.
        seed: of the connector, and of the noise in new tokens' rows.

    Returns:
        The folder.

    Raises:
        ConfigError, CheckpointError: a tower cannot be read, or an option does not fit it; nothing
            is written.
    """
    bridge = plan_bridge(
        vision,
        text,
        scale=scale,
        visual_tokens=visual_tokens,
        longest_edge=longest_edge,
        chat_template=chat_template,
        dtype=dtype,
    )
    return bridge.write(folder, seed=seed, overwrite=overwrite)


def plan_bridge(
    vision: str | Path | None,
    text: str | Path | None,
    *,
    scale: int | None = None,
    visual_tokens: int | None = None,
    longest_edge: int | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
) -> Bridge:
    """Plan and check a bridged model, reading only the headers of the weight files.

    Arguments and errors are those of :func:`bridge_towers`.
    """
    eyes, (words, whole) = open_vision(vision), open_text(text)
    settings = eyes.settings
    if longest_edge is not None:
        if longest_edge < settings.tile_edge:
            raise ConfigError(
                f"longest_edge is {longest_edge}, expected at least the {settings.tile_edge} "
                "pixels of a tile"
            )
        settings = replace(settings, longest_edge=longest_edge)
    chosen = choose_scale(eyes.config, eyes.scale, scale=scale, visual_tokens=visual_tokens)
    if whole is None:
        vocabulary = add_image_tokens(words, tiles_along(settings), "Idefics3Processor")
        config = _config_alone(eyes, words, chosen, vocabulary)
        side = files_alone(words, vocabulary, config, settings, chat_template)
        added, notes = vocabulary.added, vocabulary.notes
    else:
        config = replace(whole, vision=eyes.config, scale=chosen)
        side = files_of_family(words, config, settings, chat_template)
        added, notes = {}, ()
    unlike = check_files(config, settings, side)
    return Bridge(
        vision=eyes,
        text=words,
        config=config,
        settings=settings,
        side=side,
        added=added,
        dtype=_dtype(dtype, eyes.dtype, words.dtype),
        notes=(*eyes.notes, *words.notes, *notes, *(unlike if whole is None else ())),
    )


def _config_alone(
    eyes: VisionSource, words: TextSource, scale: int, vocabulary: Vocabulary
) -> ModelConfig:
    pad = words.config.pad_token_id
    text = replace(
        words.config,
        vocab_size=vocabulary.size,
        pad_token_id=vocabulary.pad_id if pad is None or pad < 0 else pad,
    )
    return ModelConfig(
        vision=eyes.config,
        text=text,
        scale=scale,
        image_token_id=vocabulary.image_token_id,
        tied=words.tied,
    )


def _dtype(wanted: str, vision: torch.dtype, text: torch.dtype) -> torch.dtype:
    if wanted == "auto":
        return torch.promote_types(vision, text)
    if wanted not in DTYPES:
        raise ConfigError(f"dtype is {wanted!r}, expected auto or one of {list(DTYPES)}")
    return DTYPES[wanted]


def _size(table: Tensor) -> float:
    return float(table.detach().float().square().mean().sqrt())


def _grown(table: Tensor, rows: int, new: list[int], generator: torch.Generator) -> Tensor:
    """Extend a token embedding by new rows: the mean of the others plus a little noise.

    Args:
        new: ids of new tokens, which may be rows that had no token before.
    """
    own = [i for i in new if i < table.shape[0]] + list(range(table.shape[0], rows))
    if not own:
        return table
    known = torch.ones(table.shape[0], dtype=torch.bool)
    known[[i for i in own if i < table.shape[0]]] = False
    mean = table[known].float().mean(dim=0)
    noise = torch.randn(len(own), table.shape[1], generator=generator) * NOISE * _size(table)
    grown = table.new_empty(rows, table.shape[1])
    grown[: table.shape[0]] = table
    grown[own] = (mean + noise).to(table.dtype)
    return grown
