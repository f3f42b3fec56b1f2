"""Readers of untrusted files: the sizes and places that they state are checked before use.

Whatever the bytes are, only the errors named here come out, and no more memory is taken than the file has bytes, times
a small constant.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Most pixels of a picture that is decoded: a PNG of some kB may claim a thousand times as many."""
MAX_PICTURE_BYTES = 2**28
"""Largest size of the file of a picture."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of pictures that are read. Pillow knows more, and runs another program (Ghostscript) for some of them."""
MAX_ARRAYS = 1000
"""Most arrays in an .npz file."""
MAX_IMAGE_BYTES = 2**26
"""Most bytes in the arrays of one image. The largest feature map in use, 2048 x 38 x 50 float64, has 31 MB."""

NPY_FAULTS = (
    *(ValueError, SyntaxError, tokenize.TokenError, TypeError, LookupError),
    *(OverflowError, RecursionError, MemoryError),
)
"""Exceptions that NumPy's readers raise for an invalid .npy header, which is a Python literal."""

_GREY, _COLOUR, _PALETTE = 0, 2, 3  # colour types of a PNG
_SAMPLE_FORMAT = 339  # the tag of a TIFF
_STRIP = 64  # rows of a picture that are converted at once
_NAME = 255  # bytes of a file name on the file systems of today
_NPY = b"\x93NUMPY"


def check_kind(path: Path) -> None:
    """Raises ValueError when the file is a stand-in for the one that was meant: every reader asks this first."""
    with path.open("rb") as file:
        _check_start(file.read(64), path)


def _check_start(start: bytes, path: object) -> None:
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path}: found a git-LFS pointer in place of the file; fetch it with: git lfs pull")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path}: found a web page in place of the file, as of a download that asks to log in")


def read_json(path: Path) -> Any:
    """Parsed contents of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises ValueError naming the file, FileNotFoundError without one.
    """
    check_kind(path)
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes | str, path: object) -> Any:
    """Parsed JSON text. Raises ValueError naming `path`, the place it comes from."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        contents = "a file that is cut off" if end and error.doc.strip() else "other text"
        raise ValueError(f"{path}: expected JSON, found {contents}: {error}") from None
    except ValueError as error:  # of bytes that are no UTF-8 and of numbers of thousands of digits
        raise ValueError(f"{path}: expected JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, found lists or objects that are nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`, and ValueError for a value of another kind."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_npz(path: Path, names: Collection[str] | None = None, most: int | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, by name; read-only.

    names: read only these of them; what else the file has, such as pickled objects, is not looked at.
    most: take compressed arrays too (`np.savez_compressed`) where all that are read have at most this many bytes
    unpacked. Without it none may be compressed.

    `np.load` takes as much memory as the headers in it ask for, and unpacks compressed ones of any size. Raises
    FileNotFoundError, and ValueError for a file that is damaged, compressed or holds anything but arrays of numbers.
    """
    check_kind(path)
    with path.open("rb") as file:
        return parse_npz(file, path, names, most)


def parse_npz(
    file: BinaryIO, where: object, names: Collection[str] | None = None, most: int | None = None
) -> dict[str, np.ndarray]:
    """Arrays of an open .npz file, by name; where: its place, for errors."""
    start = file.read(_START)
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ARRAYS:
                raise ValueError(f"{len(entries)} arrays, more than {MAX_ARRAYS}")
            wanted = [(entry.filename.removesuffix(".npy"), entry) for entry in entries]
            wanted = [(name, entry) for name, entry in wanted if names is None or name in names]
            if len({name for name, _ in wanted}) < len(wanted):
                raise ValueError("two arrays of one name")
            _check_sizes([entry for _, entry in wanted], size, most)
            return {name: _member(archive, entry) for name, entry in wanted}
    # Versions that Python does not know, passwords, entries behind the end: damage shows in many ways.
    except (
        *(zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, zlib.error),
        *(EOFError, OverflowError, ValueError, struct.error),
    ) as error:
        contents = "" if start.startswith(b"PK") else kind_of(start)
        contents = (
            f"{contents} (cut off?)" if isinstance(error, zipfile.BadZipFile) and start.startswith(b"PK") else contents
        )
        raise ValueError(f"{where}: expected arrays as np.savez writes them{contents}: {error}") from None


def _check_sizes(entries: list[zipfile.ZipInfo], file_size: int, most: int | None) -> None:
    """Raises ValueError when the directory of an archive has more bytes than may be, before any is unpacked.

    What is unpacked of an entry ends at the size that the directory has for it, and only deflated entries are.
    """
    total = sum(entry.file_size for entry in entries)
    if most is None:
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename!r} is compressed")
        if total > file_size:
            raise ValueError("its arrays together should be larger than the file")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{entry.filename!r} is compressed by a method that np.savez_compressed does not use")
    if most is not None and total > most:
        raise ValueError(f"its arrays together have {total} bytes, more than the {most} that are read of an image")


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        return parse_npy(member.read(entry.file_size), entry.filename)


