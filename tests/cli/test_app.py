"""The command as a whole: help, version, start-up, interruptions, pipes."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolstack
import smolstack.errors
from smolstack.cli import ask, chat, options
from smolstack.generation.options import DEFAULT_MAX_NEW_TOKENS
from smolstack.generation.sampling import SamplingParams

Run = Callable[..., Any]
COMMANDS = ["ask", "chat", "plan", "inspect", "verify", "new"]
PROGRAM = [sys.executable, "-m", "smolstack.cli"]
PLAIN = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(re.search(rf"\b{name}\b", result.stdout) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(run: Run, command: str) -> None:
    result = run(command, "-h")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"smolstack {command}" in result.stdout.split("Examples")[1]
    begun = [line.strip() for line in result.stdout.splitlines()]
    assert not any(line.count(f"smolstack {command} ") > 1 for line in begun), "one on a line"


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    assert "Usage" in run().output


def test_it_runs_as_a_module_of_either_name() -> None:
    for module in ("smolstack", "smolstack.cli"):
        program = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"smolstack {smolstack.__version__} ")


@pytest.mark.parametrize("command", ["ask", "chat", "plan"])
def test_the_usage_line_says_that_several_images_are_allowed(run: Run, command: str) -> None:
    usage = next(line for line in run(command, "-h").stdout.splitlines() if "Usage" in line)
    assert "IMAGE..." in usage


def test_the_version_is_the_package_s(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"smolstack {smolstack.__version__} ")


def test_a_misspelt_option_is_refused(run: Run) -> None:
    result = run("ask", "a.png", "What?", "--temprature", "1")
    assert result.exit_code == 2
    assert "--temprature" in result.stderr


def test_defaults_are_those_of_the_library() -> None:
    library = SamplingParams()
    for command in (ask.ask, chat.chat):
        ours = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        assert ours["max_new_tokens"] == DEFAULT_MAX_NEW_TOKENS
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
            assert ours[name] == getattr(library, name)
        assert ours["dtype"] is options.Dtype.auto
        assert ours["split"] is None


def test_help_and_completion_start_without_torch() -> None:
    program = (
        "import sys; from smolstack.cli.app import app; from smolstack.cli.new import _complete;"
        "assert len(_complete('smolvlm2')) == 3;"
        "print([m for m in ('torch', 'numpy', 'PIL', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_completion_knows_the_presets() -> None:
    environment = {
        **PLAIN,
        "_SMOLSTACK_COMPLETE": "complete_bash",
        "COMP_WORDS": "smolstack new granite",
        "COMP_CWORD": "2",
    }
    command = [
        sys.executable,
        "-c",
        "from smolstack.cli.app import app; app(prog_name='smolstack')",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["granite-docling-258m"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_quietly_with_130() -> None:
    # A test runner in the background has SIGINT switched off, and its children with it.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from smolstack.cli.app import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "ask", "-", "What?"],  # waits for an image on stdin
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (stdout, stderr) == (b"", b"")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_goes_away_ends_the_answer_quietly(tiny_folder: Path, sign: Path) -> None:
    command = [*PROGRAM, "ask", str(sign), "Hi", "--model", str(tiny_folder)]
    process = subprocess.Popen(
        [*command, "--no-split"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_a_real_run_answers_on_stdout_alone(tiny_folder: Path, sign: Path, run: Run) -> None:
    options = ["--model", str(tiny_folder), "--max-new-tokens", "5"]
    with sign.open("rb") as image:
        done = subprocess.run(
            [*PROGRAM, "ask", "-", "What does it say?", *options],
            stdin=image,
            capture_output=True,
            text=True,
            env=PLAIN,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("ask", sign, "What does it say?", *options).stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_is_one_sentence() -> None:
    command = [*PROGRAM, "new", "--list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=PLAIN, check=False
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: No space left on device"]


def test_debug_shows_where_an_error_came_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "nothing")
    plain = run("inspect", missing)
    assert (plain.exit_code, len(plain.stderr.splitlines())) == (2, 1)
    monkeypatch.setenv("SMOLSTACK_DEBUG", "1")
    told = run("inspect", missing)
    assert told.exit_code == 2
    assert "Traceback" in told.stderr
    assert "in locate" in told.stderr
    assert told.stderr.endswith(plain.stderr)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search", "a.parquet", "why"], "Missing option '--model' / '-m'; see smolstack search "),
        (["ask", "a.png", "b", "--dtype", "int3"], "Invalid value for '--dtype': 'int3' is not "),
        (["frobnicate"], "No such command 'frobnicate'; see smolstack --help"),
        (["plan", "--depth"], "No such option: --depth"),
    ],
)
def test_wrong_options_are_one_sentence(refuses: Run, arguments: list[str], sentence: str) -> None:
    assert refuses(*arguments).startswith(sentence)
