"""Which image files are opened, and with which suffixes they come.

Pillow is told which formats to try. Others that it knows are left out: some run other programs
(EPS), some are of no use for what is asked here, and every decoder is one more that a damaged or a
hostile file may get at.
"""

from __future__ import annotations

from functools import cache

# Pillow's names. Formats without a clear signature come last: they take what is none of the others.
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "TIFF",
    "GIF",
    "BMP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "QOI",
    "SGI",
    "DDS",
    "PSD",
    "DIB",
    "PCX",
    "TGA",
)
# Those whose decoders are let near files of strangers, by a server.
SERVED = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "TIFF",
    "GIF",
    "BMP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
)
# What a folder is searched for.
SUFFIXES = (
    ".apng",
    ".avif",
    ".bmp",
    ".dds",
    ".dib",
    ".gif",
    ".heic",
    ".heif",
    ".ico",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".jpx",
    ".mpo",
    ".pbm",
    ".pcx",
    ".pfm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".psd",
    ".qoi",
    ".sgi",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def can_read_heif() -> bool:
    """Whether the package pillow-heif is there, which then reads HEIC and HEIF files."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def accepted(formats: tuple[str, ...]) -> tuple[str, ...]:
    """The formats to try, HEIF among them where its package is installed."""
    return (*formats, "HEIF") if can_read_heif() else formats


def is_heif(beginning: bytes) -> bool:
    """Whether a file that begins so is a HEIC or HEIF file."""
    return beginning[4:8] == b"ftyp" and beginning[8:12] in _HEIF_BRANDS
