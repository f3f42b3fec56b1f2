"""One reader of photographs, one of label maps: true values of files that are made here."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import from_person_search
from data_prep.extract import images
from data_prep.files import read_label_map
from data_prep.schema import DataError
from shnet_jax import untrusted
from shnet_jax.retrieve import pictures

RAMP = np.array([[0, 1, 128, 255, 256, 257, 1000, 32768, 65535]], np.uint16)
RAMP_8 = [0, 0, 0, 1, 1, 1, 4, 128, 255]  # to the nearest of 257 steps


def _bytes(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _read(data):
    picture = untrusted.parse_picture(data, "a.jpg")
    assert picture.mode == "RGB"
    return np.asarray(picture)


def _png(array, kind, bits=16, **chunks):
    """A PNG of any colour type and number of bits, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes() for row in array)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    head = struct.pack(">IIBBBBB", width * 8 // bits if bits < 8 else width, height, bits, kind, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tiff(values, white_is_zero=False, bits=16):
    """A grey TIFF of one strip, as cameras and microscopes write it."""
    data = values.astype("<u2").tobytes()
    if bits == 12:  # two pixels in three bytes
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 0)]
    tags += [(277, 1), (278, height), (279, len(data))]
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, at if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    "data",
    [
        _bytes(Image.fromarray(RAMP)),
        _bytes(Image.fromarray(RAMP), "TIFF"),
        _bytes(Image.fromarray(RAMP), "PPM"),
        _bytes(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        _tiff(RAMP),
        _tiff(65535 - RAMP, white_is_zero=True),
    ],
    ids=["png", "tiff", "pgm", "tiff big-endian", "tiff plain", "tiff white is zero"],
)
def test_16_bits_of_grey_are_scaled(data):
    np.testing.assert_array_equal(_read(data), np.repeat(np.array(RAMP_8)[None, :, None], 3, -1))


def test_values_of_8_bits_survive_the_way_through_16_and_12():
    eight = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(_read(_bytes(Image.fromarray(eight * 257)))[..., 0], eight)
    twelve = np.round(eight / 255 * 4095).astype(np.uint16)
    np.testing.assert_array_equal(_read(_tiff(twelve, bits=12))[..., 0], eight)
    ten = np.round(eight / 255 * 1023).astype(int).ravel()
    np.testing.assert_array_equal(_read(f"P2 16 16 1023 {' '.join(map(str, ten))}".encode())[..., 0], eight)


def test_16_bits_of_colour_and_alpha():
    colours = np.array([[[0, 257 * 7, 65535], [257 * 200, 0, 257]]], np.uint16)
    np.testing.assert_array_equal(_read(_png(colours, 2)), colours // 257)
    opaque = np.full((1, 2, 1), 65535, np.uint16)
    np.testing.assert_array_equal(_read(_png(np.concatenate([colours, opaque], -1), 6)), colours // 257)
    hidden = np.concatenate([colours, opaque * 0], -1)
    assert (_read(_png(hidden, 6)) == 255).all()
    one_is_clear = _png(RAMP, 0, tRNS=struct.pack(">H", 256))
    assert _read(one_is_clear)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 1, 4, 128, 255]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(bits):
    white = 2**bits - 1
    values = (0, 1, white)[: 8 // bits]  # of one byte
    packed = sum(value << (8 - bits * (place + 1)) for place, value in enumerate(values))
    for clear in {0, 1, white}:
        found = _read(_png(np.array([[packed]]), 0, bits=bits, tRNS=struct.pack(">H", clear)))[0, : len(values), 0]
        assert found.tolist() == [255 if value == clear else value * 255 // white for value in values]


def _planes(values, bits):
    """A colour TIFF whose planes lie one behind the other."""
    count, height, width = values.shape
    data, size = values.astype(f"<u{bits // 8}").tobytes(), height * width * bits // 8
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, count, 0), (259, 4, 1, 1), (262, 4, 1, 2)]
    tags += [(273, 4, count, 0), (277, 4, 1, count), (278, 4, 1, height), (279, 4, count, 0), (284, 4, 1, 2)]
    at = 8 + 2 + 12 * len(tags) + 4
    lists = {258: struct.pack("<3HH", *[bits] * 3, 0)}
    lists |= {
        273: b"".join(struct.pack("<I", at + 32 + i * size) for i in range(3)),
        279: struct.pack("<3I", *[size] * 3),
    }
    places = {258: at, 273: at + 8, 279: at + 20}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, places.get(tag, value)) for tag, kind, n, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + b"".join(lists.values()) + data


