"""What is fuzzed: for each format its seeds, the readers of the project, and the errors that they may raise."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import json
import pickle
import random
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pyarrow as pa
import tokenizers
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save

from configs import base
from data_prep import caption_files, captions, scene_graphs, vocabulary
from data_prep.extract.images import BrokenImage, Photographs
from data_prep.extract.tables import Tables
from data_prep.extract.tars import Tars
from data_prep.files import read_label_map
from data_prep.from_person_search import read_annotations
from data_prep.schema import DataError
from data_prep.sources import hdf5, lmdb_files
from data_prep.sources.bottom_up import BottomUp
from data_prep.sources.boxes import Sizes
from data_prep.sources.detections import Reading
from data_prep.sources.npz import NpzFiles
from data_prep.sources.panoptic import Panoptic
from data_prep.sources.torch_dict import TorchDict
from data_prep.sources.units import UnitFiles
from data_prep.sources.vinvl import Vinvl
from shnet_jax.data import tokenise
from shnet_jax.data.index import IndexBuilder, read_index, write_index
from shnet_jax.evaluation.bootstrap import load_queries, save_queries
from shnet_jax.evaluation.metrics import QueryRanks
from shnet_jax.interop import bert_weights, clip_weights, siglip_weights, weights_file
from shnet_jax.interop.torch_file import open_torch_file
from shnet_jax.interop.torch_pickle import Tensor
from shnet_jax.retrieve import pictures, tensors
from shnet_jax.retrieve.embeddings import read_ids
from shnet_jax.training.workdir import WorkdirError, trained_config
from shnet_jax.untrusted import MAX_IMAGE_BYTES, MAX_PIXELS
from tests import siglip_example
from tests.fuzz.mutate import mutate, with_true_checksums
from tests.interop import torch_writer

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["a red star above the sea", "", "ünïcode 犬 \u202e x", "[MASK] ##ing <|endoftext|>", "a" * 500]

Read = Callable[[Path], object]
Make = Callable[[bytes, random.Random], bytes]
_DATA = (DataError,)


@dataclasses.dataclass(frozen=True)
class Target:
    """A format: what is tried, and how it is read.

    files: the file that an input becomes, or the files by name, the one to read first.
    readers: of the project, each given the path of that file; an input is refused where none takes it.
    errors: what may come of it. make: another input from a seed. memory: bytes that any input may take, beside some for
    each of its own.
    """

    seeds: Callable[[], list[bytes]]
    files: str | Callable[[bytes], Mapping[str, bytes]]
    readers: tuple[Read, ...]
    errors: tuple[type[Exception], ...] = (ValueError,)
    make: Make = mutate
    memory: int = 64 * 2**20

    def parse(self, folder: Path, data: bytes) -> None:
        """Puts an input into files of an empty folder and reads them as the project does."""
        files = {self.files: data} if isinstance(self.files, str) else self.files(data)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        faults = []
        for read in self.readers:
            try:
                read(folder / next(iter(files)))
            except self.errors as error:
                faults.append(error)
        if len(faults) == len(self.readers):
            raise faults[-1]


def _as(*names: str) -> Callable[[bytes], Mapping[str, bytes]]:
    """Files: the input by several names."""
    return lambda data: dict.fromkeys(names, data)


def _written(write: Callable[..., object], *args: Any, **options: Any) -> bytes:
    """The bytes that write(file, ...) writes."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _cell(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _checked(data: bytes, rng: random.Random) -> bytes:
    changed = mutate(data, rng)
    return with_true_checksums(changed) if rng.random() < 0.8 else changed


# ------------------------------------------------------------------------------------------------------------- arrays


def _npy_seeds() -> list[bytes]:
    arrays = (
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">f4").reshape(3, 2)),
        np.zeros((1, 2, 2, 2)),
        np.zeros((0, 3), bool),
        np.zeros(2, [("a", "i4"), ("b", "f8")]),
        np.array([{}], object),
    )
    seeds = [_written(np.save, array) for array in arrays]
    return [*seeds, seeds[0].replace(b"(2, 3)", b"(2000000000, 300000000)")]