_START = 256  # bytes of a file that identify its format
_KINDS = (
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"BZh", "a bzip2 archive (unpack it first)"),
    (b"PK\x03\x04", "a zip archive (an .npz, or unpack it first)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (data_prep.from_hdf5)"),
    (_NPY, "a .npy array"),
    *((bytes([0x80, protocol]), "a pickle, which is not loaded") for protocol in (2, 3, 4, 5)),
    (b"<", "a page of HTML or XML (a download that failed?)"),
    (b"%PDF", "a PDF"),
)


def kind_of(start: bytes) -> str:
    """End of an error message, ", found ...", from the first bytes of a file of another kind than expected."""
    if not start.strip(b"\0"):
        return ", found zeros" if start else ", found an empty file"
    if start[4:8] == b"ftyp":
        return f", found a file of the kind {start[8:12].decode('latin-1').strip()!r} (HEIC, AVIF or a video)"
    return next((f", found {kind}" for magic, kind in _KINDS if start.lstrip().startswith(magic)), "")


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped.

    Raises FileNotFoundError, and ValueError for a file that is cut off or of another kind.
    """
    check_kind(path)
    with path.open("rb") as file:
        # NumPy takes the memory for a header, up to 4 GB as the header says, before it checks the length of the file.
        start = file.read(_START)
        length = int.from_bytes(start[8:12] if start[6:7] > b"\1" else start[8:10], "little")
        if not start.startswith(_NPY) or 12 + length > path.stat().st_size + 2:
            contents = ", found no header of one (cut off?)" if start.startswith(_NPY) else kind_of(start)
            raise ValueError(f"{path}: expected a .npy array of numbers{contents or ', found another kind of file'}")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except NPY_FAULTS as error:
        contents = " (cut off?)" if "mmap length" in str(error) else ""
        raise ValueError(f"{path}: expected a .npy array of numbers{contents}: {error}") from None


def parse_npy(data: bytes, name: str) -> np.ndarray:
    """The array in the bytes of a .npy file, read-only. Raises ValueError unless its header fits the bytes."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except NPY_FAULTS as error:
        raise ValueError(f"{name!r} has no header of a .npy array: {error}") from None
    rest = len(data) - file.tell()
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"{name!r} holds Python objects or records, which are not loaded")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"{name!r} should hold {dtype} {list(shape)}, found {rest} bytes")
    flat = np.frombuffer(data, dtype, math.prod(shape), file.tell()) if rest else np.zeros(0, dtype)
    flat.flags.writeable = False
    if dtype.kind == "U" and rest:
        codes = flat.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if ((codes > 0x10FFFF) | (codes >= 0xD800) & (codes < 0xE000)).any():  # NumPy would make broken texts of them
            raise ValueError(f"{name!r} holds text that is no Unicode")
    return flat.reshape(shape, order="F" if fortran else "C")


def inside(folder: Path, name: str) -> Path:
    """The path of the file that a record, an index or a caption file calls `name`, which has to lie in `folder`.

    Raises ValueError for a name that leads out of it (absolute, by "..", through a link) or that no file can have. The
    folder itself may be a link, and there need be no such file. One link may lead out: that of a snapshot in a cache of
    the Hugging Face hub into the blobs of the same repository.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"{folder}: {name!r:.200} is no name of a file in this folder")
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
        path = folder / name
        try:
            path.stat()  # since Python 3.13, resolve() answers for links in a circle as well
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise
        # Where nothing is, no link has to be followed: an image has several names, and most of them have no file.
        belongs_here = longest <= _NAME and (not os.path.lexists(path) or _belongs(path.resolve(), folder.resolve()))
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # links in a circle
        raise ValueError(f"{folder}: {name!r:.200} is no name of a file in this folder: {error}") from None
    if not belongs_here:
        problem = "leads out of this folder by a link" if longest <= _NAME else "is too long for a name"
        raise ValueError(f"{folder}: {name!r:.200} {problem}; what it names is not read")
    return path


def _belongs(target: Path, folder: Path) -> bool:
    """Whether a resolved path lies in a resolved folder, or is a blob of the hub repository whose snapshot that is.

    huggingface_hub keeps models--ORG--NAME/snapshots/REVISION/FILE as a link to models--ORG--NAME/blobs/HASH.
    """
    if target.is_relative_to(folder):
        return True
    if target.parent.name != "blobs":
        return False
    repository = target.parent.parent
    snapshots = repository / "snapshots"
    named = repository.name.startswith(("models--", "datasets--", "spaces--"))
    return named and folder != snapshots and folder.is_relative_to(snapshots)


PICTURE_FAULTS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError),
    *(struct.error, Image.DecompressionBombError),
)
"""Exceptions that Pillow's decoders raise for damaged files of the many formats that it knows."""


