"""Files of torch.save: two that torch 2.13 wrote (tests/golden), and what must not get through."""

from __future__ import annotations

import pickle
import struct
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from shnet_jax.interop import torch_file, torch_pickle
from shnet_jax.interop.torch_file import open_torch_file
from tests.interop.torch_writer import Raw, Writer, name, save

GOLDEN = Path(__file__).parents[1] / "golden"


def ramp(count: int) -> np.ndarray:
    return np.arange(count) / 8 - 1


IMAGE = {
    "module.0.weight": np.arange(6.0).reshape(2, 3),
    "module.0.bias": np.arange(2.0),
    "module.1.weight": np.arange(2.0),
    "module.1.bias": np.arange(2.0),
    "module.1.running_mean": np.arange(2.0),
    "module.1.running_var": np.arange(2.0),
    "module.1.num_batches_tracked": np.array(0, np.int64),
    "transposed": ramp(24).reshape(4, 6).T,  # a view on the same storage as the next
    "part": ramp(24).reshape(4, 6)[1:3, 2:],
    "scalar": np.array(7, np.int64),
}
TEXT = {
    "half": ramp(5).astype(np.float16),
    "bfloat": ramp(5).astype(ml_dtypes.bfloat16),
    "double": ramp(2),
    "small": np.arange(3, dtype=np.int8),
    "flag": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "parameter": ramp(2),
}


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_stream.pth"])
def test_what_torch_wrote(file):
    opened = open_torch_file(GOLDEN / file)
    content = opened.content
    assert {k: v for k, v in content.items() if k not in ("model", "opt")} == {
        "epoch": 3,
        "best_rsum": 412.5,
        "Eiters": 1234,
    }
    assert isinstance(content["opt"], types.SimpleNamespace)
    assert vars(content["opt"]) == {
        "embed_size": 8,
        "margin": 0.2,
        "no_imgnorm": False,
        "resume": "",
        "none": None,
        "big": 2**40,
        "schedule": [1, 2],
    }
    for state, expected in zip(content["model"], (IMAGE, TEXT), strict=True):
        assert list(state) == list(expected)
        for key, array in expected.items():
            found = opened.array(state[key])
            dtype = np.float32 if array.dtype == np.float64 and key != "double" else array.dtype
            assert found.dtype == dtype and found.shape == array.shape, key
            assert not (found.size and found.flags.writeable), key
            np.testing.assert_array_equal(found, array.astype(dtype), key)


def test_the_writer_of_these_tests_writes_the_same(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(2, dtype=np.int64)}
    opened = open_torch_file(save(tmp_path / "w.pth", {"model": arrays, "n": [1, (2.5, None)]}))
    assert opened.content["n"] == [1, (2.5, None)]
    for key, array in arrays.items():
        np.testing.assert_array_equal(opened.array(opened.content["model"][key]), array)


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as fault:
        opened = open_torch_file(path)
        for tensor in opened.content.values():
            opened.array(tensor)
    assert str(path) in str(fault.value)


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_calls_something_is_named_and_not_run(protocol, legacy, tmp_path):
    trace = tmp_path / "ran"
    bomb = {"model": Bomb(Path.touch, trace)} if protocol == 2 else {"model": Bomb(eval, f"open({str(trace)!r}, 'w')")}
    path = tmp_path / "bomb.pth"
    if legacy:
        start = (GOLDEN / "torch_stream.pth").read_bytes()[:15]
        head = [1001, {"protocol_version": 1001, "little_endian": True}]
        path.write_bytes(start + b"".join(pickle.dumps(x, 2) for x in [*head, bomb, []]))
        path.write_bytes(path.read_bytes().replace(pickle.dumps(bomb, 2), pickle.dumps(bomb, protocol)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb, protocol))
    refused(path, r"it names (pathlib\.\w+|builtins\.eval|builtins\.getattr|__builtin__\.\w+), which is not loaded")
    assert not trace.exists()
    pickle.loads(pickle.dumps(bomb, protocol))
    assert trace.exists()  # it would have


