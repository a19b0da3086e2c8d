"""The ``smolstack`` command: its subcommands, and how errors and interruptions end it."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import traceback
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smolstack import __version__
from smolstack.cli import (
    ask,
    bench,
    bridge,
    chat,
    console,
    convert,
    convert_checkpoint,
    diff,
    export,
    inspect,
    map,
    new,
    plan,
    quantize,
    search,
    serve,
    train,
    verify,
)
from smolstack.cli.single_options import Once
from smolstack.errors import SmolstackError

# Typer contains its own copy of Click since 0.26, and exports only this error's subclass.
_UsageError: Any = typer.BadParameter.__base__
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Commands(TyperGroup):
    """The subcommands; invalid input ends them with one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "smolstack"
            console.error(f"{error.format_message().rstrip('.')}; see {command} --help")
            raise typer.Exit(BAD_INPUT) from None
        except (SmolstackError, OSError, MemoryError) as error:
            if console.debugging():
                traceback.print_exc()
            console.error(_sentence(error))
            raise typer.Exit(BAD_INPUT) from None
        except RuntimeError as error:
            # torch's error type, compared by name: importing torch here would slow down every
            # start.
            starved = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
            if not starved:
                raise
            if console.debugging():
                traceback.print_exc()
            console.error(f"the device has too little memory: {error}")
            raise typer.Exit(BAD_INPUT) from None
        return result


app = typer.Typer(
    name="smolstack",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`smolstack COMMAND --help` shows a command's options and examples.",
)


def _version(wanted: bool) -> None:
    if wanted:
        torch = "not installed"
        with contextlib.suppress(metadata.PackageNotFoundError):
            torch = metadata.version("torch")
        typer.echo(f"smolstack {__version__} (torch {torch}, Python {platform.python_version()})")
        raise typer.Exit


def _lines(examples: str) -> str:
    """Format examples, one per line, for both typer and Markdown."""
    return examples.replace("\n\n", "\n\n\n\n")


@app.callback()
def smolstack(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show a traceback before every error; SMOLSTACK_DEBUG=1 does the same.",
        ),
    ] = False,
) -> None:
    """Ask Idefics3 / SmolVLM vision-language models about images."""
    if debug:
        os.environ["SMOLSTACK_DEBUG"] = "1"


app.command(cls=Once, epilog=_lines(ask.EXAMPLES))(ask.ask)
app.command(cls=Once, epilog=_lines(chat.EXAMPLES))(chat.chat)
app.command(cls=Once, epilog=_lines(convert.EXAMPLES))(convert.convert)
app.command("map", cls=Once, epilog=_lines(map.EXAMPLES))(map.map_)
app.command(cls=Once, epilog=_lines(search.EXAMPLES))(search.search)
app.command(cls=Once, epilog=_lines(plan.EXAMPLES))(plan.plan)
app.command(cls=Once, epilog=_lines(export.EXAMPLES))(export.export)
app.command(cls=Once, epilog=_lines(inspect.EXAMPLES))(inspect.inspect)
app.command(cls=Once, epilog=_lines(verify.EXAMPLES))(verify.verify)
app.command(cls=Once, epilog=_lines(diff.EXAMPLES))(diff.diff)
app.command(cls=Once, epilog=_lines(new.EXAMPLES))(new.new)
app.command("convert-checkpoint", cls=Once, epilog=_lines(convert_checkpoint.EXAMPLES))(
    convert_checkpoint.convert_checkpoint
)
app.command(cls=Once, epilog=_lines(bridge.EXAMPLES))(bridge.bridge)
app.command(cls=Once, epilog=_lines(train.EXAMPLES))(train.train)
app.command(cls=Once, epilog=_lines(quantize.EXAMPLES))(quantize.quantize)
app.command(cls=Once, epilog=_lines(bench.EXAMPLES))(bench.bench)
app.command(cls=Once, epilog=_lines(serve.EXAMPLES))(serve.serve)


def main() -> None:
    """Entry point of the ``smolstack`` command."""
    for stream in (sys.stdout, sys.stderr):
        # Answers may contain characters that the terminal's encoding does not have.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.lastResort = console.LogNotes(logging.WARNING)
    # Pillow's warnings about damaged files, in addition to the error message.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    app()


def _sentence(error: Exception) -> str:
    """Return an error's message as one sentence."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return (
            f"there is too little memory: {error}" if str(error) else "there is too little memory"
        )
    return str(error)


def _forget_stdout() -> None:
    """Discard buffered output when the reader of stdout has closed it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
