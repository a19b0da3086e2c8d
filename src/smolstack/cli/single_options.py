"""Commands that reject repeated options, since it is unclear which value is meant."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand


class Once(TyperCommand):
    """A command that rejects repeated options, except flags and options with several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        parameters: Counter[Any] = Counter(order)
        for parameter, times in parameters.items():
            single = parameter.param_type_name == "option" and not (
                parameter.multiple or parameter.is_flag or parameter.count
            )
            if single and times > 1:
                raise typer.BadParameter(
                    f"given {times} times, expected once", ctx=ctx, param=parameter
                )
        return super().parse_args(ctx, args)
