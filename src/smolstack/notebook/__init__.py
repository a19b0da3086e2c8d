"""Displays plans, answers, streams, visual tokens and the progress of long calls in notebooks.

Importing smolstack in IPython registers the formatters; ``%load_ext smolstack.notebook`` does so
explicitly.
"""

from __future__ import annotations

from typing import Any

from smolstack.progress import Tell, show_with

# Formatters are registered by type name, to avoid importing heavy modules.
_SHOWN = (
    ("image/png", "smolstack.processor.geometry", "TilePlan", "plan_png"),
    ("image/png", "smolstack.batch", "VisualTokens", "visual_tokens_png"),
    ("text/html", "smolstack.generation.answer", "Answer", "answer_html"),
    ("ipython", "smolstack.generation.inline", "AnswerStream", "show_stream"),
)


def load_ipython_extension(shell: Any) -> None:
    """Register the formatters with an IPython shell."""
    formatter = shell.display_formatter
    for kind, module, name, function in _SHOWN:
        own = (
            formatter.ipython_display_formatter if kind == "ipython" else formatter.formatters[kind]
        )
        own.for_type_by_name(module, name, _lazily(function))
    if hasattr(shell, "kernel"):  # not a terminal, which would print the bars' HTML
        show_with(_bar)


def register() -> None:
    """Register the formatters with the current IPython shell, if there is one."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        load_ipython_extension(shell)


def _bar() -> Tell:
    from smolstack.notebook.progress_bar import ProgressBar

    return ProgressBar()


def _lazily(function: str) -> Any:
    def shown(value: Any) -> Any:
        from smolstack.notebook import display

        return getattr(display, function)(value)

    return shown
