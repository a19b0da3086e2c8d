"""Numbers as people read them, in messages and tables."""

from __future__ import annotations


def plural(number: int, one: str, many: str | None = None) -> str:
    """``1 tile``, ``17 tiles``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size_in_bytes(number: float) -> str:
    """Bytes in the unit that reads best, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def millions(number: int) -> str:
    """Parameters or pixels, short: ``256.5 M``."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:,.2f} {unit}"
    return str(number)