def _npz_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder, index = Path(name), IndexBuilder()
        index.add("a", ["a dog", "zwei Hunde – ДВА"], 3)
        index.add("ü", ["end"], 4)
        write_index(folder, "x", index.build())
        save_queries(folder / "q.npz", QueryRanks(np.array([0, 3]), np.array([1, 0, 2]), np.array([0, 0, 1])))
        np.savez_compressed(folder / "c.npz", image_ids=np.zeros(10**6))
        return [(folder / file).read_bytes() for file in ("index_x.npz", "q.npz", "c.npz")]


def _read_index(path: Path) -> None:
    if (index := read_index(path.parent, "x")) is not None:
        list(index.all_captions())


# -------------------------------------------------------------------------------------------------------- text, tables


def _tsv_seeds() -> list[bytes]:
    boxes, features = np.ones((2, 4), np.float32), np.ones((2, 3), np.float32)
    ids, scores = np.arange(2), np.ones(2, np.float32)
    short = ["7", "200", "100", "2", _cell(boxes), _cell(features)]
    long = ["7", "100", "200", *2 * (_cell(ids), _cell(scores)), "2", _cell(boxes), _cell(features)]
    return ["\t".join(cells).encode() + b"\n" for cells in (short, long)]


def _header_seeds() -> list[bytes]:
    regions = _regions()
    row = {"image_id": "7", "image_w": "200", "image_h": "100", "num_boxes": "2"}
    row |= {"boxes": _cell(regions["bbox"]), "features": _cell(regions["x"])}
    seeds = []
    for names in (list(row), list(row)[::-1], ["image_h", "image_w", *list(row)[3:], "image_id"]):
        lines = ["\t".join(names), "\t".join(row[name] for name in names)]
        seeds += ["\r\n".join(lines).encode(), "\n".join([*lines, lines[1][:30], *lines]).encode()]
    return seeds


def _read_tsv(path: Path) -> None:
    for regions in (None, 5):
        BottomUp([path], regions).read("7")


def _captions(suffix: str) -> Read:
    def read(path: Path) -> None:
        for split in captions.read(f"train={path.with_suffix(suffix)}").values():
            for item in split:
                item.record()

    return read


def _caption_seeds() -> list[bytes]:
    return [
        b'image,caption,split\na.jpg,a dog,train\nb.jpg,"a, cat",train\n',
        b"image_name| comment_number| comment\n1.jpg| 0| A man .\n",
        b"image\tcaption\na.jpg\ta dog\n",
        b"a.jpg#0\tA dog .\na.jpg#1\tA cat .\n",
        b'raw,sentids,filename\n"[""a dog"", ""b""]","[0, 1]",a.jpg\n"[\'c\' \'d\']","[2, 3]",b.jpg\n',
        b'"image"\t"caption"\n"a.jpg"\t"a ""dog"""\n',
        b'{"image": "a.jpg", "caption": ["a dog", "b"], "sentids": [1, 2]}\n{"image": 5, "caption": "c"}\n',
    ]


def _parquet(table: pa.Table, compression: str, **options: Any) -> bytes:
    return _written(lambda file: parquet.write_table(table, file, compression=compression, **options))


def _parquet_seeds() -> list[bytes]:
    picture_cells = [{"bytes": b"x", "path": "7.jpg"}, {"bytes": None, "path": None}]
    table = pa.table({"image": picture_cells, "caption": [["a dog", "b"], ["c"]], "sentids": [["0", "1"], ["2"]]})
    tables = (table, table.append_column("filename", [["1.jpg", "2.jpg"]]))
    return [_parquet(one, compression) for compression in ("none", "snappy", "zstd") for one in tables]


