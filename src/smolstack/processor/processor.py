"""The processor: turns prompts and images into a Batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smolstack.batch import Batch, VisualTokens
from smolstack.config import ModelConfig
from smolstack.errors import (
    CheckpointError,
    ContextLengthError,
    PromptError,
    VideoError,
)
from smolstack.processor import prompt as prompts
from smolstack.processor.geometry import TilePlan, Tiling, plan_tiles
from smolstack.processor.inputs import ImageInput, PromptLike, as_messages, with_password
from smolstack.processor.literal_text import LiteralText
from smolstack.processor.prompt import ChatTemplate, Markers, Message
from smolstack.processor.scaling import resize
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import ImageSource, image_size, normalize, read_tiles
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.processor.video import Frame, Video, VideoSettings
from smolstack.processor.video_bytes import VideoBytes
from smolstack.processor.video_reading import read_video

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Prompt:
    """One sequence before batching: its text, token ids, images and their plans.

    Attributes:
        marked: the text where control tokens in messages are text (see :mod:`.literal_text`).
        image_names: what an error calls each image; empty: images are named by their files.
    """

    text: str
    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    plans: tuple[TilePlan, ...]
    marked: str | None = None
    image_names: tuple[str, ...] = ()

    @classmethod
    def of_images(cls, images: Sequence[ImageInput], plans: Sequence[TilePlan]) -> Prompt:
        """Return images without a text, to be encoded to visual tokens."""
        return cls("", (), tuple(images), tuple(plans))


class Processor:
    """Chat template, tile planner, tokenizer and image preprocessing of one checkpoint.

    ``processor(prompts)`` makes a Batch; :meth:`prepare` prepares one sequence without its pixels.

    Attributes:
        pointing: ids of tokens that stand for positions in the image and produce no text.
        videos: video settings, such as the number of frames.
        special_tokens_in_text: whether the text of special tokens in messages
            (``<|im_start|>``, ``<image>``) is converted to these tokens, as in transformers, which
            lets authors of the text forge turns; False tokenizes it as characters.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: ImageSettings,
        tokenizer: TextTokenizer,
        chat_template: str | None,
        image_seq_len: int | None = None,
        *,
        pointing: range = range(0),
        videos: VideoSettings | None = None,
    ) -> None:
        self.pointing, self.videos = pointing, videos or VideoSettings()
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.markers = _markers(config, tokenizer)
        self.special_tokens_in_text = True
        self.template = (
            None if chat_template is None else ChatTemplate(chat_template, tokenizer.special_tokens)
        )
        self.pad_id = config.text.pad_token_id or 0
        if not 0 <= self.pad_id < config.text.vocab_size:
            self.pad_id = 0
        self.tokens_per_tile = _tokens_per_tile(config, settings)
        if image_seq_len is not None and image_seq_len != self.tokens_per_tile:
            raise CheckpointError(
                f"processor_config.json has image_seq_len {image_seq_len}, but config.json gives "
                f"{self.tokens_per_tile} visual tokens per tile"
            )

    def __call__(
        self,
        inputs: Sequence[PromptLike | Message],
        *,
        password: str | None = None,
        **tiling: Unpack[Tiling],
    ) -> Batch:
        """Turn prompts and images into one left-padded batch.

        Args:
            inputs: one entry per sequence: a text, the messages of a chat, or a tuple of an image
                (or several) and either. Images given with a chat fill its image parts that have
                none. A single chat may be given directly as its messages.
            password: opens locked PDF files.
            **tiling: split, max_image_tokens, upscale; see Tiling.

        Returns:
            A Batch with token_ids (B, T) and tiles (N, 3, P, P) in float32.

        Raises:
            PromptError, ImageError, ContextLengthError: before any pixel is resized.
        """
        entries: list[Any] = list(inputs)
        if entries and isinstance(entries[0], Mapping):
            entries = [entries]
        if not entries or isinstance(inputs, str):
            raise PromptError("expected a list of prompts, one per sequence")
        return self.batch([self.prepare(entry, password=password, **tiling) for entry in entries])

    def prepare(
        self, entry: PromptLike, *, password: str | None = None, **tiling: Unpack[Tiling]
    ) -> Prompt:
        """Render, plan, expand and tokenize one sequence. Only videos are decoded.

        Raises:
            PromptError: a malformed chat, or the numbers of placeholders and images differ.
            ImageError: an image cannot be opened.
            ContextLengthError: more tokens than the model has positions.
        """
        messages, images = as_messages(entry, self.open_video)
        return self.prepare_text(self.render(messages), images, password=password, **tiling)

    def prepare_text(
        self,
        rendered: str,
        images: Sequence[ImageInput | Frame],
        *,
        password: str | None = None,
        **tiling: Unpack[Tiling],
    ) -> Prompt:
        """Like :meth:`prepare`, for a rendered prompt with one placeholder per image.

        Raises: as :meth:`prepare`.
        """
        images = [with_password(image, password) for image in images]
        plans = tuple(self.plan(image, **tiling) for image in images)
        text = prompts.expand_placeholders(rendered, plans, self.markers)
        marked = None if self.special_tokens_in_text else text
        text = text if marked is None else self.plain.shown(text)
        ids = tuple(self.tokenizer.encode(text) if marked is None else self.plain.encode(marked))
        self._check_ids(ids)
        limit = self.config.text.max_positions
        if len(ids) > limit:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens "
                f"({sum(plan.visual_tokens for plan in plans)} of them visual), but the "
                f"model's context is {limit}"
            )
        whole = (shown.image if isinstance(shown, Frame) else shown for shown in images)
        return Prompt(text, ids, tuple(whole), plans, marked)

    def encode_after(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of a prompt and of a text that follows it."""
        if prompt.marked is None:
            return self.tokenizer.encode(prompt.text + text)
        return self.plain.encode(prompt.marked + text)

    def as_text(self, text: str) -> str:
        """Return a user's text for insertion in a rendered prompt: marked as text, unless special
        tokens in texts are converted.

        Raises:
            PromptError: the text contains one of the characters used as marks.
        """
        if self.special_tokens_in_text:
            return text
        marked: str = self.plain.mark(text)
        return marked

    @cached_property
    def plain(self) -> LiteralText:
        """Tokenizes the text of special tokens in messages as characters."""
        marks = self.markers
        names = (marks.image, marks.around, marks.whole)
        return LiteralText(self.tokenizer, [name for name in names if name])

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Check that every id has an embedding; a tokenizer may have more tokens than its model."""
        highest = max(ids, default=0)
        if highest >= self.config.text.vocab_size:
            raise CheckpointError(
                f"tokenizer.json gives {self.tokenizer.token(highest)!r} the id {highest}, "
                f"config.json's vocabulary has {self.config.text.vocab_size} tokens"
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A chat as text, one placeholder per image."""
        if self.template is None:
            raise CheckpointError(
                "the checkpoint has no chat template (chat_template.jinja, chat_template.json or "
                "tokenizer_config.json)"
            )
        if not self.special_tokens_in_text:
            messages, tools = self.plain.mark_messages(messages), self.plain.mark(tools)
        return self.template.render(messages, answer_next=answer_next, tools=tools)

    @cached_property
    def answer_lead(self) -> str:
        """Text that the chat template writes between a prompt and its answer, such as a space."""
        asked, mark = prompts.user_message(0, "?"), "\x00"
        said = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
        before = self.render([asked])
        after = self.render([asked, said], answer_next=False)
        if not after.startswith(before) or mark not in after:
            return ""
        return after[len(before) :].partition(mark)[0]

    def open_video(
        self,
        source: str | Path | VideoBytes | Video,
        fps: float | None = None,
        max_frames: int | None = None,
    ) -> Video:
        """Read frames of a video file, with the checkpoint's defaults.

        Frames are stored at the size that the checkpoint first resizes them to.

        Raises:
            VideoError: the file cannot be read.
        """
        if isinstance(source, Video):
            return source
        if not isinstance(source, (str, Path, VideoBytes)):
            raise VideoError(
                f"found a {type(source).__name__}, expected a video: its path or a Video"
            )

        def shrink(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
            plan = self.plan(Frame(pixels))
            planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            smaller = resize(planes, plan.resized, self.settings.resample)
            return np.ascontiguousarray(smaller.transpose(1, 2, 0))

        return read_video(
            source,
            fps=self.videos.fps if fps is None else fps,
            max_frames=self.videos.max_frames if max_frames is None else max_frames,
            shrink=shrink,
        )

    def plan(
        self,
        image: ImageInput | Frame | tuple[int, int],
        *,
        password: str | None = None,
        **tiling: Unpack[Tiling],
    ) -> TilePlan:
        """Return the tile plan of an image, of visual tokens, or of a size (width, height).

        A frame of a video is one tile, regardless of ``tiling``.
        """
        size = self.tokens_per_tile
        if isinstance(image, Frame) and isinstance(image.image, VisualTokens):
            image = image.image
        if isinstance(image, Frame):
            assert not isinstance(image.image, VisualTokens)
            edge = self.videos.first_edge or self.settings.tile_edge
            settings = replace(self.settings, longest_edge=edge)
            return plan_tiles(image_size(image.image), settings, size, split=False)
        if isinstance(image, VisualTokens):
            edge = self.settings.tile_edge
            rows, cols = image.rows, image.cols
            canvas = (max(cols, 1) * edge, max(rows, 1) * edge)
            return TilePlan(image.source, canvas, canvas, rows, cols, edge, size)
        if isinstance(image, tuple):
            return plan_tiles(image, self.settings, size, **tiling)
        image = with_password(image, password)
        return plan_tiles(image_size(image), self.settings, size, **tiling)

    def count_tokens(self, plans: Sequence[TilePlan], text: str) -> int:
        """Count the tokens of the whole prompt of asking ``text`` about images with these plans."""
        rendered = self.render([prompts.user_message(len(plans), text)])
        expanded = prompts.expand_placeholders(rendered, plans, self.markers)
        encode = self.tokenizer.encode if self.special_tokens_in_text else self.plain.encode
        return len(encode(expanded))

    def pixels(self, image: ImageSource, plan: TilePlan) -> Tensor:
        """Return the normalized tiles of one image: (plan.tiles, 3, P, P) float32."""
        return normalize(read_tiles(image, plan, self.settings), self.settings)

    def batch(self, sequences: Sequence[Prompt]) -> Batch:
        """Pad prepared sequences on the left and cut their images into tiles.

        Raises:
            PromptError: some images are given as visual tokens and others as pixels.
        """
        import torch

        images = [image for prompt in sequences for image in prompt.images]
        plans = [plan for prompt in sequences for plan in prompt.plans]
        encoded = [image for image in images if isinstance(image, VisualTokens)]
        if encoded and len(encoded) != len(images):
            raise PromptError(
                f"{len(encoded)} of {len(images)} images are visual tokens; a batch may have "
                "images or visual tokens, but not both"
            )
        edge = self.settings.tile_edge
        tiles = [torch.empty(0, 3, edge, edge)]
        if not encoded:
            tiles += [self.pixels(p, plan) for p, plan in zip(images, plans, strict=True)]  # type: ignore[arg-type]
        longest = max(len(prompt.token_ids) for prompt in sequences)
        token_ids = np.full((len(sequences), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(sequences), longest), dtype=bool)
        for row, prompt in enumerate(sequences):
            start = longest - len(prompt.token_ids)
            token_ids[row, start:] = prompt.token_ids
            mask[row, start:] = True
        return Batch(
            token_ids=torch.from_numpy(token_ids),
            attention_mask=torch.from_numpy(mask),
            tiles=torch.cat(tiles),
            tiles_per_image=tuple(plan.tiles for plan in plans),
            images_per_sequence=tuple(len(prompt.images) for prompt in sequences),
            visual_tokens=torch.cat([v.tokens for v in encoded]) if encoded else None,
        )


def _tokens_per_tile(config: ModelConfig, settings: ImageSettings) -> int:
    """S for tiles of the configured size, which may be smaller than the tower's maximum."""
    side, scale = settings.tile_edge // config.vision.patch_size, config.scale
    if side > config.vision.side or side == 0 or side % scale:
        raise CheckpointError(
            f"preprocessor_config.json sets tiles of {settings.tile_edge} pixels, a grid of "
            f"{side}x{side} patches; config.json's vision tower accepts up to "
            f"{config.vision.image_size} pixels and its scale_factor {scale} must divide the grid"
        )
    return (side // scale) ** 2


def _markers(config: ModelConfig, tokenizer: TextTokenizer) -> Markers:
    """Read the checkpoint's marker texts; the image token must have the model's image token id."""
    named = tokenizer.special_tokens
    markers = Markers(
        image=named.get("image_token", Markers.image),
        around=named.get("fake_image_token", Markers.around),
        whole=named.get("global_image_token", Markers.whole),
    )
    found = tokenizer.token_id(markers.image)
    if found != config.image_token_id:
        raise CheckpointError(
            f"tokenizer.json gives {markers.image} the id {found}, but config.json's "
            f"image_token_id is {config.image_token_id}"
        )
    return markers
