"""The public API: ``load`` and the VLM class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from smolstack.batch import VisualTokens
from smolstack.checkpoint.hub import ModelPath, locate
from smolstack.checkpoint.load import Checkpoint, load_checkpoint
from smolstack.checkpoint.save import complete_side_files, save_checkpoint
from smolstack.errors import PromptError
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.engine import Engine
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.inline import INLINE, AnswerStream, InlineEngine
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.generation.prefix_cache import DEFAULT_PREFIX_BYTES
from smolstack.generation.request import Request
from smolstack.generation.scheduler import SchedulerLimits
from smolstack.processor.geometry import TilePlan, Tiling
from smolstack.processor.inputs import MediaInput, PromptLike, as_images, with_password
from smolstack.processor.processor import Prompt
from smolstack.processor.prompt import Message
from smolstack.processor.tiles import ImageSource
from smolstack.processor.video import Frame, Video
from smolstack.progress import shown
from smolstack.quantization.quantize import Progress
from smolstack.retrieval import PageEmbedder

if TYPE_CHECKING:
    from typing_extensions import Unpack


def load(
    model: str | Path | ModelPath | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
    compile: bool = False,
    progress: Progress | None = None,
) -> VLM:
    """Load a checkpoint.

    Args:
        model: a Hugging Face checkpoint folder, an adapter or MLX folder, a GGUF file (extra
            ``gguf``), or a hub id (extra ``hf``); None loads the small reader bundled with the
            package.
        dtype: "float32", "bfloat16", "float16", "int8" or "int4" (quantized while loading, see
            docs/precision.md; never chosen automatically), or "auto": the dtype of the weights,
            except on a CPU that cannot compute in it, where float32 is faster and lossless.
        device: "cpu", "cuda", "mps", … or "auto", the fastest available.
        revision: branch, tag or commit of a hub id.
        base: the base checkpoint of an adapter, instead of the one that it names.
        mmproj: the GGUF file of the vision tower, if ``model`` is that of a language model.
        compile: compile the vision tower with torch.compile on first use. Off by default: on a
            CPU it gains little in float32 and is slower than the kernels in bfloat16.
        progress: called with the finished step ("decoder.layers.3"), the number of steps done and
            the total, while weights are quantized or packed for the kernels. Default: a bar in
            notebooks.

    Raises:
        ConfigError: a config file lacks a key or has an unsupported value.
        CheckpointError: the folder, its weights or its tokenizer cannot be used.
    """
    where = locate(model, revision, base=base, mmproj=mmproj)
    vlm = VLM(load_checkpoint(where, dtype, device, shown(progress)))
    if compile:
        vlm.model.compile_tower()
    return vlm


class VLM(PageEmbedder):
    """A vision-language model that answers questions about images.

    Attributes:
        model: the network; ``vlm.model(batch)`` gives logits (B, T, V).
        processor: ``vlm.processor(prompts)`` gives a Batch.
        config: sizes of both towers and the connector.
        folder: where the checkpoint was loaded from; for GGUF the language model's file.
        model_path: the same, with an adapter's base or a GGUF model's vision tower.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model, self.processor = checkpoint.model, checkpoint.processor
        self.config, self.folder = checkpoint.config, checkpoint.files.folder
        self.model_path = checkpoint.where or ModelPath(self.folder)
        self.eos_token_ids = checkpoint.eos_token_ids
        self._files = checkpoint.files
        self._image_cache = ImageCache(self.model)
        core = EngineCore(self.model, self.processor, INLINE, image_cache=self._image_cache)
        self._inline = InlineEngine(core)

    def __deepcopy__(self, memo: dict[int, Any]) -> VLM:
        """Return a VLM with its own copy of the weights, and with empty caches."""
        model, processor = copy.deepcopy((self.model, self.processor), memo)
        twin = VLM(
            Checkpoint(
                self._files, self.config, model, processor, self.eos_token_ids, self.model_path
            )
        )
        for limit in ("max_bytes", "folder", "max_folder_bytes"):
            setattr(twin._image_cache, limit, getattr(self._image_cache, limit))
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a VLM is not pickled, because it holds caches and compiled kernels; "
            f"smolstack.load({str(self.folder)!r}) in the other process, or pickle its processor"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    @property
    def precision(self) -> str:
        """Number format and backend: "int8, compiled kernels (AVX-512 VNNI)"."""
        return self.model.precision

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    def ask(
        self,
        images: MediaInput | Sequence[MediaInput] | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer one question about images, or the last message of a chat.

        Args:
            images: an image or several in order: a path, bytes, a PIL image, a uint8 array
                (H, W, 3), or visual tokens from :meth:`encode`. Videos among them: a path with a
                video's suffix, or a Video.
            text: the question. Images and text become one user message.
            messages: a whole chat instead of text; its image parts hold their images, or are
                filled from ``images`` in order.
            **options: max_new_tokens (512), temperature (0: greedy), top_p, top_k, min_p,
                repetition_penalty, seed, stop (strings), stop_on_repetition (False),
                keep_special_tokens (False), schema, regex, choices (at most one of them),
                logprobs, split, max_image_tokens, upscale, password (of locked PDF files); see
                AnswerOptions.

        Raises:
            ImageError, VideoError, PromptError, ContextLengthError, GenerationError: before any
                network runs.
        """
        request = self.request(images, text, messages=messages, **options)
        self._inline.core.open_images([request])
        return self._inline.answers([request])[0]

    def stream(
        self,
        images: MediaInput | Sequence[MediaInput] | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> AnswerStream:
        """Like :meth:`ask`, but yields the text as it is generated, in whole characters.

        Bad input raises here, not at the first piece. ``stream.answer`` is the complete answer
        once the pieces are exhausted.
        """
        request = self.request(images, text, messages=messages, **options)
        self._inline.core.open_images([request])
        return AnswerStream(self._inline, request)

    def request(
        self,
        images: MediaInput | Sequence[MediaInput] | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Request:
        """Validate the input of :meth:`ask` and return a request for an engine's ``submit``.

        Raises: as :meth:`ask`, but an image that proves damaged later is reported by the answer.
        """
        chosen = read_options(options, self.eos_token_ids)
        prompt = self.processor.prepare(_entry(images, text, messages), **chosen.image_options)
        return self._inline.core.requests([prompt], chosen)[0]

    def engine(
        self,
        *,
        running: int = 16,
        queued: int | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_BYTES,
        tiles: int = 4,
        prefill_tokens: int | None = 512,
    ) -> Engine:
        """Create an engine that serves many requests at once in its own thread.

        ::

            with vlm.engine() as engine:
                answer = engine.submit(vlm.request("sign.png", "What does it say?"))
                ...
                print(answer.result().text)

        Args:
            running: maximum number of requests processed concurrently.
            queued: maximum number of waiting requests; None: unlimited.
            kv_cache_bytes: total size of the KV caches; None: half of the free memory.
            prefix_cache_bytes: the part of it kept for prompts that share a prefix with earlier
                ones.
            tiles: tiles per vision micro-batch.
            prefill_tokens: prompt tokens per pass; higher values delay tokens of running requests.
        """
        limits = SchedulerLimits(
            running=running,
            queued=queued,
            tiles=tiles,
            prefill_tokens=prefill_tokens,
            prefix_bytes=prefix_cache_bytes,
            kv_cache_bytes=kv_cache_bytes,
        )
        return Engine(self.model, self.processor, limits, image_cache=self._image_cache)

    def ask_many(
        self, prompts: Sequence[PromptLike], **options: Unpack[AnswerOptions]
    ) -> list[Answer]:
        """Answer several prompts as one batch; each answer equals that of :meth:`ask`.

        Args:
            prompts: per sequence a text, the messages of a chat, or ``(images, either)``.
            **options: as for :meth:`ask`, the same for all.
        """
        if isinstance(prompts, str) or not prompts:
            raise PromptError("expected a list of prompts, one per answer")
        chosen = read_options(options, self.eos_token_ids)
        prepared = [self.processor.prepare(entry, **chosen.image_options) for entry in prompts]
        requests = self._inline.core.requests(prepared, chosen)
        self._inline.core.open_images(requests)
        return self._inline.answers(requests)

    def plan(
        self,
        image: ImageSource | VisualTokens | tuple[int, int],
        text: str = "",
        *,
        password: str | None = None,
        **tiling: Unpack[Tiling],
    ) -> TilePlan:
        """Return how an image, or a size (width, height) in pixels, becomes tiles and tokens.

        ``prompt_tokens`` counts the whole prompt of asking ``text`` about this image.
        """
        plan = self.processor.plan(image, password=password, **tiling)
        plan = plan.with_prompt_tokens(self.processor.count_tokens([plan], text))
        return plan if isinstance(image, (tuple, VisualTokens)) else replace(plan, image=image)

    def open_video(
        self, path: str | Path, *, fps: float | None = None, max_frames: int | None = None
    ) -> Video:
        """Read frames of a video for :meth:`ask`, which opens paths itself with the defaults.

        Args:
            path: of any format that FFmpeg reads; needs the extra ``video``.
            fps: maximum frames per second; None for the checkpoint's (1 in SmolVLM2).
            max_frames: maximum number of frames; None for the checkpoint's (64 in SmolVLM2).

        Raises:
            VideoError: the file cannot be read.
        """
        return self.processor.open_video(path, fps, max_frames)

    def encode_video(self, video: str | Path | Video) -> Video:
        """Encode a video's frames to visual tokens, reusable in any number of questions.

        The tower and the connector run once, here; equal frames are encoded once.

        Raises:
            VideoError: the file cannot be read.
        """
        video = self.processor.open_video(video)
        plans = [self.processor.plan(Frame(frame)) for frame in video.frames]
        (frames,) = self._inline.encode([Prompt.of_images(video.frames, plans)])
        return replace(video, frames=tuple(frames))

    def encode(
        self, image: ImageSource, *, password: str | None = None, **tiling: Unpack[Tiling]
    ) -> VisualTokens:
        """Encode one image to visual tokens, reusable in any number of questions.

        The tower and the connector run once, here; ``ask(visual, …)`` skips them.
        """
        image = with_password(image, password)
        plan = self.processor.plan(image, **tiling)
        ((visual,),) = self._inline.encode([Prompt.of_images([image], [plan])])
        return visual

    @property
    def image_cache(self) -> ImageCache:
        """Visual tokens of recently used images, keyed by content.

        ``image_cache.max_bytes`` limits it (0 disables it), ``image_cache.clear()`` empties it,
        ``image_cache.folder`` stores entries on disk for later processes.
        """
        return self._image_cache

    def clear_prefix_cache(self) -> None:
        """Clear the prefix cache; the image cache is kept."""
        self._inline.core.prefix_cache.clear()

    def clear_caches(self) -> None:
        """Clear the image cache in memory and the prefix cache."""
        self._image_cache.clear()
        self.clear_prefix_cache()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the checkpoint as a Hugging Face folder, atomically."""
        side = complete_side_files(self._files, self.config, self.processor.settings)
        return save_checkpoint(folder, self.model, side, overwrite=overwrite)


def _entry(images: Any, text: str | None, messages: Sequence[Message] | None) -> PromptLike:
    if text is not None and messages is not None:
        raise PromptError("found text and messages, expected only one")
    asked = messages if text is None else text
    if asked is None:
        if isinstance(images, str) and not Path(images).exists():
            raise PromptError(
                f"found neither text nor messages; {images[:80]!r} was given as images, and a "
                "question without an image is asked with ask(None, text)"
            )
        raise PromptError("found neither text nor messages, expected one of them")
    return as_images(images), asked
