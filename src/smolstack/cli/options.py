"""Options shared by several commands, and their conversion to the library's options."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolstack.errors import ConfigError, PromptError
from smolstack.output_files import check_folder

if TYPE_CHECKING:
    from smolstack.generation.options import AnswerOptions
    from smolstack.processor.geometry import Tiling
    from smolstack.vlm import VLM

_SAMPLING, _STOPPING = "Sampling", "Ending the answer"
_MODEL, _IMAGES, _FORM = "Model", "Images", "Form of the answer"


class Dtype(str, Enum):
    """Number formats in which weights can be used."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|FILE|HUB_ID",
        help="A checkpoint folder, a GGUF file or a hub id. Default: the bundled reader.",
        rich_help_panel=_MODEL,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME", rich_help_panel=_MODEL),
]
_MODEL_HELP = "A checkpoint folder, a GGUF file or a hub id"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP}.")]
OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP}. Default: the bundled reader."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Number format of the weights; auto: as stored, or float32 if this machine does not "
        "compute in that format. int8 and int4 are faster on a CPU and slightly less exact.",
        rich_help_panel=_MODEL,
    ),
]
ImageCacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--image-cache",
        metavar="FOLDER",
        help="Cache visual tokens there: later questions about an image skip the vision tower.",
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, …; auto: the fastest available one.",
        metavar="NAME",
        rich_help_panel=_MODEL,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of CPU threads. Default: torch's.",
        rich_help_panel=_MODEL,
    ),
]
SplitOption = Annotated[
    bool | None,
    typer.Option(
        "--split/--no-split",
        help="Split images into tiles, or use a single tile per image. Default: the "
        "checkpoint's setting.",
        show_default=False,
        rich_help_panel=_IMAGES,
    ),
]
MaxImageTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum visual tokens per image; the largest tile grid within this limit is used.",
        rich_help_panel=_IMAGES,
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Maximum frames per second of a video. Default: the checkpoint's (1).",
        rich_help_panel=_IMAGES,
    ),
]
MaxFrames = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum frames of a video. Default: the checkpoint's (64).",
        rich_help_panel=_IMAGES,
    ),
]
Upscale = Annotated[
    bool,
    typer.Option(
        "--upscale/--no-upscale",
        help="Enlarge small images, as in the training of the published models, or keep their "
        "size: fewer tiles and tokens.",
        rich_help_panel=_IMAGES,
    ),
]
KeepSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--keep-special-tokens",
        help="Keep special tokens in the answer; document models answer with them.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the tile plan and the timings on stderr.")
]
MaxNewTokens = Annotated[
    int, typer.Option(help="Maximum length of the answer, in tokens.", rich_help_panel=_STOPPING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A string that ends the answer and is not part of it; repeatable.",
        rich_help_panel=_STOPPING,
    ),
]
StopOnRepetition = Annotated[
    bool,
    typer.Option(
        "--stop-on-repetition",
        help="End an answer that repeats itself.",
        rich_help_panel=_STOPPING,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        help="0: always the most likely token; higher: more varied.",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Keep the most likely tokens up to this total probability.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int, typer.Option(help="Keep this many most likely tokens; 0: all.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least this many times as likely as the most likely one.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Above 1: repeated tokens become less likely.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Makes sampling repeatable. Default: random.",
        rich_help_panel=_SAMPLING,
    ),
]
SchemaOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A JSON Schema that the answer satisfies (extra structured); - reads it from stdin.",
        rich_help_panel=_FORM,
    ),
]
RegexOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="A regular expression that the whole answer matches (extra structured).",
        rich_help_panel=_FORM,
    ),
]
ChoiceOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A possible answer; give one option per choice. Their probabilities are computed "
        "exactly and shown with --verbose or --json.",
        rich_help_panel=_FORM,
    ),
]


def form_options(
    schema: Path | None, regex: str | None, choices: list[str] | None
) -> AnswerOptions:
    """Return the ``VLM.stream`` options for structured output."""
    chosen: AnswerOptions = {}
    if schema is not None:
        chosen["schema"] = _read_schema(schema)
    if regex is not None:
        chosen["regex"] = regex
    if choices:
        chosen["choices"] = choices
    return chosen


def _read_schema(path: Path) -> Any:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is no JSON: {error}") from None


def generation_options(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
    stop_on_repetition: bool,
    keep_special_tokens: bool,
    split: bool | None,
    max_image_tokens: int | None,
    upscale: bool,
    password: str | None = None,
) -> AnswerOptions:
    """Convert command line options to ``VLM.stream`` options."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or [],
        "stop_on_repetition": stop_on_repetition,
        "keep_special_tokens": keep_special_tokens,
        "split": split,
        "max_image_tokens": max_image_tokens,
        "upscale": upscale,
        "password": password,
    }


def tiling_of(chosen: AnswerOptions) -> Tiling:
    """Return the options about opening and tiling images."""
    names = ("split", "max_image_tokens", "upscale", "password")
    return {name: chosen.get(name) for name in names}  # type: ignore[return-value]


def load_model(
    model: str | None,
    revision: str | None,
    dtype: Dtype,
    device: str,
    threads: int | None,
    *,
    base: str | None = None,
    mmproj: Path | None = None,
    images: Path | None = None,
) -> VLM:
    """Load a checkpoint according to the options, with a spinner."""
    from smolstack.cli.console import progress

    if images is not None:
        check_folder(images, "--image-cache", ConfigError)
    with progress(f"Loading {model or 'the bundled reader'} …") as told:
        import torch

        from smolstack.vlm import load

        if threads is not None:
            torch.set_num_threads(threads)
        vlm = load(
            model,
            dtype=dtype.value,
            device=device,
            revision=revision,
            base=base,
            mmproj=mmproj,
            progress=told,
        )
    vlm.image_cache.folder = images
    return vlm
