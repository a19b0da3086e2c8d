"""Options shared by several commands."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

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
SpecialTokensInText = Annotated[
    bool,
    typer.Option(
        "--special-tokens-in-text/--no-special-tokens-in-text",
        help="Convert the text of special tokens in questions to these tokens, as in transformers, "
        "or tokenize it as plain characters: questions written by others cannot forge turns.",
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
