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
from tests.interop.torch_writer import Raw, Writer, attributes, name, save

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
ITEM = b"X\x01\x00\x00\x00aN\x86q\x01"  # ("a", None)
LIST = b"]q\x00(" + ITEM + b"h\x01" * 999 + b"e"
DICT = b"}q\x00(" + b"".join(b"X\x04\x00\x00\x00%04dN" % i for i in range(1000)) + b"u"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
REUSED = (name("torch._utils", "_rebuild_parameter") + b"h\x00R") * 1001


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (name("torch.nn.modules.linear", "Linear") + b")\x81", r"it names torch\.nn\.modules\.linear\.Linear"),
        (name("numpy.core.multiarray", "fromfile"), r"it names numpy\.core\.multiarray\.fromfile"),
        (name("numpy._core.multiarray", "_vec_string"), r"it names numpy\._core\.multiarray\._vec_string"),
        (name("numpy", "matrix"), r"it names numpy\.matrix, which is not loaded; save it again as tensors"),
        (name("easydict", "EasyDict.fromkeys"), r"it names easydict\.EasyDict\.fromkeys"),
        (name("_codecs", "lookup"), r"it names _codecs\.lookup"),
        (name("builtins", "eval"), r"it names builtins\.eval"),
        (name("collections", "OrderedDict.fromkeys"), r"it names collections\.OrderedDict\.fromkeys"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x96" + struct.pack("<Q", 2**50), "not a checkpoint that can be read safely"),  # 1 PiB of bytearray
        (b"Nr" + struct.pack("<I", 2**31), "more memory"),  # a memo of 2^31 places
        (b"}N" + b"\x85" * 200_000 + b"Ns", "a key of a dictionary is"),  # its hash needs a stack without end
        (b"}(N" + b"\x85" * 200_000 + b"Nu", "a key of a dictionary is"),
        (b"}" + DOUBLED + b"Ns", "a key of a dictionary is"),
        (b"}(" + DOUBLED + b"Nu", "a key of a dictionary is"),
        (b"}(" + DOUBLED + b"NK\x01Nu", "a key of a dictionary is"),
        (name("collections", "OrderedDict") + b"]" + DOUBLED + b"N\x86a\x85R", "else than names and values"),
        # Neither an opcode that changes nothing nor a tensor in between hides the tuple.
        (b"}" + DOUBLED + b"(eNbq\x60h\x60\x85Ns", "appends to an object of the kind tuple"),
        (b"}" + REBUILD + b"(" + DOUBLED + b"NNNtRNs", "a key of a dictionary is <Tensor>"),
        (b"}K\x01K\x02K\x03\x87Ns(K\x01K\x02\x85K\x03tNs", "a key of a dictionary is"),
        (b"}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Ns", "a key of a dictionary is 2305843009213693951"),
        # Tensors in place of a storage, whose text would have 2^60 parts.
        (REBUILD + b"(" + REBUILD + b"(" + DOUBLED + b"NNNtRNNNtR", "a tensor has no storage but <Tensor>"),
        (name("torch", "device") + REBUILD + b"(" + DOUBLED + b"NNNtR\x85R", "a device is described by"),
        (b"X" + struct.pack("<I", 2**31) + b"a", "not a checkpoint that can be read safely"),
        # Arguments that were written once and are used again and again.
        (b"(" + b"N" * 1000 + b"tq\x00" + b"(" + REUSED + b"t", "more than 1000000 steps"),
        (b"(" + LIST + (name("collections", "OrderedDict") + b"h\x00\x85R") * 1001 + b"t", "more than 1000000 steps"),
        (b"(" + DICT + (name("argparse", "Namespace") + b")\x81h\x00b") * 1001 + b"t", "more than 1000000 steps"),
        # Nothing of what a file may name has attributes to be set, or lets its class be changed.
        (name("torch._utils", "_rebuild_tensor_v2") + b"}(X\x01\x00\x00\x00aK\x01ub", "changes what a name stands for"),
        (name("collections", "OrderedDict") + b"N}(X\x04\x00\x00\x00keysK\x01u\x86b", "changes what a name stands"),
        (name("argparse", "Namespace") + b"N}(X\x04\x00\x00\x00__eqK\x01u\x86b", "changes what a name stands for"),
        (name("argparse", "Namespace") + b")\x81}(X\x04\x00\x00\x00__eqK\x01ub", "a Namespace is described by"),
        (name("argparse", "Namespace") + b")\x81N}(X\x01\x00\x00\x00aK\x01u\x86b", "a Namespace is described by"),
        (DOUBLED + b"Q", "a storage is described by"),
        (b"X\x02\x00\x00\x00a\nN\x93", "it names "),
        (b"X\x02\x00\x00\x00a\nX\x01\x00\x00\x00b\x93", r"it names a\\n\.b, which is not loaded"),
        (b"(X\x06\x00\x00\x00modulet" + b"Q", "a storage is described by"),
    ],
)
def test_what_else_a_pickle_could_try(opcodes, match, tmp_path):
    refused(save(tmp_path / "x.pth", {"a": Raw(opcodes)}), match)


