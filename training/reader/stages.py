"""The stages of the reader's training: how long, how fast, on what; for two processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".cache/reader")  # where the states are kept


@dataclass(frozen=True)
class Stage:
    """One stage: how long, how fast, and what is trained."""

    name: str
    steps: int
    batch: int  # tiles of pictures with a question, in each process
    crowd: int  # tiles full of text, too
    rate: float
    tower: float = 1.0  # the tower's rate, as a share of it
    part: str = ""  # names of the weights that are trained start with one of these, by comma
    naming: float = 0.0  # weight of the patch-naming loss
    answering: float = 0.0  # weight of the next-token loss
    drawn: bool = True  # False: no pictures, no tower
    level: float = 1.0  # how hard pictures are at first
    asked: bool = True  # False: pictures without a question, only tiles that show text
    full: float = 0.0  # the share of pictures with as many and as long lines as the level allows


STAGES = (
    Stage(
        "name",
        3000,
        batch=10,
        crowd=14,
        rate=2.5e-3,
        part="vision.",
        naming=1.0,
        asked=False,
        level=0.0,
        full=0.35,
    ),
    Stage(
        "spell",
        2000,
        batch=32,
        crowd=0,
        rate=2e-3,
        part="connector.,decoder.",
        answering=1.0,
        drawn=False,
        level=0.5,
        full=0.6,
    ),
    Stage(
        "answer",
        3000,
        batch=24,
        crowd=0,
        rate=1.2e-3,
        part="connector.,decoder.",
        answering=1.0,
        level=0.7,
        full=0.45,
    ),
    Stage(
        "whole",
        1500,
        batch=24,
        crowd=8,
        rate=8e-4,
        tower=0.5,
        naming=0.5,
        answering=1.0,
        full=0.45,
    ),
)
