"""Font files for drawn images, by family, split into those trained on and those held out.

A family stands on one side only, with everything that was derived from it: DejaVu is held out, so
its descendants (Hack, Verana) are not used at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.reader import shape, text

ROOTS = (Path("/usr/share/fonts"), Path("/usr/share/texmf/fonts"))
ALIKE = 6  # characters that a font may draw like another one: I and l, O and 0, and their like

# family → (Debian package, pattern of file names)
TRAIN: Mapping[str, tuple[str, str]] = {
    "Accanthis": ("fonts-adf-accanthis", "AccanthisADF*.otf"),
    "Agave": ("fonts-agave", "agave-*.ttf"),
    "Allerta": ("fonts-allerta", "allerta*.otf"),
    "Andika": ("fonts-sil-andika", "Andika-*.ttf"),
    "Anonymous Pro": ("fonts-anonymous-pro", "Anonymous Pro*.ttf"),
    "Arapey": ("fonts-arapey", "Arapey-*.otf"),
    "Averia Sans": ("fonts-averia-sans-gwf", "AveriaSansGWF-*.ttf"),
    "Averia Serif": ("fonts-averia-serif-gwf", "AveriaSerifGWF-*.ttf"),
    "B612": ("fonts-b612", "B612*.otf"),
    "Baskervald": ("fonts-adf-baskervald", "Baskervald*.otf"),
    "Bebas Neue": ("fonts-bebas-neue", "BebasNeue-*.otf"),
    "Beteckna": ("fonts-beteckna", "Beteckna*.ttf"),
    "CMU Bright": ("fonts-cmu", "cmunb[rmst]*.ttf"),
    "CMU Typewriter": ("fonts-cmu", "cmun[tv][tibx]*.ttf"),
    "Cantarell": ("fonts-cantarell", "Cantarell-*.otf"),
    "Carlito": ("fonts-crosextra-carlito", "Carlito-*.ttf"),
    "Caslon": ("fonts-georgewilliams", "Caslon*.ttf"),
    "Century Catalogue": ("fonts-century-catalogue", "Century-*.ttf"),
    "Charis": ("fonts-sil-charis", "CharisSIL-*.ttf"),
    "Clear Sans": ("fonts-clear-sans", "ClearSans-*.ttf"),
    "Comfortaa": ("fonts-comfortaa", "Comfortaa-*.ttf"),
    "Courier Prime": ("fonts-courier-prime", "Courier Prime*.otf"),
    "Dosis": ("fonts-dosis", "Dosis-*.otf"),
    "EB Garamond": ("fonts-ebgaramond", "EBGaramond*.otf"),
    "Fanwood": ("fonts-fanwood", "Fanwood*.otf"),
    "Fantasque Sans": ("fonts-fantasque-sans", "FantasqueSansMono-*.otf"),
    "Fira Code": ("fonts-firacode", "FiraCode-*.ttf"),
    "FreeMono": ("fonts-freefont-ttf", "FreeMono*.ttf"),
    "FreeSans": ("fonts-freefont-ttf", "FreeSans*.ttf"),
    "FreeSerif": ("fonts-freefont-ttf", "FreeSerif*.ttf"),
    "GFS Didot": ("fonts-gfs-didot", "GFSDidot*.otf"),
    "GFS Neohellenic": ("fonts-gfs-neohellenic", "GFSNeohellenic*.otf"),
    "GNU Typewriter": ("fonts-gnutypewriter", "GNUTypewriter.*"),
    "Gentium": ("fonts-sil-gentium-basic", "GenB*.ttf"),
    "Gillius": ("fonts-adf-gillius", "GilliusADF*.otf"),
    "Go": ("fonts-go", "Go-*.ttf"),
    "Hermit": ("fonts-hermit", "Hermit-*.otf"),
    "Humor Sans": ("fonts-humor-sans", "Humor-Sans.ttf"),
    "IBM 3270": ("fonts-3270", "3270*.ttf"),
    "Ikarius": ("fonts-adf-ikarius", "IkariusADF*.otf"),
    "Inconsolata": ("fonts-inconsolata", "Inconsolata*"),
    "Inter": ("fonts-inter", "Inter*.otf"),
    "Junction": ("fonts-junction", "Junction*.otf"),
    "Jura": ("fonts-jura", "Jura-*.otf"),
    "Karla": ("fonts-karla", "Karla*.ttf"),
    "Lato": ("fonts-lato", "Lato-*.ttf"),
    "Latin Modern Roman": ("fonts-lmodern", "lmroman*-*.otf"),
    "Latin Modern Sans": ("fonts-lmodern", "lmsans*-*.otf"),
    "League Mono": ("fonts-league-mono", "LeagueMono-*.otf"),
    "League Spartan": ("fonts-league-spartan", "LeagueSpartan-*.otf"),
    "Liberation Mono": ("fonts-liberation", "LiberationMono-*.ttf"),
    "Liberation Sans": ("fonts-liberation", "LiberationSans*-*.ttf"),
    "Liberation Serif": ("fonts-liberation", "LiberationSerif-*.ttf"),
    "Libertine": ("fonts-linuxlibertine", "LinLibertine_[DMR]*.otf"),
    "Biolinum": ("fonts-linuxlibertine", "LinBiolinum_R*.otf"),
    "Libris": ("fonts-adf-libris", "LibrisADF*.otf"),
    "M PLUS": ("fonts-mplus", "Mplus*.otf"),
    "Mekanus": ("fonts-adf-mekanus", "MekanusADF*.otf"),
    "Millimetre": ("fonts-millimetre", "millimetre*.otf"),
    "Monofur": ("fonts-monofur", "monof*.ttf"),
    "Mononoki": ("fonts-mononoki", "mononoki-*.ttf"),
    "National Park": ("fonts-national-park", "NationalPark-*.otf"),
    "Nimbus Mono": ("fonts-urw-base35", "NimbusMonoPS-*.otf"),
    "Nimbus Roman": ("fonts-urw-base35", "NimbusRoman-*.otf"),
    "Nimbus Sans": ("fonts-urw-base35", "NimbusSans*.otf"),
    "Noto Serif": ("fonts-noto-core", "NotoSerif-*.ttf"),
    "OCR A": ("fonts-ocr-a", "OCRA*.ttf"),
    "OCR B": ("fonts-ocr-b", "OCRB*.otf"),
    "OSP DIN": ("fonts-opendin", "OSP-DIN.ttf"),
    "Old Standard": ("fonts-oldstandard", "OldStandard-*.ttf"),
    "OpenDyslexic": ("fonts-opendyslexic", "OpenDyslexic-*.otf"),
    "Oxygen": ("fonts-oxygen", "Oxygen*.ttf"),
    "Palladio": ("fonts-urw-base35", "P052-*.otf"),
    "Play": ("fonts-play", "Play-*.ttf"),
    "Quattrocento": ("fonts-quattrocento", "Quattrocento-*.otf"),
    "Quicksand": ("fonts-quicksand", "Quicksand-*.ttf"),
    "Roadgeek": ("fonts-roadgeek", "RG2014*.ttf"),
    "Roboto": ("fonts-roboto-unhinted", "Roboto*.ttf"),
    "Romande": ("fonts-adf-romande", "RomandeADF[NS]*.otf"),
    "Routed Gothic": ("fonts-routed-gothic", "routed-gothic*.ttf"),
    "STIX": ("fonts-stix", "STIX-*.otf"),
    "Schola": ("fonts-texgyre", "texgyreschola-*.otf"),
    "Adventor": ("fonts-texgyre", "texgyreadventor-*.otf"),
    "Bonum": ("fonts-texgyre", "texgyrebonum-*.otf"),
    "Sora": ("fonts-sora", "Sora-*.otf"),
    "Switzera": ("fonts-adf-switzera", "SwitzeraADF-*.otf"),
    "Tiresias": ("fonts-tiresias", "tiresias_*.ttf"),
    "Tribun": ("fonts-adf-tribun", "TribunADF*.otf"),
    "Tuffy": ("fonts-tuffy", "tuffy_*.ttf"),
    "Universalis": ("fonts-adf-universalis", "UniversalisADF*.otf"),
    "Yanone Kaffeesatz": ("fonts-yanone-kaffeesatz", "YanoneKaffeesatz-*.otf"),
    "Eurofurence": ("fonts-eurofurence", "eurof*.ttf"),
    "osifont": ("fonts-osifont", "osifont.ttf"),
}
HELD_OUT: Mapping[str, tuple[str, str]] = {
    "Cabin": ("fonts-cabin", "Cabin-*.otf"),
    "Caladea": ("fonts-crosextra-caladea", "Caladea-*.ttf"),
    "Comic Neue": ("fonts-comic-neue", "ComicNeue-*.otf"),
    "DejaVu Sans": ("fonts-dejavu-extra", "DejaVuSans[-C]*.ttf"),
    "DejaVu Mono": ("fonts-dejavu-core", "DejaVuSansMono*.ttf"),
    "DejaVu Serif": ("fonts-dejavu-extra", "DejaVuSerif*.ttf"),
    "JetBrains Mono": ("fonts-jetbrains-mono", "JetBrainsMono-*.ttf"),
    "Manrope": ("fonts-manrope", "Manrope-*.ttf"),
    "Open Sans": ("fonts-open-sans", "OpenSans-*.ttf"),
    "PT Sans": ("fonts-paratype", "PT[SNC][57]*.ttf"),
    "PT Serif": ("fonts-paratype", "PT[FZ][57]*.ttf"),
    "Vollkorn": ("fonts-vollkorn", "Vollkorn-*.ttf"),
}
SPLITS: Mapping[str, Mapping[str, tuple[str, str]]] = {"train": TRAIN, "held-out": HELD_OUT}


def packages() -> list[str]:
    """Debian packages that hold every family of both splits, and the dictionary."""
    named = {package for split in SPLITS.values() for package, _ in split.values()}
    return sorted(named | {text.DICTIONARY_PACKAGE})


@cache
def families(split: str) -> dict[str, list[str]]:
    """Usable font files of each installed family of a split; families without any are left out."""
    found = {}
    for family, (_, pattern) in SPLITS[split].items():
        paths = sorted({p.name: p for root in ROOTS for p in root.rglob(pattern)}.items())
        usable = [str(path) for _, path in paths if draws_text(str(path))]
        if usable:
            found[family] = usable
    return found


def draws_text(path: str) -> bool:
    """Whether a font file can be opened and has all characters, visible and apart.

    Capitals in place of small letters, or one box in place of all that is missing, are refused.
    """
    if Path(path).suffix.lower() not in (".ttf", ".otf"):
        return False
    try:
        font = ImageFont.truetype(path, 32)
        shapes = [_shape(font, character) for character in shape.CHARACTERS]
    except OSError:
        return False
    distinct = set(shapes)
    small, capital = (_shape(font, character) for character in "eE")
    return b"" not in distinct and len(distinct) >= len(shapes) - ALIKE and small != capital


def _shape(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The character's pixels, empty when it draws nothing."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((8, 8), character, 255, font=font)
    return image.tobytes() if image.getbbox() else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", action="store_true", help="Debian packages, on one line")
    if parser.parse_args().packages:
        print(" ".join(packages()))
        return
    for split in SPLITS:
        found = families(split)
        print(f"{split}: {len(found)} families, {sum(map(len, found.values()))} files")
        print("  missing:", ", ".join(sorted(set(SPLITS[split]) - set(found))) or "none")


if __name__ == "__main__":
    main()
