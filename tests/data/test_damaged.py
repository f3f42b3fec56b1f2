"""Data sets whose files are cut, changed, mixed up or gone: an error that names the file, in time, from any thread."""

import shutil
import threading
from pathlib import Path

import pytest

from configs import base
from data_prep import builder
from shnet_jax.data import batches, gallery
from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.errors import DataError
from shnet_jax.data.records import SENTENCEPIECE, open_dataset
from shnet_jax.data.tokenise import clip, load_tokenizer, sentence_piece, tokenise_captions
from tests.data.conftest import FIELDS
from tests.patience import PATIENCE

BLOCK = 1 << 16  # of array_record: a shard of one block holds records and no list of them
SHARD = "tiny-train.array_record-00001"


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """The tiny set in shards of 7 records, the last of 2."""
    out = tmp_path_factory.mktemp("sharded")
    fields = tuple(tiny.features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "SHARD_BYTES", 6 * _size(tiny, fields))
        splits = {split: tiny.open_split(split, fields) for split in tiny.splits}
        path = builder.write_dataset(out, "tiny", splits, {"source": "made by the tests"})
    assert (path / SHARD).is_file()
    return path


def _size(tiny, fields):
    raw, *_ = tiny.open_split("train", fields)._source
    return len(raw[0]) + 100


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "copy")


def raised_by(work):
    """What `work()` raises, from a thread of its own: a reader that hangs fails the test instead of stopping it."""
    raised = []

    def run():
        try:
            work()
        except DataError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "no answer"
    assert raised, "no error"
    return raised[0]


def _cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def _flip(place):
    def spoil(path):
        data = bytearray(path.read_bytes())
        data[place] ^= 16
        path.write_bytes(data)

    return spoil


def _flip_a_record(path):
    _flip(len(path.read_bytes()[:BLOCK].rstrip(b"\0")) * 5 // 14)(path)  # of 7 records the third


SHARDS = {
    "cut to nothing": (_cut(0), 0, "ArrayRecord file should be at least 64KB"),
    "cut within": (_cut(BLOCK + 999), 0, "Corrupted|Invalid"),
    "cut between blocks": (_cut(BLOCK), 0, "the end of the file"),
    "gone": (lambda path: path.unlink(), 0, "No such file"),
    "a changed bit": (_flip_a_record, 2, "hash mismatch"),
    "zeros": (lambda path: path.write_bytes(bytes(2 * BLOCK)), 0, "Corrupted|Invalid"),
    "more behind": (lambda path: path.write_bytes(path.read_bytes() + b"junk" * 9), 0, "Corrupted|Invalid"),
    "the last shard, which is shorter": (
        lambda path: shutil.copy(path.with_name(path.name.replace("00001", "00003")), path),
        *(2, "index 2 out of bound"),
    ),
}


@pytest.mark.parametrize(("spoil", "place", "found"), SHARDS.values(), ids=SHARDS)
def test_a_damaged_shard_is_named_with_the_place_in_it(spoil, place, found, copy):
    spoil(copy / SHARD)
    records = open_dataset(copy).open_split("train", FIELDS)
    assert records[5].keys() == set(FIELDS)  # of the shard before
    with pytest.raises(
        DataError,
        match=rf"{SHARD}: record {place} of this file \(split 'train' row {7 + place}\): expected a record as it was "
        rf"written, found: .*({found}).*`shnet data verify {copy}` tells .* import the set again",
    ):
        for row in range(7, 14):
            records[row]
    assert records[14].keys() == set(FIELDS)  # of the one after


def _train(dataset, config, captions, tokenizer):
    stream = batches.train_batches(config, dataset, captions, tokenizer, FIELDS, batch_size=8, seed=0)
    for _ in range(9):  # a pass
        next(stream)


def _table(dataset, config, captions, tokenizer):
    batches.resident_table(dataset, "train", FIELDS)


def _encode(dataset, config, captions, tokenizer):
    records = dataset.open_split("train", FIELDS)
    list(gallery.Gallery(records, captions, tokenizer, config.data).image_batches(4))


@pytest.mark.parametrize("read", [_train, _table, _encode])
def test_a_damaged_record_ends_every_way_of_reading(read, copy, config, captions, tokenizer):
    """The streams read ahead in threads of grain: what these raise arrives, and nothing waits for them."""
    _flip_a_record(copy / SHARD)
    message = raised_by(lambda: read(open_dataset(copy), config, captions, tokenizer))
    assert f"{SHARD}: record 2 of this file (split 'train' row 9)" in message


def _flip_half(path):
    _flip(path.stat().st_size // 2)(path)


def _open_all(path):
    config = base.get_config()
    config.data.dir, config.tokenizer.kind = str(path), "sentencepiece"
    dataset = open_dataset(path)
    list(dataset.captions("train"))
    load_tokenizer(config)


@pytest.mark.parametrize("spoil", [_cut(0), _cut(20), _flip_half, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["features.json", "metadata.json", SENTENCEPIECE])
def test_a_file_unlike_its_checksum_is_named(name, spoil, copy):
    spoil(copy / name)
    with pytest.raises(DataError, match=rf"{name}: expected (sha256|this file).*, found .* copy the data set again"):
        _open_all(copy)


INDEX = "index_train.npz"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("dataset_info.json", _cut(20), r"dataset_info\.json.*line \d"),
        ("features.json", _cut(99), r"features\.json.*line \d"),
        ("features.json", lambda path: path.unlink(), r"copy: expected .*features\.json.*: Cannot restore"),
        ("metadata.json", _cut(9), r"copy: expected .*metadata\.json.* as TFDS writes them: .*line \d"),
        (SENTENCEPIECE, _cut(999), r"sentencepiece\.model: expected a SentencePiece model"),
        (INDEX, _cut(0), rf"{INDEX}: expected .* copy the file again, or remove it"),
        (INDEX, _flip_half, rf"{INDEX}: expected .* copy the file again, or remove it"),
        (INDEX, lambda path: shutil.copy(path.with_name("index_test.npz"), path), "expected 23 image ids, found 7"),
    ],
)
def test_without_checksums_damage_is_named_too(name, spoil, message, copy):
    (copy / CHECKSUMS).unlink()
    spoil(copy / name)
    with pytest.raises(ValueError, match=message):
        _open_all(copy)


@pytest.mark.parametrize("spoil", [_cut(0), _cut(200), lambda path: path.write_text("[1]"), _flip(2)])
def test_damaged_checksums_are_named(spoil, copy):
    spoil(copy / CHECKSUMS)
    with pytest.raises(DataError, match=CHECKSUMS):
        _open_all(copy)
        pytest.fail("read")


def test_long_captions_are_cut(tiny, tokenizer, config):
    """Captions of any length are accepted: what is beyond data.max_tokens is cut when they are read."""
    long = ["a dog runs " * 1000, "x" * 10_000, "\u72ac" * 10_000, "? " * 5000]
    clip_folder = Path(__file__).parents[1] / "golden" / "clip"
    for used in (tokenizer, sentence_piece(tiny.path / SENTENCEPIECE), clip(clip_folder / "tokenizer.json")):
        captions = tokenise_captions([["a dog"], long], used)
        parts = list(gallery.text_batches(captions, used, config.data, 5))
        assert [part.batch["tokens"].shape[1] for part in parts] == [config.data.max_tokens]
        lengths = dict(zip(parts[0].numbers.tolist(), parts[0].batch["token_mask"].sum(axis=1).tolist(), strict=True))
        assert lengths[1] == config.data.max_tokens and lengths[0] < 10
