"""What drawn images say: words, numbers, prices, dates, codes, addresses, and plain nonsense.

Real words and numbers are learned quickly; random strings keep the reader honest. One in ten of
all words and of all other strings is kept for the test and never trained on.
"""

from __future__ import annotations

import hashlib
import random
import string
from functools import cache
from pathlib import Path

from training.reader import shape

DICTIONARY = Path("/usr/share/dict/words")
DICTIONARY_PACKAGE = "wamerican"  # Debian
FREQUENT = (
    "the and of to in is it for on with as at by from this that not are be or an no yes you we all "
    "your our new open closed push pull exit enter stop start total price date time name address "
    "street road city phone number page room floor gate platform train bus ticket bill invoice "
    "receipt amount tax cash card sale free water coffee tea milk bread please thank hello welcome "
    "good morning night day week month year monday tuesday wednesday thursday friday saturday "
    "sunday january february march april may june july august september october november december "
    "north south east west left right up down high low hot cold warning danger caution do keep out "
    "private public office school bank hotel shop market station airport park garden house home "
    "door window table book letter paper model test results chapter section figure menu file edit "
    "view help search order item size color red green blue black white yellow small large first "
    "second third last next one two three four five six seven eight nine ten about more less than"
)
COMMON = tuple(FREQUENT.split())
ALONE = frozenset("CcOoSsVvWwXxZzUuIl.,:;'\"-_")  # not to be told from others if alone
ALIKE = "IlO"  # like each other, 1 or 0 in many fonts: not among characters at random
WEIGHTS = {  # of sentences, numbers, prices, dates, codes, addresses, random strings
    "train": (38, 24, 8, 7, 9, 4, 10),  # many numbers, whose every digit is to be seen
    "held-out": (45, 14, 8, 7, 9, 4, 13),
}
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo ya ze tre sto pla gri nt rs"


def is_held_out(text: str) -> bool:
    """Whether a string is kept for the test: one in ten of those of two characters and more."""
    if len(text) < 2:
        return False
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


