"""Mutations of a valid file that know a little of file formats: lengths, numbers, nesting, names."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
NUMBERS = (b"0", b"-1", b"1", b"7", b"4294967296", b"99999999999999999999", b"1e999", b"NaN", b"-Infinity", b"9" * 5000)
WORDS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b'"../../../etc/passwd"', b'"/etc/passwd"', b'"\\ud800"', b'"\\u0000"'),
    *(b"\xff\xfe", b"\x00", b"\n", b"\t", b"\r", b'"', b"'", b",", b"=", b"{", b"[", b"}", b"]", b"#0\t"),
    *(b"[" * 3000, b'{"a":' * 3000, b"(" * 300, b"A" * 300, "\u202e\u0661\u212b".encode()),
)

Mutation = Callable[[bytearray, random.Random], None]


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 16)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    piece = bytes(data[start : start + rng.randint(1, 64)])
    data[start:start] = piece * rng.choice((1, 2, 50))


def _integer(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(len(data))
    number = rng.choice(INTERESTING) & (256**size - 1)
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _number(data: bytearray, rng: random.Random) -> None:
    """Another number in place of one written in digits."""
    digits = [i for i, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if not digits:
        return _insert(data, rng)
    start = end = rng.choice(digits)
    while end < len(data) and 0x30 <= data[end] <= 0x39:
        end += 1
    data[start:end] = rng.choice(NUMBERS)
    return None


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((*WORDS, *NUMBERS))


def _value(data: bytearray, rng: random.Random) -> None:
    """Something else in place of a quoted text."""
    start = data.find(b'"', rng.randrange(len(data)))
    end = data.find(b'"', start + 1)
    if start < 0 or end < 0:
        return _insert(data, rng)
    data[start : end + 1] = rng.choice((*WORDS, *NUMBERS))
    return None


def _double(data: bytearray, rng: random.Random) -> None:
    """A float that is none, or huge."""
    at = rng.randrange(len(data))
    data[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e38, -0.0)))


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _flip, _cut, _remove, _repeat, _integer, _integer),
    *(_number, _insert, _value, _double),
)


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """A seed file with one to five mutations."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        if not data:
            break
        rng.choice(MUTATIONS)(data, rng)
    return bytes(data)


def with_true_checksums(data: bytes) -> bytes:
    """A zip archive whose checksums fit its damaged contents, so that these are looked at at all."""
    fixed, at = bytearray(data), 0
    while (at := fixed.find(b"PK\x01\x02", at)) >= 0:
        if len(fixed) >= at + 46:
            _, size = struct.unpack_from("<LL", fixed, at + 20)
            header = struct.unpack_from("<L", fixed, at + 42)[0]
            if len(fixed) >= header + 30:
                inner_name, inner_extra = struct.unpack_from("<HH", fixed, header + 26)
                start = header + 30 + inner_name + inner_extra
                struct.pack_into("<L", fixed, at + 16, zlib.crc32(bytes(fixed[start : start + size])))
                struct.pack_into("<L", fixed, header + 14, zlib.crc32(bytes(fixed[start : start + size])))
        at += 4
    return bytes(fixed)
