"""The accepted image file formats and their suffixes.

Pillow is told which formats to try. Some of its formats are excluded: they run other programs
(EPS) or are not useful here, and every decoder adds attack surface for damaged or hostile files.
"""

from __future__ import annotations

from functools import cache

# Pillow's names. Formats without a clear signature come last: they match what no other does.
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
# Formats that a server decodes for untrusted files.
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
# Suffixes that a folder is searched for.
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
# Suffixes treated as videos wherever a path is accepted; listed in docs/videos.md.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2", ".ismv"),
    *(".mkv", ".mk3d", ".webm", ".ogv", ".ogm", ".nut"),
    *(".avi", ".divx", ".wmv", ".asf", ".flv", ".rm", ".rmvb", ".dv", ".mxf", ".gxf", ".wtv"),
    *(".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t"),
    *(".h264", ".264", ".h265", ".265", ".hevc", ".ivf", ".obu", ".mjpg", ".mjpeg", ".y4m"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def can_read_heif() -> bool:
    """Whether pillow-heif is installed, which reads HEIC and HEIF files."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def accepted(formats: tuple[str, ...]) -> tuple[str, ...]:
    """The formats to try, with HEIF if its package is installed."""
    return (*formats, "HEIF") if can_read_heif() else formats


def is_heif(beginning: bytes) -> bool:
    """Whether a file that starts with these bytes is a HEIC or HEIF file."""
    return beginning[4:8] == b"ftyp" and beginning[8:12] in _HEIF_BRANDS