@cache
def words(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Common words and those of the dictionary that belong to a split, all lower-case."""
    if DICTIONARY.is_file():
        listed = DICTIONARY.read_text(encoding="utf-8").split()
        known = {w.lower() for w in listed if w.isascii() and w.isalpha() and 2 <= len(w) <= 12}
    else:  # no dictionary: words of the same look
        rng = random.Random("syllables")
        known = {
            "".join(rng.choices(SYLLABLES.split(), k=rng.randint(1, 4))) for _ in range(20_000)
        }
    kept = split == "held-out"
    return (
        tuple(word for word in COMMON if is_held_out(word) == kept),
        tuple(sorted(word for word in known if is_held_out(word) == kept)),
    )


def draw_line(rng: random.Random, split: str, longest: int) -> str:
    """One line of 1 to ``longest`` characters, without spaces at its ends or two in a row.

    A lone character is one that is known without others beside it: no "c" that may be a "C".
    """
    kinds = (_sentence, _numbers, _price, _date, _code, _address, _random)
    while True:
        kind = rng.choices(kinds, weights=WEIGHTS[split])[0]
        line = " ".join(kind(rng, split, longest).split())
        if not 1 <= len(line) <= longest or line in ALONE:
            continue
        if kind is _sentence or is_held_out(line) == (split == "held-out"):
            return line
        if len(line) == 1 and rng.random() < 0.1:  # as rare as other strings that are held out
            return line


def _word(rng: random.Random, split: str) -> str:
    common, known = words(split)
    return rng.choice(common if rng.random() < 0.3 else known)


def _sentence(rng: random.Random, split: str, longest: int) -> str:
    wanted = rng.randint(1, longest)
    line = _word(rng, split)
    while len(line) < wanted:
        between = rng.choices((" ", ", ", "-", ". ", " & ", "/", ": "), (80, 5, 4, 3, 2, 2, 3))[0]
        longer = line + between + _word(rng, split)
        if len(longer) > longest:
            break
        line = longer
    style = rng.random()
    if style < 0.3:
        line = line.capitalize()
    elif style < 0.5:
        line = string.capwords(line)
    elif style < 0.7:
        line = line.upper()
    if rng.random() < 0.2:
        line += rng.choice((".", "!", "?", ":", ",", ";", "..."))
    elif rng.random() < 0.08:
        left, right = rng.choice(('""', "''", "()"))
        line = left + line + right
    return line


def _numbers(rng: random.Random, split: str, longest: int) -> str:
    length = rng.randint(1, min(longest, rng.choice((6, 6, 6, 10))))
    digits = "".join(rng.choices(string.digits, k=length))
    if rng.random() < 0.15:  # runs of one digit are hard to count
        start, run = rng.randrange(length), rng.randint(2, 4)
        digits = (digits[:start] + digits[start] * run + digits[start + run :])[:length]
    if length > 1 and digits[0] == "0" and rng.random() < 0.7:
        digits = rng.choice(string.digits[1:]) + digits[1:]
    if rng.random() < 0.25:
        more = "".join(rng.choices(string.digits, k=rng.randint(1, 4)))
        digits += rng.choice(" .,-/:") + more
    return digits


def _price(rng: random.Random, split: str, longest: int) -> str:
    amount = round(10 ** rng.uniform(-0.5, 5), 2)
    kind = rng.random()
    if kind < 0.4:
        return f"${amount:,.2f}"
    if kind < 0.6:
        return f"{amount:.2f} {rng.choice(('USD', 'EUR', 'kg', 'm', 'GB', 'mm'))}"
    if kind < 0.8:
        return f"{rng.choice(('Total', 'TOTAL', 'Tax', 'Sum', 'Cash'))}: {amount:.2f}"
    return f"{rng.choice('+-')}{amount % 100:.{rng.randint(0, 1)}f}%"


def _date(rng: random.Random, split: str, longest: int) -> str:
    year, month, day = rng.randint(1900, 2040), rng.randint(1, 12), rng.randint(1, 28)
    name = COMMON[COMMON.index("january") + month - 1].capitalize()
    time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}/{month:02d}/{year}",
            f"{month}/{day}/{year % 100:02d}",
            f"{day}.{month}.{year}",
            f"{name} {day}, {year}",
            f"{day} {name[:3]} {year}",
            time,
            f"{time}:{rng.randrange(60):02d}",
            f"{rng.randint(1, 12)}:{rng.randrange(60):02d} {rng.choice(('AM', 'PM', 'am', 'pm'))}",
        )
    )


def _code(rng: random.Random, split: str, longest: int) -> str:
    capitals = _distinct(string.ascii_uppercase)
    letters = rng.choice((capitals, capitals + string.digits))
    parts = []
    for _ in range(rng.randint(1, 3)):
        pool = rng.choice((letters, string.digits))
        parts.append("".join(rng.choices(pool, k=rng.randint(1, 5))))
    return rng.choice(("-", "", " ", "/", "#", "_")).join(parts)


def _address(rng: random.Random, split: str, longest: int) -> str:
    name, host = _word(rng, split), _word(rng, split)
    ending = rng.choice(("com", "org", "net", "de", "io"))
    kind = rng.random()
    if kind < 0.4:
        return f"{name}@{host}.{ending}"
    if kind < 0.7:
        return f"www.{host}.{ending}"
    if kind < 0.85:
        return f"+{rng.randint(1, 99)} {rng.randint(20, 999)} {rng.randrange(10**5, 10**7)}"
    return f"{rng.randint(1, 999)} {name.capitalize()} {rng.choice(('St.', 'Rd.', 'Ave', 'Lane'))}"


def _random(rng: random.Random, split: str, longest: int) -> str:
    pool = rng.choice(
        (shape.CHARACTERS, string.ascii_letters, string.ascii_letters + string.digits)
    )
    line = "".join(rng.choices(_distinct(pool), k=rng.randint(1, longest)))
    if len(line) > 6 and rng.random() < 0.5:
        cut = rng.randint(2, len(line) - 2)
        line = line[:cut] + " " + line[cut + 1 :]
    return line


def _distinct(pool: str) -> str:
    return "".join(character for character in pool if character not in ALIKE)