def read_picture(path: Path) -> Image.Image:
    """Reads a picture file, as `parse_picture`. Raises FileNotFoundError too."""
    return parse_picture(_picture_bytes(path), str(path))


def parse_picture(data: bytes, name: str) -> Image.Image:
    """Decodes the photograph in the bytes of a file called `name`: RGB of 8 bits, upright.

    It is turned as its EXIF says. 16 bits are scaled to 8, transparent parts lie on white, and CMYK becomes RGB by
    Pillow's conversion. Of an animation or a file of several pages the first picture counts. Label maps are read by
    `read_label_map`.

    Raises ValueError for bytes that are no picture, damaged, of more than MAX_PIXELS, or whose numbers have no known
    range (whole numbers of 32 bits, floating point).
    """
    with _opened(data, name, FORMATS) as picture:
        _mend(picture, data)
        ImageOps.exif_transpose(picture, in_place=True)
        return _as_rgb(picture)


def read_label_map(path: Path, mode: str | None = None) -> Image.Image:
    """Reads a PNG label map pixel for pixel as stored: not turned, scaled or laid on white.

    mode: "RGB" for labels that are colours; None keeps the mode of the file, so that a palette's pixels are indices.
    Raises as `read_picture`, and ValueError for another number of bits than 8, which Pillow scales.
    """
    data = _picture_bytes(path)
    with _opened(data, str(path), ("PNG",)) as picture:
        bits, kind = data[24:26]  # of IHDR, which comes first
        if bits != 8 and kind != _PALETTE:
            raise ValueError(f"labels of 8 bits were expected, found {bits} a value")
        return picture.convert(mode) if mode else picture.copy()


def _picture_bytes(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_PICTURE_BYTES:
        raise ValueError(f"{path}: expected a picture, found {size} bytes, more than {MAX_PICTURE_BYTES}")
    return path.read_bytes()  # of a file Pillow reads, and takes memory for, as much as that says it has


@contextmanager
def _opened(data: bytes, name: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The decoded picture; faults inside of the block are ValueErrors that begin with `name`."""
    _check_start(data[:64], name)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
            picture.load()
            yield picture
    except UnidentifiedImageError:
        contents = kind_of(data[:_START]) or f", found no {', '.join(formats)}"
        raise ValueError(f"{name}: expected a picture{contents}") from None
    except PICTURE_FAULTS as error:
        raise ValueError(f"{name}: expected a picture: {error}") from None


def _mend(picture: Image.Image, data: bytes) -> None:
    """Corrects the few rare kinds whose pixels Pillow decodes wrongly, or raises ValueError."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (8,))
    unpacked = tags.get(ExifTags.Base.Compression, 1) == 1
    if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and (len(bits) == 2 or (16 in bits and unpacked)):
        raise ValueError(
            f"it has {len(bits)} planes of {bits[0]} bits each; save it with the values of a pixel together"
        )
    if picture.mode == "L" and 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("its values have signs; save it with 8 or unsigned 16 bits")
    if picture.format == "PNG" and "transparency" in picture.info:
        depth, kind = data[24:26]
        if kind == _COLOUR and depth == 16:
            raise ValueError("one colour of 16 bits is transparent; save it with 8 bits, or with an alpha channel")
        if kind == _GREY and depth in (
            2,
            4,
        ):  # the pixels are scaled to 8 bits, the number of the transparent grey is not
            picture.info["transparency"] *= 255 // (2**depth - 1)


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PPM"):
        kind = "floating-point numbers" if picture.mode == "F" else "whole numbers of 32 bits, or signed ones"
        raise ValueError(
            f"its pixels are {kind} (mode {picture.mode}), of which no file says what is white; save it with 8 or "
            "unsigned 16 bits"
        )
    to_rgba = _grey_16 if picture.mode.startswith("I") else _rgba
    if to_rgba is _rgba and "transparency" not in picture.info and "a" not in picture.mode.lower():
        return picture.convert("RGB")
    flat = Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, _STRIP):  # the larger forms in between take memory for a few rows only
        box = (0, top, picture.width, min(top + _STRIP, picture.height))
        strip = to_rgba(picture, box)
        flat.paste(strip, box, strip)
    return flat


def _rgba(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return picture.crop(box).convert("RGBA")


def _grey_16(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Converts 16-bit grey to 8 bits; Pillow's own conversion makes everything above 255 white."""
    values = np.array(picture.crop(box), np.uint32)
    tags = getattr(picture, "tag_v2", {})  # of a TIFF, whose numbers may have 12 bits, or 0 for white
    white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
    grey = (values * 255 + white // 2) // white
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey
    opaque = values != picture.info.get("transparency", 2**32 - 1)
    return Image.fromarray(np.stack([grey, grey, grey, opaque * 255], -1).astype(np.uint8))