def _json_seeds() -> list[bytes]:
    sentence = {"raw": "a dog", "sentid": 3}
    objects = [{"object_id": i, "x": 10, "y": 20 * i, "w": 30, "h": 40} for i in (0, 1)]
    relations = [{"subject_id": 0, "predicate": "wears", "object_id": 1, "score": 0.8}]
    panoptic = {"image_id": 1, "file_name": "0.png", "segments_info": [{"id": 44, "category_id": 18}]}
    return [
        _json({"images": [{"filename": "a.jpg", "filepath": "val", "split": "restval", "sentences": [sentence]}]}),
        _json({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x", "id": 5}]}),
        _json([{"image": "a.jpg", "caption": ["x", "y"]}, {"image_id": 391895, "caption": "z", "split": "val"}]),
        _json([{"split": "train", "id": 4, "file_path": "a/b.jpg", "captions": ["a man", "he"]}]),
        _json([{"image_id": 391895, "width": 640, "height": 360, "objects": objects, "relationships": relations}]),
        _json({"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [panoptic]}),
    ]


@functools.cache
def _png() -> bytes:
    return _written(Image.new("RGB", (8, 8), (44, 0, 0)).save, "PNG")


# ------------------------------------------------------------------------------------------------------- configurations

_BERT = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 30, "max_position_embeddings": 12,
}  # fmt: skip


def _config_seeds() -> list[bytes]:
    run = base.get_config()
    clip = (GOLDEN / "clip" / "config.json").read_bytes()
    siglip = _json({"model_type": "siglip", "text_config": siglip_example.text_config(30)})
    ids = {"image_ids": ["a", "b"], "caption_ids": ["a#0", "b#0"], "captions": ["x", "y"], "caption_image": [0, 1]}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../x"}}
    named = run.to_dict() | {"model": run.model.to_dict() | {"name": "tests.fuzz.never"}}
    return [_json(_BERT), clip, siglip, _json(run.to_dict()), _json(ids), _json(index), _json(named)]


def _config_files(data: bytes) -> Mapping[str, bytes]:
    return dict.fromkeys(("config.json", "model.safetensors.index.json"), data) | {"vocabulary.txt": b"x"}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _read_torch(path: Path) -> None:
    """Every tensor that a walk of some steps through the content reaches."""
    opened = open_torch_file(path)
    stack, steps = [opened.content], 2000
    while stack and steps:
        value, steps = stack.pop(), steps - 1
        if isinstance(value, Tensor):
            opened.array(value)
        elif isinstance(value, dict):
            stack += list(value.values())[:50]
        elif isinstance(value, list | tuple):
            stack += list(value)[:50]


def _in_zip(data: bytes) -> Mapping[str, bytes]:
    """Files: a checkpoint whose pickle is the input."""

    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", bytes(24))

    return {"a.pth": _written(write)}


def _torch_seeds() -> list[bytes]:
    return [(GOLDEN / file).read_bytes() for file in ("torch_zip.pth", "torch_stream.pth")]


def _pickle_seeds() -> list[bytes]:
    with zipfile.ZipFile(GOLDEN / "torch_zip.pth") as archive:
        golden = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    twice = b"\x80\x02N" + b"".join(bytes([0x71, i, 0x68, i, 0x86]) for i in range(40))
    values = {"a": [1, (2.5, None)], "b": {(1, 2): True}, "c": 2**40}
    return [golden, twice + b".", b"\x80\x02}N" + twice[3:] + b"Ns.", *(pickle.dumps(values, p) for p in (2, 4, 5))]


_OPCODES = [
    *(bytes([code]) for code in b"N()t]ae}suRbQ20\x81\x85\x86\x87\x88\x93\x94"),
    *(b"K\x01", b"J\x01\x00\x00\x00", b"X\x01\x00\x00\x00a", b"\x8c\x01a", b"G" + bytes(8)),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01"),
    *(b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"cos\nsystem\n", b"ctorch\nFloatStorage\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R", b"cnumpy\ndtype\n"),
    *(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n", b"c_codecs\nencode\n"),
    *(b"ceasydict\nEasyDict\n", b"ccollections\ndefaultdict\n", b"ctorch\ndevice\n", b"c__builtin__\nbytes\n"),
    *(b"X\x02\x00\x00\x00f4\x85R", b"X\x06\x00\x00\x00latin1", b"C\x04abcd", b"U\x04abcd", b"K\x03", b"\x88", b"\x89"),
    *(b"\x96\x04" + bytes(7) + b"abcd", b"(K\x03X\x01\x00\x00\x00<NNNK\x00K\x00K\x00tb"),
]


def _make_pickle(seed: bytes, rng: random.Random) -> bytes:
    """A damaged seed, or opcodes in any order: some repeated often."""
    if rng.random() < 0.5:
        return mutate(seed, rng)
    parts = []
    for _ in range(rng.randint(1, 40)):
        parts.append(b"".join(rng.choices(_OPCODES, k=rng.randint(1, 4))) * rng.choice((1, 1, 1, 3, 70)))
    return b"\x80\x02" + b"".join(parts) + b"."


def _safetensor_seeds() -> list[bytes]:
    arrays = {"params/a": np.ones((2, 3), np.float32), "batch_stats/b": np.zeros(2, np.float32)}
    run = save(arrays, {"format": "shnet_jax", "step": "3"})
    vectors = save({"vector": np.ones((2, 4), np.float32), "mask": np.ones((2, 1), bool)})
    return [run, vectors, struct.pack("<Q", 2**60) + run[8:]]


# --------------------------------------------------------------------------------------------------------- vocabularies


def _encodes(load: Callable[[Path], tokenise.Tokenizer]) -> tuple[Read, ...]:
    """Reader that loads a tokenizer and applies it to TEXTS."""

    def read(path: Path) -> None:
        tokenizer = load(path)
        pieces = tokenise.tokenise_captions([TEXTS], tokenizer).pieces
        assert not len(pieces) or 0 <= pieces.min() <= pieces.max() < tokenizer.vocab_size

    return (read,)


def _sentencepiece_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "s.model"
        vocabulary.train(["a red star above the sea", "two hearts", "a dog and a cat"], path)
        return [path.read_bytes()]


def _wordpiece_seeds() -> list[bytes]:
    return ["\n".join((*tokenise.SPECIAL, "a", "red", "##s", "star", "犬")).encode() + b"\n"]


def _bert_json_seeds() -> list[bytes]:
    pieces = {piece: i for i, piece in enumerate((*tokenise.SPECIAL, "a", "red", "##s", "star"))}
    tokenizer = tokenizers.BertWordPieceTokenizer(pieces)
    plain = tokenizer.to_str()
    tokenizer.add_tokens(["two hearts"])
    return [plain.encode(), tokenizer.to_str().encode()]


def _bert_settings_seeds() -> list[bytes]:
    settings = {"do_lower_case": False, "strip_accents": None, "never_split": None, "model_max_length": 512}
    settings |= {"tokenizer_class": "BertTokenizer", "mask_token": {"content": "[MASK]"}, "unk_token": "[UNK]"}
    decoder = {"9": {"content": "two hearts", "normalized": True}, "4": {"content": "[MASK]", "special": True}}
    added = {"added_tokens_decoder": decoder, "additional_special_tokens": ["star"]}
    return [_json(settings), _json(settings | added)]


def _clip_seeds() -> list[bytes]:
    return [(GOLDEN / "clip" / file).read_bytes() for file in ("tokenizer.json", "merges.txt")]


def _siglip_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        siglip_example.write_gemma(Path(folder))
        siglip_example.write_pieces(Path(folder))
        return [(Path(folder) / file).read_bytes() for file in ("tokenizer.json", "spiece.model")]


def _siglip_files(data: bytes) -> Mapping[str, bytes]:
    return {"tokenizer.json" if data.lstrip()[:1] == b"{" else "spiece.model": data}


def _clip_files(data: bytes) -> Mapping[str, bytes]:
    return {"tokenizer.json" if data.lstrip()[:1] == b"{" else "merges.txt": data}


# ------------------------------------------------------------------------------------------------ pictures, containers


def _picture_seeds() -> list[bytes]:
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    sixteen = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    clear = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4))
    kinds: dict[str, list[Image.Image]] = {k: [picture, sixteen, clear, picture.quantize()] for k in ("PNG", "TIFF")}
    kinds |= {"JPEG": [picture, picture.convert("CMYK")], "PPM": [picture, sixteen], "WEBP": [picture, clear]}
    exif = picture.getexif()
    exif[0x0112] = 6
    options = {kind: {"exif": exif} for kind in ("PNG", "JPEG", "TIFF", "WEBP")}
    kinds |= {"GIF": [picture], "BMP": [picture]}
    return [_written(mode.save, kind, **options.get(kind, {})) for kind, modes in kinds.items() for mode in modes]


def _extracts(photographs: Callable[[list[Path], Path], Photographs]) -> tuple[Read, ...]:
    """Reader of every photograph and caption, as an extraction reads them."""

    def read(path: Path) -> None:
        opened = photographs([path], path.parent)
        for row in opened.rows("train"):
            opened.place(row.file)
            with contextlib.suppress(BrokenImage):
                opened.load(row.file)

    return (read,)


def _tar_seeds() -> list[bytes]:
    def write(file: io.BytesIO, layout: int) -> None:
        last = ("e" if layout == tarfile.USTAR_FORMAT else "ü" * 99) + ".png"
        with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
            for name, data in (members | {last: _png()}).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    members = {"a/b.png": _png(), "a/b.txt": b"a dog", "c.jpg": b"", "c.json": b'{"caption": ["x"], "sentids": [4]}'}
    return [_written(write, layout) for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def _true_tar(data: bytes, rng: random.Random) -> bytes:
    """A damaged tar, in most cases with true sums in its headers."""
    changed = bytearray(mutate(data, rng))
    if rng.random() < 0.8:
        for at in range(0, len(changed) - 511, 512):
            if changed[at + 257 : at + 262] == b"ustar":
                changed[at + 148 : at + 156] = b" " * 8
                changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def _table_seeds() -> list[bytes]:
    picture_cells = [{"bytes": _png(), "path": f"{n}.jpg"} for n in range(3)]
    lists = [["a dog", "a cat"], [], ["x"]]
    hub = {"image": picture_cells, "caption": lists, "sentids": [["1", "2"], [], ["3"]], "split": ["train"] * 3}
    tables = (hub, {"jpg": [_png(), None], "txt": ["a dog", None], "key": ["0", "1"]})
    packed = ("NONE", "SNAPPY", "ZSTD")
    return [_parquet(pa.table(table), compression, row_group_size=2) for table in tables for compression in packed]


# ------------------------------------------------------------------------------------------ regions of other containers


def _regions() -> dict[str, np.ndarray]:
    return {"x": np.ones((2, 8), np.float32), "bbox": np.array([[0, 0, 90, 40], [9, 9, 200, 100]], np.float32)}


def _image_npz_seeds() -> list[bytes]:
    sides = {"image_w": np.array(200), "image_h": np.array(100), "num_bbox": np.array(2)}
    objects = {"info": np.array([{}], object), "cls_prob": np.ones((2, 1601), np.float16)}
    return [
        _written(np.savez, **_regions(), **sides),
        _written(np.savez_compressed, **_regions(), **sides, **objects),
        _written(np.savez_compressed, feat=np.ones((8, 3, 2)), y=np.zeros(10**6)),
        _written(np.savez_compressed, x=np.zeros((10**6, 9))),
    ]


def _hdf5_seeds() -> list[bytes]:
    regions = _regions()
    rows = {"image_features": regions["x"][None], "image_bb": regions["bbox"][None], "image_id": [7]}
    rows |= {"image_w": [200], "image_h": [100]}
    by_id = {
        "7_features": regions["x"],
        "7_boxes": regions["bbox"],
        "7_size": [[100, 200]],
        "7_grids": np.ones((9, 16)),
    }
    ends = {"image_features": regions["x"], "pos_boxes": [[0, 2]], "image_id": np.array([b"7.jpg"])}
    groups = {"7/features": regions["x"], "7/boxes": regions["bbox"], "7/img_w": 200, "7/img_h": 100}
    packed = {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True}

    def write(path: Path, sets: Mapping[str, Any], options: Mapping[str, Any]) -> bytes:
        with h5py.File(path, "w", libver="latest" if options else "earliest") as file:
            for key, value in sets.items():
                file.create_dataset(key, data=value, **options)
        return path.read_bytes()

    with tempfile.TemporaryDirectory() as name:
        kinds = ((rows, {}), (by_id, {}), (ends, {}), (groups, {}), (rows, packed))
        return [write(Path(name) / "seed.h5", sets, options) for sets, options in kinds]


def _sidecar_seeds() -> list[bytes]:
    index = {7: 0, 8: 1}
    texts = [b"7.jpg\n8.jpg\n", _json(["7", 8]), _json({"7": 0, "8.jpg": 1}), _json({"7": [200, 100]})]
    return [*texts, b"image,w,h\n7.jpg,200,100\n", *(pickle.dumps(index, p) for p in range(6))]


# ------------------------------------------------------------------------------------------------------- LMDB and VinVL


def _read_lmdb_value(path: Path) -> None:
    value = lmdb_files.parse_value(path.read_bytes(), "here")
    Reading(max_regions=4).record("42", lmdb_files.arrays_of(value, "here"), "here")


def _record_seeds() -> list[bytes]:
    features, boxes = np.ones((2, 3), np.float32), np.array([[0, 0, 5, 5], [1, 2, 3, 4]], np.float32)
    sizes = {"image_w": 10, "image_h": np.int64(8), "num_boxes": 2}
    arrays = {"features": features, "boxes": boxes, "cls_prob": np.ones((2, 3)), "objects": np.arange(2)} | sizes
    texts = {"features": _cell(features), "boxes": _cell(boxes).encode()} | sizes
    return [pickle.dumps(record, protocol) for protocol in (2, 3, 4, 5) for record in (arrays, texts)]


def _value_seeds() -> list[bytes]:
    arrays = {"features": np.ones((2, 3), np.float16), "norm_bb": np.array([[0, 0, 1, 1, 1, 1]] * 2, np.float16)}
    packed = {
        k: {b"nd": True, b"type": a.dtype.str, b"shape": a.shape, b"data": a.tobytes()} for k, a in arrays.items()
    }
    number = {b"nd": False, b"type": "<f8", b"data": bytes(8)}
    archives = [_written(write, **arrays) for write in (np.savez, np.savez_compressed)]
    return [*archives, msgpack.packb(packed), msgpack.packb(packed | {"a": number})]


_BETWEEN = b"\n====\n"  # the files of one input


def _vinvl_seeds() -> list[bytes]:
    place = np.array([[0, 0, 1, 1, 1, 1]] * 2, np.float32)
    features = _cell(np.concatenate([np.ones((2, 2048), np.float32), place], 1))
    row = f"42\t2\t{features}\n".encode()
    narrow = _cell(np.ones((2, 3), np.float32))
    objects = [{"class": "dog", "conf": 0.5, "rect": [0, 0, 10, 5], "feature": _cell(np.ones(3, np.float32))}] * 2
    content = {"objects": objects, "image_w": 10, "image_h": 5}
    cells = ({"num_boxes": 2, "features": narrow}, content)
    files = [row, *(b"42\t" + _json(cell) + b"\n" for cell in cells), f"42\t2\t{narrow}\n".encode()]
    labels = b"42\t" + _json(content) + b"\n"
    with_index = [_BETWEEN.join((file, labels, b"0\n", b'{"42": 0}')) for file in files]
    return [*with_index, _BETWEEN.join((files[0], labels)), b"42\t" + _json({"objects": objects})]


def _vinvl_files(data: bytes) -> Mapping[str, bytes]:
    names = ("features.tsv", "labels.tsv", "features.lineidx", "imageid2idx.json")
    return dict(zip(names, data.split(_BETWEEN), strict=False))


def _read_vinvl(path: Path) -> None:
    labels = path.with_name("labels.tsv")
    Vinvl([path], Reading(max_regions=4), None, labels if labels.is_file() else None).read("42")


def _torch_dict_seeds() -> list[bytes]:
    features = np.ones((2, 3), np.float32)
    values = ({42: features}, {"42": features, "7": features}, {42: ["a dog", "x"], "7": '["a cat"]'})
    with tempfile.TemporaryDirectory() as name:
        return [torch_writer.save(Path(name) / "a.pt", value).read_bytes() for value in values]


# ------------------------------------------------------------------------------------------------------------ the table

_BERT_VOCABULARY = "\n".join((*tokenise.SPECIAL, *"abc", "star")).encode()
_CONFIG_READERS: tuple[Read, ...] = (
    lambda path: bert_weights.sizes(path.parent),
    lambda path: clip_weights.sizes(path.parent),
    lambda path: siglip_weights.sizes(path.parent),
    lambda path: trained_config(path.parent),
    lambda path: bert_weights.read_tensors(path.parent),
    read_ids,
)
_JSON_READERS: tuple[Read, ...] = (
    _captions(".json"),
    read_annotations,
    scene_graphs.read_graphs,
    lambda path: Panoptic(path, path.parent).read("0.jpg"),
)
_SIDECAR_READERS: tuple[Read, ...] = (
    *(lambda path, suffix=suffix: hdf5.read_index(path.with_suffix(suffix), 2) for suffix in (".json", ".pkl", ".txt")),
    *(lambda path, suffix=suffix: Sizes(path.with_suffix(suffix)).find("7.jpg") for suffix in (".json", ".csv")),
)
_TENSOR_READERS: tuple[Read, ...] = (
    lambda path: bert_weights.read_tensors(path.parent),
    weights_file.read_weights,
    lambda path: [np.array(array) for array in tensors.open_mapped(path).values()],
)
_LARGE, _IMAGE = 8 * MAX_PIXELS, 4 * MAX_IMAGE_BYTES  # bytes of memory

TARGETS: dict[str, Target] = {
    "npy": Target(_npy_seeds, "0.npy", (lambda path: UnitFiles(path.parent, "grid").read("0.jpg"),), _DATA),
    "npz": Target(_npz_seeds, "index_x.npz", (_read_index, load_queries), make=_checked),
    "tsv": Target(_tsv_seeds, "a.tsv", (_read_tsv,), _DATA),
    "tsv_header": Target(_header_seeds, "a.tsv", (_read_tsv,), _DATA),
    "captions": Target(
        _caption_seeds,
        _as("c.csv", "c.token", "c.jsonl"),
        tuple(_captions(suffix) for suffix in (".csv", ".token", ".jsonl")),
        _DATA,
    ),
    "parquet": Target(_parquet_seeds, "c.parquet", (_captions(".parquet"),), _DATA),
    "json": Target(_json_seeds, lambda data: {"a.json": data, "0.png": _png()}, _JSON_READERS, _DATA),
    "config_json": Target(_config_seeds, _config_files, _CONFIG_READERS, (ValueError, FileNotFoundError, WorkdirError)),
    "torch_zip": Target(_torch_seeds, "a.pth", (_read_torch,), make=_checked),
    "torch_pickle": Target(_pickle_seeds, _in_zip, (_read_torch,), make=_make_pickle),
    "torch_dict": Target(
        _torch_dict_seeds,
        "a.pt",
        (lambda path: TorchDict([path], Reading()).read("42"), lambda path: list(caption_files.read_captions(path))),
        _DATA,
        make=_checked,
    ),
    "safetensors": Target(_safetensor_seeds, "model.safetensors", _TENSOR_READERS),
    "sentencepiece": Target(_sentencepiece_seeds, "s.model", _encodes(tokenise.sentence_piece)),
    "wordpiece": Target(_wordpiece_seeds, "vocab.txt", _encodes(tokenise.wordpiece)),
    "tokenizer_json": Target(_bert_json_seeds, "tokenizer.json", _encodes(tokenise.wordpiece)),
    "tokenizer_config": Target(
        _bert_settings_seeds,
        lambda data: {"vocab.txt": _BERT_VOCABULARY, "tokenizer_config.json": data},
        _encodes(tokenise.wordpiece),
    ),
    "clip_bpe": Target(_clip_seeds, _clip_files, _encodes(tokenise.clip)),
    "siglip": Target(_siglip_seeds, _siglip_files, _encodes(tokenise.siglip)),
    "picture": Target(_picture_seeds, "a.jpg", (lambda path: pictures.photograph(path.parent, "a"),), memory=_LARGE),
    "label_map": Target(
        _picture_seeds, "a.png", (read_label_map, lambda path: read_label_map(path, "RGB")), _DATA, memory=_LARGE
    ),
    "tar": Target(_tar_seeds, "a.tar", _extracts(Tars), _DATA, make=_true_tar, memory=_LARGE),
    "picture_table": Target(_table_seeds, "a.parquet", _extracts(Tables), _DATA, memory=_LARGE),
    "image_npz": Target(
        _image_npz_seeds,
        "7.npz",
        (lambda path: NpzFiles(path.parent, Reading(max_regions=4, max_cells=9)).read("7.jpg"),),
        _DATA,
        make=_checked,
        memory=_IMAGE,
    ),
    "hdf5": Target(
        _hdf5_seeds,
        "a.h5",
        (lambda path: hdf5.Hdf5Features([path], reading=Reading(max_regions=4, max_cells=9)).read("7.jpg"),),
        _DATA,
        memory=_IMAGE,
    ),
    "hdf5_ids": Target(_sidecar_seeds, _as("a.json", "a.pkl", "a.txt", "a.csv"), _SIDECAR_READERS, _DATA),
    "pickled_record": Target(_record_seeds, "value", (_read_lmdb_value,), _DATA, make=_make_pickle),
    "lmdb_value": Target(_value_seeds, "value", (_read_lmdb_value,), _DATA, make=_checked, memory=_IMAGE),
    "vinvl": Target(_vinvl_seeds, _vinvl_files, (_read_vinvl,), _DATA),
}