# Tuples that each hold the one before twice: a key whose hash looks at 2^60 objects.
DOUBLED = b"N" + b"".join(bytes([0x71, i, 0x68, i, 0x86]) for i in range(60))


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (name("torch.nn.modules.linear", "Linear") + b")\x81", r"it names torch\.nn\.modules\.linear\.Linear"),
        (name("numpy.core.multiarray", "scalar"), r"it names numpy\.core\.multiarray\.scalar"),
        (name("collections", "OrderedDict.fromkeys"), r"it names collections\.OrderedDict\.fromkeys"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x96" + struct.pack("<Q", 2**50), "not a checkpoint that can be read safely"),  # 1 PiB of bytearray
        (b"Nr" + struct.pack("<I", 2**31), "more memory"),  # a memo of 2^31 places
        (b"}N" + b"\x85" * 200_000 + b"Ns", "more than 20000 tuples"),  # a key whose hash needs a stack without end
        (b"}" + DOUBLED + b"Ns", "more than 1000000 objects in its keys"),
        (b"}(" + DOUBLED + b"Nu", "more than 1000000 objects in its keys"),
        (b"}(" + DOUBLED + b"NK\x01Nu", "more than 1000000 objects in its keys"),
        (name("collections", "OrderedDict") + b"]" + DOUBLED + b"N\x86a\x85R", "else than names and values"),
        # Neither an opcode that changes nothing nor a tensor in between hides the tuple.
        (b"}" + DOUBLED + b"(eNbq\x60h\x60\x85Ns", "more than 1000000 objects in its keys"),
        (
            b"}" + name("torch._utils", "_rebuild_tensor_v2") + b"(" + DOUBLED + b"NNNtRNs",
            "more than 1000000 objects in its keys",
        ),
        (b"X" + struct.pack("<I", 2**31) + b"a", "not a checkpoint that can be read safely"),
        # Nothing of what a file may name has attributes to be set, or lets its class be changed.
        (name("torch._utils", "_rebuild_tensor_v2") + b"}(X\x01\x00\x00\x00aK\x01ub", "__dict__"),
        (name("collections", "OrderedDict") + b"N}(X\x04\x00\x00\x00keysK\x01u\x86b", "no attribute"),
        (
            name("argparse", "Namespace") + b"N}(X\x04\x00\x00\x00__eq__K\x01u\x86b".replace(b"__eq__", b"__eq"),
            "immutable",
        ),
        (
            b"N" + b"".join(bytes([0x71, i, 0x68, i, 0x86]) for i in range(60)) + b"Q",
            "a storage is described by",
        ),  # 2^60 None
        (b"(X\x06\x00\x00\x00modulet" + b"Q", "a storage is described by"),
    ],
)
def test_what_else_a_pickle_could_try(opcodes, match, tmp_path):
    refused(save(tmp_path / "x.pth", {"a": Raw(opcodes)}), match)


def test_a_pickle_of_very_many_opcodes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
    refused(save(tmp_path / "x.pth", {"a": [None] * 1000}), "more than 1000 opcodes")


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 7},
        {"kind": "DoubleStorage"},
        {"key": "9"},
        {"key": "../../etc/passwd"},
        {"offset": 1},
        {"offset": -1},
        {"shape": (7,)},
        {"shape": (2**40,), "strides": (0,)},
        {"shape": (2, 3), "strides": (4, 1)},
        {"strides": (-1,)},
        {"shape": (3,), "strides": ()},
        {"shape": None},
        {"storage": None},
    ],
)
def test_a_tensor_must_lie_in_its_storage(changed, tmp_path):
    writer = Writer()
    tensor = writer.tensor(np.arange(6, dtype=np.float32), **changed)
    refused(save(tmp_path / "x.pth", {"a": tensor}, writer), "does not lie in|should hold|has no storage")


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    for file in ("torch_zip.pth", "torch_stream.pth"):
        whole = (GOLDEN / file).read_bytes()
        for size in range(0, len(whole) - 1, 97):
            path = tmp_path / file
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=file):
                open_torch_file(path)


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_stream.pth"])
def test_damage_anywhere_gives_an_error_or_an_array(file, tmp_path):
    whole, rng, path = (GOLDEN / file).read_bytes(), np.random.default_rng(0), tmp_path / file
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 2):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            opened = open_torch_file(path)
            for state in opened.content["model"]:
                for tensor in state.values():
                    opened.array(tensor)
        except (ValueError, KeyError) as error:  # no "model" any more
            assert isinstance(error, KeyError) or str(path) in str(error)


def test_a_changed_byte_is_found(tmp_path):
    whole = bytearray((GOLDEN / "torch_zip.pth").read_bytes())
    at = whole.index(np.arange(6, dtype=np.float32).tobytes())
    whole[at + 5] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    opened = open_torch_file(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="storage '0': wrong checksum"):
        opened.array(opened.content["model"][0]["module.0.weight"])
    at = whole.index(b"embed_size")
    whole[at] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    refused(tmp_path / "x.pth", r"data\.pkl: wrong checksum")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"archive/../../x": b""}, "a name that torch.save does not write"),
        ({"/etc/passwd": b""}, "a name that torch.save does not write"),
        ({"archive\\x": b""}, "a name that torch.save does not write"),
        ({"archive/code.py": b""}, r"without NAME/data\.pkl"),
        ({"a/data.pkl": b"N.", "b/data.pkl": b"N."}, r"without NAME/data\.pkl"),
        ({"a/data.pkl": b"N.", "a/byteorder": b"big"}, "other byte order"),
        ({"a/data.pkl": b"N." * 60}, r"data\.pkl has 120 bytes, more than 100"),
    ],
)
def test_an_archive_of_another_kind(entries, match, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 100)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    refused(tmp_path / "x.pth", match)


def test_compressed_entries_and_other_files(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a zip bomb would be one
        archive.writestr("archive/data.pkl", b"N." * 100)
    refused(path, "compressed or encrypted")
    path.write_bytes(b"not a checkpoint")
    refused(path, "no file of torch.save")
    path.write_bytes(b"a" * 257 + b"ustar")
    refused(path, r"a tar archive of torch 0\.1")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_torch_file(tmp_path / "nothing.pth")
