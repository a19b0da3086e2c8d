"""Generate text from an image with onnxruntime only, without torch, transformers or smolstack.

    smolstack export MODEL ./exported
    python examples/onnx_loop.py ./exported examples/number.png "What does it say?"

Needs onnxruntime (with its numpy), Pillow and tokenizers. The text around the question was rendered
from the chat template at export (prompt.json).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

Array = npt.NDArray[Any]
TILES_AT_ONCE = 4  # tiles per run of the vision encoder, to limit memory
MAX_EDGE = 4096


class OnnxModel:
    """The three graphs and the settings of a folder written by ``smolstack export``."""

    def __init__(self, folder: Path, dtype: str = "fp32", threads: int = 0) -> None:
        self.config = _read(folder / "config.json")
        self.image = _read(folder / "preprocessor_config.json")
        self.names = _read(folder / "tokenizer_config.json")
        self.prompt_parts = _read(folder / "prompt.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.ends = self.end_tokens(folder / "generation_config.json")

        suffix = "" if dtype == "fp32" else f"_{dtype}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.vision, self.embedding, self.decoder = (
            onnxruntime.InferenceSession(
                str(folder / "onnx" / f"{name}{suffix}.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def ask(self, image: Path, question: str, max_new_tokens: int = 512) -> Iterator[int]:
        """Yield the token ids of the greedy answer, including the end token."""
        tiles, rows, cols = self.tiles(image)
        ids = np.array([self.prompt(question, rows, cols)], dtype=np.int64)
        embeds = self.embedding.run(None, {"input_ids": ids})[0]
        features = self.encode(tiles)
        embeds[ids == self.config["image_token_id"]] = features.reshape(-1, features.shape[-1])

        cache = self.empty_cache()
        mask = np.ones_like(ids)
        positions = np.arange(ids.shape[1], dtype=np.int64)[None]
        room = self.config["text_config"]["max_position_embeddings"] - ids.shape[1]
        for _ in range(min(max_new_tokens, room)):
            feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
            logits, *present = self.decoder.run(None, {**feeds, **cache})
            token = int(logits[0, -1].argmax())
            yield token
            if token in self.ends:
                return
            cache = dict(zip(cache, present, strict=True))
            embeds = self.embedding.run(None, {"input_ids": np.array([[token]])})[0]
            mask = np.ones((1, mask.shape[1] + 1), dtype=np.int64)
            positions = positions[:, -1:] + 1

    def encode(self, tiles: Array) -> Array:
        """Return visual tokens: (N, 3, P, P) → (N, S, D)."""
        parts = []
        for start in range(0, len(tiles), TILES_AT_ONCE):
            some = tiles[None, start : start + TILES_AT_ONCE]
            filled = np.ones((1, some.shape[1], *some.shape[-2:]), dtype=bool)
            feeds = {"pixel_values": some, "pixel_attention_mask": filled}
            parts.append(self.vision.run(["image_features"], feeds)[0])
        return np.concatenate(parts)

    def empty_cache(self) -> dict[str, Array]:
        """Return an empty KV cache with the types and shapes of the decoder's inputs."""
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), kinds[entry.type])
            for entry in self.decoder.get_inputs()
            if entry.name.startswith("past_key_values.")
        }

    # The image

    def tiles(self, path: Path) -> tuple[Array, int, int]:
        """Return normalized tiles (N, 3, P, P), the global tile last, and the grid or (0, 0)."""
        resample = Image.Resampling(self.image.get("resample", 1))
        edge = self.image["max_image_size"]["longest_edge"]
        with Image.open(path) as opened:
            image = _rgb(ImageOps.exif_transpose(opened))
        if self.image.get("do_resize", True):
            longest = self.image["size"]["longest_edge"]
            image = image.resize(_fit(*image.size, longest), resample)
        if not self.image.get("do_image_splitting", True):
            return self.normalize([image.resize((edge, edge), resample)]), 0, 0
        width, height = _whole_tiles(*image.size, edge)
        image = image.resize((width, height), resample)
        rows, cols = height // edge, width // edge
        if rows == cols == 1:
            return self.normalize([image]), 0, 0
        tiles = [
            image.crop((col * edge, row * edge, (col + 1) * edge, (row + 1) * edge))
            for row in range(rows)
            for col in range(cols)
        ]
        return self.normalize([*tiles, image.resize((edge, edge), resample)]), rows, cols

    def normalize(self, tiles: list[Image.Image]) -> Array:
        """Convert RGB tiles to float32 (N, 3, P, P)."""
        pixels = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float64)
        if self.image.get("do_rescale", True):
            pixels = pixels * self.image.get("rescale_factor", 1 / 255)
        values = pixels.astype(np.float32)
        if self.image.get("do_normalize", True):
            mean = np.array(self.image.get("image_mean", [0.5] * 3), dtype=np.float32)
            std = np.array(self.image.get("image_std", [0.5] * 3), dtype=np.float32)
            values = (values - mean) / std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    # The prompt

    def end_tokens(self, generation: Path) -> set[int]:
        """Return the ids of end tokens, from the first file that has any."""
        files = [_read(generation) if generation.is_file() else {}, self.config]
        for data in (*files, self.config["text_config"]):
            found = data.get("eos_token_id")
            if found is not None:
                return set(found if isinstance(found, list) else [found])
        eos = self.named_tokens()["eos_token"]
        return {token for token in [self.tokenizer.token_to_id(eos)] if token is not None}

    def prompt(self, question: str, rows: int, cols: int) -> list[int]:
        """Return the token ids of a prompt: a user message with the image and the question."""
        text = self.prompt_parts["before"] + question + self.prompt_parts["after"]
        text = text.replace("<image>", self.placeholder(rows, cols), 1)
        special: bool = self.prompt_parts["add_special_tokens"]
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def named_tokens(self) -> dict[str, str]:
        """Return special tokens by their names in chat templates: ``bos_token``, …"""
        extra = self.names.get("extra_special_tokens")
        named = {**self.names, **(extra if isinstance(extra, dict) else {})}
        texts = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in named.items()
            if name.endswith("_token")
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def placeholder(self, rows: int, cols: int) -> str:
        """Return the text of an image in the prompt: all tiles, the global tile last."""
        patches = (
            self.image["max_image_size"]["longest_edge"]
            // (self.config["vision_config"]["patch_size"])
        )
        tile = "<image>" * (patches // self.config["scale_factor"]) ** 2
        around = "<fake_token_around_image>"
        grid = "".join(
            "".join(f"{around}<row_{row}_col_{col}>{tile}" for col in range(1, cols + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return f"{grid}{chr(10) if grid else ''}{around}<global-img>{tile}{around}"


def _fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return the resized size: the longer side is ``longest``, the shorter one even."""
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        width, height = longest, short + short % 2
    else:
        short = int(longest * ratio)
        width, height = short + short % 2, longest
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / ratio)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * ratio), MAX_EDGE
    return max(width, 1), max(height, 1)


def _whole_tiles(width: int, height: int, edge: int) -> tuple[int, int]:
    """Round both sides up to whole tiles; the shorter one follows the new longer one."""

    def up(length: int) -> int:
        return max(1, math.ceil(length / edge)) * edge

    ratio = width / height
    if width >= height:
        width = up(width)
        return width, up(int(width / ratio))
    height = up(height)
    return up(int(height * ratio)), height


def _rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image, with transparency composited over white."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def main() -> None:
    """Answer one question about one image."""
    parser = argparse.ArgumentParser(description="Ask an exported model about an image.")
    parser.add_argument("folder", type=Path, help="folder written by smolstack export")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0, help="0: chosen by onnxruntime")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    options = parser.parse_args()
    model = OnnxModel(options.folder, options.dtype, options.threads)
    ids = list(model.ask(options.image, options.question, options.max_new_tokens))
    if options.ids:
        print(*ids)
    else:
        print(model.tokenizer.decode(ids, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