def test_what_pillow_misreads_is_refused():
    values = np.arange(3 * 2 * 4).reshape(3, 2, 4)
    np.testing.assert_array_equal(_read(_planes(values, 8)), values.transpose(1, 2, 0))
    clear = _png(np.array([[[0, 257 * 7, 65535]]], np.uint16), 2, tRNS=struct.pack(">HHH", 0, 257 * 7, 65535))
    for data, what in (
        (_planes(values * 257, 16), "3 planes of 16 bits"),
        (clear, "one colour of 16 bits is transparent"),
    ):
        with pytest.raises(ValueError, match=what):
            untrusted.parse_picture(data, "a")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "kind 'heic'"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"GIF", "no BMP, GIF"),
    ],
)
def test_what_lies_there_in_place_of_a_picture(data, what):
    with pytest.raises(ValueError, match=rf"a\.jpg: expected a picture, found {what}|found a file of the {what}"):
        untrusted.parse_picture(data, "a.jpg")


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (RAMP.astype(np.int32), "whole numbers of 32 bits"),
        (RAMP.astype(np.float32) / 65535, "floating-point numbers"),
    ],
)
def test_grey_of_an_unknown_range_is_refused_by_name(array, what, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(_bytes(Image.fromarray(array), "TIFF"))
    with pytest.raises(ValueError, match=rf"a\.tif: expected a picture: its pixels are {what}.*16 bits"):
        untrusted.read_picture(path)


def test_transparent_parts_lie_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)  # 51 is a fifth of 255
    expected = [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    for kind in ("PNG", "TIFF"):
        assert _read(_bytes(Image.fromarray(rgba), kind)).tolist() == expected
    assert _read(_bytes(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)).tolist() == expected
    grey = Image.fromarray(rgba[..., [0, 3]], "LA")
    assert _read(_bytes(grey))[..., 0].tolist() == [[10, 255, 204]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    assert _read(_bytes(palette)).tolist() == [[[10, 20, 30], [40, 50, 60], [0, 0, 0]]]
    clear = [[[10, 20, 30], [255, 255, 255], [0, 0, 0]]]
    assert _read(_bytes(palette, transparency=1)).tolist() == clear
    assert _read(_bytes(palette, transparency=bytes([255, 255, 51]))).tolist() == [
        [[10, 20, 30], [40, 50, 60], [204] * 3]
    ]
    assert _read(_bytes(palette, "GIF", transparency=1)).tolist() == clear
    tall = Image.new("RGBA", (3, 300), (9, 9, 9, 0))  # several strips
    tall.putpixel((1, 290), (1, 2, 3, 255))
    found = _read(_bytes(tall))
    assert found[290, 1].tolist() == [1, 2, 3] and (found == 255).sum() == found.size - 3


def test_one_bit_cmyk_and_the_first_of_several():
    bits = Image.fromarray(np.array([[True, False]]))
    assert _read(_bytes(bits)).tolist() == _read(_bytes(bits, "TIFF")).tolist() == [[[255] * 3, [0] * 3]]
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    for kind in ("JPEG", "TIFF"):  # Pillow's JPEG is Adobe's, with the inks inverted
        np.testing.assert_allclose(_read(_bytes(ink, kind)), np.full((16, 16, 3), [255, 0, 0]), atol=2)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        many = _bytes(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert Image.open(io.BytesIO(many)).n_frames == 2
        assert _read(many).tolist() == np.full((4, 4, 3), [255, 0, 0]).tolist()


@pytest.fixture
def turned():
    """A picture whose left half is black, of which the file says that it was turned; and as people see it."""
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:, 20:] = 255
    picture = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    return picture, exif, upright


def test_every_reader_turns_a_photograph_upright(tmp_path, turned):
    picture, exif, upright = turned
    for suffix, kind in ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP"), (".tif", "TIFF")):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(_bytes(picture, kind, exif=exif))
        for found in (
            np.asarray(images.Folder(tmp_path).load(path.name)),
            from_person_search.read_picture(path, (20, 40)),
        ):
            np.testing.assert_allclose(found, upright, atol=40)
        assert suffix == ".tif" or pictures.photograph(tmp_path, "a")[1] == 2  # width over height
        path.unlink()


def test_every_reader_scales_16_bits(tmp_path):
    grey = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    (tmp_path / "a.png").write_bytes(_bytes(grey))
    assert (np.asarray(images.Folder(tmp_path).load("a.png")) == 100).all()
    assert (from_person_search.read_picture(tmp_path / "a.png", (8, 8)) == 100).all()


def test_label_maps_are_read_pixel_for_pixel(tmp_path, turned):
    path = tmp_path / "a.png"
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = turned[1]
    path.write_bytes(_bytes(Image.fromarray(labels), exif=exif))
    np.testing.assert_array_equal(read_label_map(path), labels)
    palette = Image.fromarray(labels, "P")
    palette.putpalette(bytes(range(18)))
    path.write_bytes(_bytes(palette, transparency=3))
    np.testing.assert_array_equal(read_label_map(path), labels)
    rgba = np.dstack([labels, labels, labels, labels * 0])  # clear: on white every label would be 255
    path.write_bytes(_bytes(Image.fromarray(rgba)))
    np.testing.assert_array_equal(read_label_map(path, "RGB"), rgba[..., :3])


def test_labels_that_would_be_scaled_are_refused(tmp_path):
    path = tmp_path / "a.png"
    for data in (_bytes(Image.fromarray(RAMP)), _png(np.array([[0x12, 0x34]]), 0, bits=4)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.png: .*8 bits were expected, found (16|4)"):
            read_label_map(path)
    path.write_bytes(_bytes(Image.new("RGB", (4, 4)), "JPEG"))
    with pytest.raises(DataError, match="found no PNG"):
        read_label_map(path)


def test_a_file_too_large_to_be_a_picture(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.jpg: expected a picture, found 1099511627776 bytes"):
        untrusted.read_picture(tmp_path / "a.jpg")
