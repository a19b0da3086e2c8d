"""``smolstack chat``: a conversation in the terminal, or one question per line from a pipe."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolstack.cli import answer_options, file_options, model_options, options, video_options
from smolstack.cli.ask import plan_line, tell_ending, video_line
from smolstack.cli.console import error, note, progress, write_piece
from smolstack.cli.model_loading import load_model
from smolstack.errors import PromptError, SmolstackError

if TYPE_CHECKING:
    from smolstack.generation.inline import AnswerStream
    from smolstack.generation.options import AnswerOptions
    from smolstack.vlm import VLM

EXAMPLES = """
**Examples**

`smolstack chat receipt.png`

`smolstack chat a.png b.png --model ./my-checkpoint --temperature 0.7 --seed 1`

`printf 'What is this?\\nAnd what colour is it?\\n' | smolstack chat thing.png`

In a conversation, `/image FILE…` adds images to your next question, `/reset` starts again and
`/quit` or the end of input ends it.
"""
HELP = """/image FILE…  add images to your next question
/reset        forget the conversation and its images
/help         show this
/quit         end; so does Ctrl-D
Ctrl-C        cut an answer short, or end"""


class Conversation:
    """The turns so far; every image is encoded once and reused in later turns."""

    def __init__(self, vlm: VLM, chosen: AnswerOptions, *, verbose: bool = False) -> None:
        self.vlm, self.chosen, self.verbose = vlm, chosen, verbose
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []  # content parts of the next message

    def add_image(self, path: str) -> None:
        """Encode an image or a video for the next question."""
        from smolstack.processor.video import is_video

        if is_video(path):
            self._add_video(path)
            return
        options = answer_options.image_options(self.chosen)
        if self.verbose:
            note(plan_line(path, self.vlm.processor.plan(path, **options)))
        with progress(f"Reading {path} …"):
            visual = self.vlm.encode(path, **options)
        self.waiting.append({"type": "image", "image": visual})

    def _add_video(self, path: str) -> None:
        from smolstack.processor.video import Frame

        with progress(f"Reading {path} …"):
            video = self.vlm.open_video(path)
            seen = self.vlm.encode_video(video)
        if self.verbose:
            plans = [self.vlm.processor.plan(Frame(frame)) for frame in video.frames]
            note(video_line(path, video, plans))
        self.waiting.append({"type": "video", "video": seen})

    def reset(self) -> None:
        """Delete all turns and images."""
        self.messages, self.waiting = [], []

    def ask(self, text: str, *, interruptible: bool) -> None:
        """Answer one turn on stdout. After an error, the conversation is unchanged."""
        turn = {"role": "user", "content": [*self.waiting, {"type": "text", "text": text}]}
        with progress("Reading the conversation …"):
            stream = self.vlm.stream(messages=[*self.messages, turn], **self.chosen)
            pieces = [next(stream, "")]
        write_piece(pieces[0])
        complete = self._print(stream, pieces, interruptible)
        said = "".join(pieces).strip()
        self.messages += [turn, {"role": "assistant", "content": said}]
        self.waiting = []
        write_piece("\n")
        if complete:
            tell_ending(stream.answer, verbose=self.verbose)

    @staticmethod
    def _print(stream: AnswerStream, pieces: list[str], interruptible: bool) -> bool:
        """Print the pieces as they arrive; return False if Ctrl-C interrupted them."""
        try:
            for piece in stream:
                pieces.append(piece)
                write_piece(piece)
        except KeyboardInterrupt:
            if not interruptible:
                raise
            return False
        return True


def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Image files for the first question."),
    ] = None,
    *,
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    image_cache: options.ImageCacheFolder = None,
    split: options.SplitOption = None,
    max_image_tokens: options.MaxImageTokens = None,
    upscale: options.Upscale = True,
    password: file_options.Password = None,
    video_resize: video_options.ResizeOption = video_options.Resize.video_size,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    stop_on_repetition: options.StopOnRepetition = False,
    keep_special_tokens: options.KeepSpecialTokens = False,
    special_tokens_in_text: options.SpecialTokensInText = True,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    verbose: options.VerboseOption = False,
) -> None:
    """Talk about images in several turns. From a pipe, each line is one question."""
    chosen = answer_options.generation_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        stop_on_repetition=stop_on_repetition,
        keep_special_tokens=keep_special_tokens,
        split=split,
        max_image_tokens=max_image_tokens,
        upscale=upscale,
        password=password,
    )
    vlm = load_model(
        model,
        revision,
        dtype,
        device,
        threads,
        base=base,
        mmproj=mmproj,
        images=image_cache,
    )
    vlm.processor.special_tokens_in_text = special_tokens_in_text
    video_options.set_resize(vlm, video_resize)
    conversation = Conversation(vlm, chosen, verbose=verbose)
    for image in images or []:
        conversation.add_image(image)
    interactive = sys.stdin.isatty()
    if interactive:
        note("Ask a question. /help lists the commands; Ctrl-D exits.")
    for line in _typed_lines() if interactive else sys.stdin:
        try:
            if not _turn(conversation, line.strip(), interactive=interactive):
                return
        except (SmolstackError, OSError) as problem:
            # An interactive conversation continues; a script must not continue without its image.
            if not interactive or isinstance(problem, BrokenPipeError):
                raise
            error(str(problem))


def _turn(conversation: Conversation, line: str, *, interactive: bool) -> bool:
    """Run a command or answer a question; return False at the end of the conversation."""
    if not line:
        return True
    if not line.startswith("/"):
        conversation.ask(line, interruptible=interactive)
        return True
    command, _, rest = line.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        for told in HELP.splitlines():
            note(told)
    elif command == "/reset":
        conversation.reset()
        if interactive:
            note("The conversation was reset.")
    elif command == "/image":
        _add_images(conversation, rest.strip(), interactive=interactive)
    else:
        raise PromptError(f"{command} is not a command; /help lists them")
    return True


def _add_images(conversation: Conversation, rest: str, *, interactive: bool) -> None:
    for path in _paths(rest):
        conversation.add_image(path)
        if interactive:
            note(
                f"{path} will be sent with your next question ({len(conversation.waiting)} so far)."
            )


def _paths(rest: str) -> list[str]:
    """Return the files after /image: one with spaces in its name, or several."""
    if not rest:
        raise PromptError("/image needs a file, such as /image sign.png")
    whole = Path(rest).expanduser()
    if whole.is_file():
        return [str(whole)]
    try:
        words = shlex.split(rest)
    except ValueError as problem:
        raise PromptError(f"/image {rest}: {problem}") from None
    return [str(Path(word).expanduser()) for word in words]


def _typed_lines() -> Iterator[str]:
    """Yield lines from the keyboard, with editing and history if the platform supports them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what gives input() its editing
    while True:
        try:
            # input() writes its prompt to stdout, which may be a file.
            if sys.stdout.isatty():
                yield input("> ")
                continue
            sys.stderr.write("> ")
            sys.stderr.flush()
            line = sys.stdin.readline()
        except EOFError:
            line = ""
        if not line:
            sys.stderr.write("\n")
            return
        yield line