# dtype("f4"), dtype("u1"), an empty array, and b"aaaa" as protocol 2 has it
F4 = name("numpy", "dtype") + b"X\x02\x00\x00\x00f4\x85R"
U1 = name("numpy", "dtype") + b"X\x02\x00\x00\x00u1\x85R"
U1600 = name("numpy", "dtype") + b"X\x05\x00\x00\x00U1600\x85R"
OBJECT = name("numpy", "dtype") + b"X\x02\x00\x00\x00O8\x85R"
EMPTY = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
SCALAR = name("numpy._core.multiarray", "scalar")
FROM_BUFFER = name("numpy._core.numeric", "_frombuffer")
ENCODE = name("_codecs", "encode")


def state(shape: bytes, dtype: bytes, data: bytes, fortran: bytes = b"\x89", version: bytes = b"K\x01") -> bytes:
    return EMPTY + b"(" + version + shape + dtype + fortran + data + b"tb"


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (SCALAR + b")R", "missing 2 required positional"),
        (SCALAR + b"NN\x86R", "a number is described by"),
        (SCALAR + F4 + b"C\x03abc\x86R", "an array of float32 .* has 3 bytes"),
        (SCALAR + F4 + b"]\x86R", "a number is described by"),
        (SCALAR + OBJECT + b"C\x08abcdefgh\x86R", "only integers, floats and booleans"),
        (SCALAR + F4 + b"C\x04abcdK\x01\x87R", "takes 2 positional arguments but 3"),
        (name("numpy.core.multiarray", "_reconstruct") + b"NNN\x87R", "an array is of the class None"),
        (state(b"K\x01\x85", OBJECT, b"]"), "an array is described by"),  # where NumPy has a list of objects
        (state(b"K\x01\x85", OBJECT, b"C\x08abcdefgh"), "only integers, floats and booleans"),
        (state(b"K\x02\x85", F4, b"C\x04abcd"), r"an array of float32 \(2,\) has 4 bytes"),
        (state(b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", F4, b"C\x04abcd"), "an array of float32 .* has 4 bytes"),
        (state(b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86", U1, b"C\x04abcd"), "an array of uint8 .* has 4 bytes"),
        (state(b"G" + bytes(8) + b"\x85", F4, b"C\x00"), "an array of float32 .* has 0 bytes"),
        (state(b"K\x00" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"\x86", F4, b"C\x00"), "array is too big"),
        (
            state(b"(" + b"K\x01" * 70 + b"t", U1, b"C\x01a"),
            "an array of uint8 .* has 1 bytes",
        ),  # more axes than NumPy has
        # A product that takes hours.
        (state(b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 99_000 + b"t", U1, b"C\x00"), "an array of uint8 .* has 0 bytes"),
        (state(b"]", F4, b"C\x00"), "an array is described by"),
        (state(b"K\x01\x85", b"X\x02\x00\x00\x00f4", b"C\x04abcd"), "an array is described by"),
        (state(b"K\x01\x85", F4, b"C\x04abcd", fortran=b"N"), "an array is described by"),
        (state(b"K\x01\x85", F4, b"C\x04abcd", version=b"K\x02"), "an array is described by"),
        (F4 + b"(K\x03X\x01\x00\x00\x00<NX\x01\x00\x00\x00aNK\x04K\x04K\x00tb", "a dtype is described by"),  # a record
        (F4 + b"}(X\x04\x00\x00\x00codeNub", "a dtype is described by"),
        (FROM_BUFFER + b"(]" + F4 + b"K\x01\x85X\x01\x00\x00\x00Ct" + b"R", "an array has no bytes"),
        (FROM_BUFFER + b"(C\x04abcd" + F4 + b"K\x02\x85X\x01\x00\x00\x00Ct" + b"R", "an array of float32 .* has 4"),
        (EMPTY + b"K\x00K\x01s", "it sets items of an object of the kind Array"),
        (EMPTY + b"K\x00a", "it appends to an object of the kind Array"),
        (ENCODE + b"X\x04\x00\x00\x00abcdX\x06\x00\x00\x00rot-13\x86R", "bytes are written in another way"),
        (ENCODE + b"C\x01aX\x06\x00\x00\x00latin1\x86R", "bytes are written in another way"),
        (name("easydict", "EasyDict") + b"}\x85R", "takes 0 positional arguments"),
        (name("easydict", "EasyDict") + b"}b", "changes what a name stands for"),
        (name("easydict", "EasyDict") + b"K\x01K\x02s", "it sets items of an object of the kind"),
        (name("torch", "device") + b"]\x85R", "a device is described by"),
        (name("collections", "defaultdict") + b"}(X\x01\x00\x00\x00aK\x01ub", "changes what a name stands for"),
        (name("numpy", "dtype") + b"}(X\x01\x00\x00\x00aK\x01ub", "changes what a name stands for"),
        (name("numpy.core.multiarray", "scalar") + b"}(X\x01\x00\x00\x00aK\x01ub", "changes what a name stands for"),
        (name("_codecs", "encode") + b"}(X\x01\x00\x00\x00aK\x01ub", "changes what a name stands for"),
    ],
)
def test_what_a_pickle_could_try_with_arrays(opcodes, match, tmp_path):
    refused(save(tmp_path / "x.pth", {"a": Raw(opcodes)}), match)


MANY = struct.pack("<I", 6400) + b"a\0\0\0" * 1600


@pytest.mark.parametrize(
    ("written", "copied"),
    [
        (b"X" + MANY, ENCODE + b"h\x00\x85R"),
        (b"T" + MANY, state(b"M\x00\x19\x85", U1, b"h\x00")),
        (b"T" + MANY, SCALAR + U1600 + b"h\x00\x86R"),
        (b"B" + MANY, SCALAR + U1600 + b"h\x00\x86R"),
        (b"B" + MANY, FROM_BUFFER + b"(h\x00" + U1 + b"M\x00\x19\x85X\x01\x00\x00\x00CtR"),
        (b"X" + MANY, name("torch", "device") + b"h\x00K\x00\x86R"),
    ],
)
def test_bytes_that_are_written_once_and_copied_again_and_again(written, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 3000)
    once, often = (Raw(b"(" + written + b"q\x00" + copied * count + b"t") for count in (1, 60))
    assert len(open_torch_file(save(tmp_path / "x.pth", {"a": once})).content["a"]) == 2
    refused(save(tmp_path / "x.pth", {"a": often}), "more than 3000 steps")


ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "reversed": np.arange(6, dtype=np.int64)[::-2],
    "other order": np.arange(3, dtype=">f4"),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "none": np.array(2.5),
    "bytes": np.arange(255, -1, -1, dtype=np.uint8),
}
VALUES = {
    "number": np.float64(412.5),
    "half": np.float16(0.5),
    "count": np.int64(-3),
    "flag": np.bool_(True),
    "text": np.str_("ä犬"),
    "nested": [{"a": (np.float32(2),)}],
    "bytes": b"\x80\xff",
    "no bytes": b"",
}


@pytest.mark.parametrize("core", ["core", "_core"])  # of NumPy 1 and 2
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_numpy_pickles(protocol, core):
    def loaded(value):
        data = pickle.dumps(value, protocol)
        for module in (b"multiarray", b"numeric") if core == "core" else ():
            new, old = b"numpy._core." + module, b"numpy.core." + module
            data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(b"c" + new, b"c" + old)
        data = data if protocol < 4 else data[:2] + data[11:]  # without the frame, whose length changed
        assert (b"_core" in data) == (core == "_core") or b"numpy" not in data
        return torch_pickle.loads(data, "here", "record")

    for key, array in ARRAYS.items():
        found = loaded({"a": array})["a"].value
        np.testing.assert_array_equal(found, array, key)
        assert found.dtype == array.dtype and not (found.size and found.flags.writeable)
    found = loaded(VALUES)
    assert found == {
        k: [{"a": (2.0,)}] if k == "nested" else getattr(v, "item", lambda v=v: v)() for k, v in VALUES.items()
    }
    assert {type(value) for value in found.values()} == {float, int, bool, str, list, bytes}
    with pytest.raises(ValueError, match="here: not a record that can be read safely"):
        loaded(np.array([{}], object))
    with pytest.raises(ValueError, match="here: not a record that can be read safely"):
        loaded(np.zeros(2, [("a", "i4")]))
    with pytest.raises(ValueError, match="here: not a record that can be read safely"):
        loaded(np.datetime64("2020-01-01"))


def test_an_array_that_python_2_pickled():
    data = np.arange(-2, 2, dtype="<f4").tobytes()
    dtype = name("numpy", "dtype") + b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85U\x01b\x87R"
    array = empty + b"(K\x01K\x04\x85" + dtype + b"\x89U" + bytes([len(data)]) + data + b"tb"
    found = torch_pickle.loads(b"\x80\x02}(U\x08featuresq\x01" + array + b"U\x04nameU\x03\xc3\xa4bu.", "here", "record")
    np.testing.assert_array_equal(found["features"].value, [-2, -1, 0, 1])
    assert found["name"] == "äb"


def test_bytes_behind_a_pickle():
    with pytest.raises(ValueError, match="here: not a record that can be read safely: 2 bytes behind its pickle"):
        torch_pickle.loads(pickle.dumps([1], 2) + b"xx", "here", "record")


@pytest.mark.parametrize("kind", ["easydict.EasyDict", "yacs.config.CfgNode", "addict.addict.Dict"])
def test_options_that_are_a_dictionary_with_attributes(kind, tmp_path):
    module, attribute = kind.rsplit(".", 1)
    inner = attributes(module, attribute, {"lr": 0.1}, {"__immutable__": True})
    value = {
        "opt": attributes(module, attribute, {"margin": 0.2, "inner": inner}),
        "counts": Raw(name("collections", "defaultdict") + name("builtins", "int") + b"\x85R(K\x07K\x01u"),
        "device": Raw(name("torch", "device") + b"X\x04\x00\x00\x00cudaK\x00\x86R"),
    }
    content = open_torch_file(save(tmp_path / "x.pth", value)).content
    assert content == {"opt": {"margin": 0.2, "inner": {"lr": 0.1}}, "counts": {7: 1}, "device": "cuda:0"}


def test_many_tuples_are_no_fault(tmp_path):
    value = {str(n): (n, (n,)) for n in range(15_000)}
    assert open_torch_file(save(tmp_path / "x.pth", value)).content == value


def test_a_pickle_of_very_many_opcodes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 1000)
    refused(save(tmp_path / "x.pth", {"a": [None] * 1000}), "more than 1000 steps")


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
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    refused(path, "found a git-LFS pointer in place of the file")
    path.write_bytes(b"a" * 257 + b"ustar")
    refused(path, r"a tar archive of torch 0\.1")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_torch_file(tmp_path / "nothing.pth")
