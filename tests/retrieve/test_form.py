"""Files in forms as browsers send them, and bodies that are none."""

from __future__ import annotations

import numpy as np
import pytest

from shnet_jax.retrieve import form
from shnet_jax.retrieve.form import file_in

KIND = "multipart/form-data; boundary=edge"
DATA = (
    np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes() + b"\r\n--edg\r\n\r\n\n\r" + bytes(range(256))
)
EMPTY = b"--edge\r\n\r\n"


def part(content=DATA, head='form-data; name="photo"; filename="new.png"'):
    return f"--edge\r\nContent-Disposition: {head}\r\nContent-Type: image/png\r\n\r\n".encode() + content + b"\r\n"


def body(*parts):
    return b"".join(parts) + b"--edge--\r\n"


@pytest.mark.parametrize("content", [DATA, b"", b"\r\n"])
def test_every_byte_of_a_file_arrives(content):
    other = part(b"17", 'form-data; name="k"')
    for parts in (
        (part(content),),
        (other, part(content)),
        (b"preamble\r\n", part(content), other),
        (EMPTY, part(content)),
    ):
        assert file_in(KIND, body(*parts), "photo") == (content, "new.png")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ('form-data; name="photo"', "photo"),
        ('form-data; name="photo"; filename=""', "photo"),
        ("form-data; name=photo; filename=a.png", "a.png"),
        ('FORM-DATA; filename="name=x; é %22.png"; Name="photo"', "name=x; é %22.png"),
        (f'form-data; name="photo"; filename="{"a" * 300}"', "a" * form.MAX_NAME),
    ],
)
def test_names_of_files(head, name):
    assert file_in('Multipart/Form-Data; charset=utf-8; boundary="edge"', body(part(b"data", head)), "photo") == (
        *(b"data", name),
    )


def test_parts_beyond_the_limit_are_not_read():
    """Else a body of empty parts, which are small, keeps the server busy."""
    few, many = [EMPTY] * (form.MAX_PARTS - 1), [EMPTY] * form.MAX_PARTS
    assert file_in(KIND, body(*few, part()), "photo") == (DATA, "new.png")
    with pytest.raises(ValueError, match=f"found none: expected at most {form.MAX_PARTS} parts$"):
        file_in(KIND, body(*many, part()), "photo")


@pytest.mark.parametrize(
    ("kind", "sent", "message"),
    [
        ("multipart/form-data", body(part()), "its content type has no boundary of 1 to 70 letters"),
        (f"multipart/form-data; boundary={'a' * 71}", body(part()), "its content type has no boundary"),
        (KIND, b"", "its boundary is not in the body"),
        (KIND, part(), "part 1 has no end"),
        (KIND, b"--edge\r\n" * 9, "part 1: expected headers of at most 4096 bytes"),
        (
            KIND,
            body(part(head=f'form-data; name="photo"; filename="{"a" * form.MAX_HEAD}"')),
            "part 1: expected headers",
        ),
        (KIND, body(part(head='attachment; name="photo"')), "$"),
        (KIND, body(), "$"),
    ],
)
def test_what_is_no_form_with_a_file_is_said_in_a_line(kind, sent, message):
    with pytest.raises(
        ValueError, match=f'expected a form with a file in the field "photo", found none(: )?{message}'
    ) as error:
        file_in(kind, sent, "photo")
    assert "\n" not in str(error.value)


def test_a_form_that_is_cut_off_has_no_file():
    whole = body(part(b"content"))
    for length in range(whole.index(b"\r\n--edge--") + len(b"\r\n--edge")):
        with pytest.raises(ValueError, match="found none"):
            file_in(KIND, whole[:length], "photo")
