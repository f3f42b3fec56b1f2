"""Folders of other makers: what lies beside a vocabulary decides its tokens, or is refused by name.

The expected ids are those of the `tokenizers` package itself, set up as `transformers` does for such a folder.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import tokenizers
from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer, models, processors

from configs import base
from shnet_jax.data import clip_bpe, siglip_tokens, tokenise, wordpiece
from shnet_jax.data.clip_bpe import BEGIN, END
from shnet_jax.interop import bert_weights, clip_weights, minilm, siglip_weights
from tests.interop.test_clip_weights import GOLDEN

CASED = [*tokenise.SPECIAL, "The", "the", "play", "##er", "Player", "jersey", "caf", "##é", "cafe", "犬", "5", ".", "#"]
LOWER = [piece for piece in CASED if piece not in ("The", "Player")]
TEXTS = ["The Player in #5 jersey.", "the café CAFE 犬犬", "Player\tplayer\u200b", "", "[MASK] 5 <person> the"]


@pytest.fixture
def folder(tmp_path):
    """A folder with vocab.txt of cased pieces, and a function that writes JSON into it."""
    (tmp_path / "vocab.txt").write_text("\n".join(CASED) + "\n", encoding="utf-8")
    return tmp_path


def put(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def put_tokenizer(folder, pieces=CASED, **settings):
    """A tokenizer.json as `transformers` saves it; what is in it."""
    made = BertWordPieceTokenizer({piece: number for number, piece in enumerate(pieces)}, **settings)
    made.save(str(folder / "tokenizer.json"))
    return json.loads((folder / "tokenizer.json").read_text("utf-8"))


def reference(pieces=CASED, **settings):
    """Ids of TEXTS in which special tokens are text, as they are for us."""
    made = BertWordPieceTokenizer({piece: number for number, piece in enumerate(pieces)}, **settings)
    plain = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = made.normalizer, made.pre_tokenizer
    return [found.ids for found in plain.encode_batch(TEXTS)]


def ids(path):
    return tokenise.wordpiece(path).vocabulary.pieces(TEXTS)


def again(path, tmp_path):
    """Ids of TEXTS by the file alone that a run keeps."""
    suffix, contents = wordpiece.read(path).kept()
    kept = tmp_path / "run" / f"vocabulary{suffix}"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(contents)
    assert wordpiece.read(kept).kept() == (suffix, contents)
    assert wordpiece.read(kept).ids == wordpiece.read(path).ids
    return ids(kept)


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ({"do_lower_case": False}, {"lowercase": False, "strip_accents": False}),
        ({"do_lower_case": True}, {"lowercase": True, "strip_accents": True}),
        ({"do_lower_case": False, "strip_accents": True}, {"lowercase": False, "strip_accents": True}),
        ({"do_lower_case": True, "strip_accents": False}, {"lowercase": True, "strip_accents": False}),
        (
            {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": None},
            {"lowercase": False, "strip_accents": False, "handle_chinese_chars": False},
        ),
    ],
)
def test_settings_beside_a_vocabulary_are_followed(folder, said, settings):
    put(folder, "tokenizer_config.json", said | {"tokenizer_class": "BertTokenizer", "never_split": None})
    expected = reference(**settings)
    assert ids(folder / "vocab.txt") == expected == again(folder / "vocab.txt", folder)
    put_tokenizer(folder, **settings)
    (folder / "vocab.txt").unlink()
    found = wordpiece.find_vocabulary(folder)
    assert found.name == "tokenizer.json" and ids(found) == expected == again(found, folder)


@pytest.mark.parametrize("strip", [None, True])
def test_what_a_run_keeps_of_uncased_tokens_is_the_vocabulary_itself(strip, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(LOWER) + "\n", encoding="utf-8")
    put_tokenizer(tmp_path, LOWER, strip_accents=strip)
    for found in (path, wordpiece.find_vocabulary(tmp_path)):
        assert wordpiece.read(found).kept() == (".txt", path.read_bytes())


@pytest.mark.parametrize("name", ["bert-base-cased", ""])
def test_a_cased_vocabulary_of_which_nothing_is_said_is_refused(folder, name):
    put(folder, "config.json", {"_name_or_path": name})
    with pytest.raises(ValueError, match=r'vocab.txt: nothing beside it says .*write {"do_lower_case": false}'):
        tokenise.wordpiece(folder / "vocab.txt")
    put(folder, "tokenizer_config.json", {"do_lower_case": False})
    assert ids(folder / "vocab.txt") == reference(lowercase=False, strip_accents=False)


def test_the_name_of_a_cased_model_is_enough(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(LOWER) + "\n", encoding="utf-8")
    put(tmp_path, "config.json", {"_name_or_path": "google/bert-base-multilingual-cased"})
    with pytest.raises(ValueError, match=r"config\.json names google/bert-base-multilingual-cased"):
        tokenise.wordpiece(tmp_path / "vocab.txt")
    put(tmp_path, "config.json", {"_name_or_path": "google/bert-base-uncased"})
    assert ids(tmp_path / "vocab.txt") == reference(LOWER)


def test_a_run_of_old_keeps_its_tokens(tmp_path):
    kept = tmp_path / "vocabulary.txt"
    kept.write_text("\n".join(CASED) + "\n", encoding="utf-8")
    assert ids(kept) == reference()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"do_lower_case": "no"},
            r"tokenizer_config\.json: do_lower_case is 'no', expected true",
        ),
        ("tokenizer_config.json", {"do_basic_tokenize": False}, "do_basic_tokenize is False; expected true"),
        ("tokenizer_config.json", {"never_split": ["Player"]}, r"never_split is \['Player'\]; expected special"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side is 'left'; expected \"right\""),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.py", None]}}, "auto_map is"),
        ("tokenizer_config.json", {"wordpieces_prefix": "@@"}, "wordpieces_prefix is '@@'"),
        ("tokenizer_config.json", {"word_tokenizer_type": "mecab"}, "word_tokenizer_type is 'mecab'"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "RobertaTokenizer"},
            "tokenizer_class is 'RobertaTokenizer'; read",
        ),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, "'PreTrainedTokenizerFast'; read"),
        (
            "config.json",
            {"tokenizer_class": "BertJapaneseTokenizer"},
            r"config\.json: tokenizer_class is 'BertJapanese",
        ),
        ("tokenizer_config.json", {"unk_token": "<unk>"}, r"no <unk> \(needed: \[PAD\], <unk>"),
        ("special_tokens_map.json", {"pad_token": "5"}, r"piece 0 is '\[PAD\]'; padding must be id 0: 5 was"),
        ("special_tokens_map.json", {"cls_token": ["[CLS]"]}, r"special_tokens_map\.json: cls_token is \['\[CLS\]'\]"),
        ("added_tokens.json", {"red": "7"}, r"added_tokens\.json: 'red' is '7'"),
        ("added_tokens.json", {"red": 99}, "added token 'red' has the id 99; expected the one after the"),
        ("added_tokens.json", {"the": 99}, "added token 'the' is 6 there, 99 in the settings"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<x>"]}, "'<x>' is absent there, without an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, "added_tokens_decoder has 'x': 1"),
        ("tokenizer_config.json", [], r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length is 'long'"),
    ],
)
def test_what_is_not_followed_is_named(folder, file, content, message):
    if file != "tokenizer_config.json":
        put(folder, "tokenizer_config.json", {"do_lower_case": False})
    elif isinstance(content, dict):
        content = {"do_lower_case": False} | content
    put(folder, file, content)
    with pytest.raises(ValueError, match=message):
        tokenise.wordpiece(folder / "vocab.txt")


def test_the_class_of_the_tokenizer_goes_before_that_of_the_model(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"})
    put(folder, "config.json", {"tokenizer_class": "BertJapaneseTokenizer"})
    assert ids(folder / "vocab.txt") == reference(lowercase=False, strip_accents=False)


def test_two_files_that_name_other_special_tokens(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False, "unk_token": "the"})
    put(folder, "special_tokens_map.json", {"unk_token": {"content": "[UNK]"}})
    with pytest.raises(ValueError, match=r"unk_token is 'the' in .*tokenizer_config\.json, '\[UNK\]' in .*_map\.json"):
        tokenise.wordpiece(folder / "vocab.txt")


def test_sentence_transformers_lower_case_on_their_own(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False})
    put(folder, "sentence_bert_config.json", {"do_lower_case": True, "max_seq_length": 128})
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json: do_lower_case is true, in .* false"):
        tokenise.wordpiece(folder / "vocab.txt")


def test_sentence_transformers_lower_case_for_a_cased_tokenizer_json(folder):
    put_tokenizer(folder, lowercase=False, strip_accents=False)
    put(folder, "sentence_bert_config.json", {"do_lower_case": True})
    with pytest.raises(ValueError, match=r"do_lower_case amounts to true, tokenizer\.json beside it does the opposite"):
        wordpiece.find_vocabulary(folder)
    (folder / "tokenizer.json").unlink()
    assert ids(folder / "vocab.txt") == reference()


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_the_model_lies_in_a_folder_of_this_one(kind, tmp_path):
    put(tmp_path, "modules.json", [{"idx": 0, "path": "0_Transformer"}])
    (tmp_path / "0_Transformer").mkdir()
    put(tmp_path / "0_Transformer", "config.json", {})
    find, sizes = {
        "bert": (wordpiece.find_vocabulary, bert_weights.sizes),
        "clip": (clip_bpe.find_vocabulary, clip_weights.sizes),
        "siglip": (siglip_tokens.find_vocabulary, siglip_weights.sizes),
    }[kind]
    for read in (find, sizes):
        with pytest.raises(FileNotFoundError, match=r"give the folder of the model in it, .*0_Transformer"):
            read(tmp_path)


@pytest.mark.parametrize("json_only", [False, True])
def test_special_tokens_of_other_names(tmp_path, json_only):
    names = {
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
    }
    pieces = ["<pad>", "the", "<unk>", "<mask>", "</s>", "<s>"]
    put(tmp_path, "special_tokens_map.json", {role: {"content": name} for role, name in names.items()})
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    if json_only:
        path.unlink()
        put_tokenizer(tmp_path, pieces, unk_token="<unk>", sep_token="</s>", cls_token="<s>")
        path = wordpiece.find_vocabulary(tmp_path)
    for found in (tokenise.wordpiece(path), tokenise.wordpiece(path)):
        assert (found.unknown_id, found.begin_id, found.end_id, found.mask_id) == (2, 5, 4, 3)
        assert found.vocabulary.pieces(["the dog"]) == [[1, 2]]
    again(path, tmp_path)


@pytest.mark.parametrize("way", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_added_tokens_are_found_as_a_whole(folder, way):
    number, settings = len(CASED), {"do_lower_case": False}
    made = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=False, strip_accents=False)
    made.add_tokens([AddedToken("<person>", normalized=True), AddedToken("Number Five", normalized=True)])
    path = folder / "vocab.txt"
    if way == "added_tokens.json":
        put(folder, way, {"<person>": number, "Number Five": number + 1})
    elif way == "added_tokens_decoder":
        settings[way] = {
            str(number + i): {"content": text, "normalized": True} for i, text in enumerate(("<person>", "Number Five"))
        }
    else:
        made.save(str(folder / way))
        path = wordpiece.find_vocabulary(folder)
    put(folder, "tokenizer_config.json", settings)
    found, texts = tokenise.wordpiece(path), ["the <person> the Number Five.", "Number the"]
    assert found.vocab_size == number + 2 and found.marks_word[[number, number + 1]].all()
    assert found.vocabulary.pieces(texts) == [e.ids for e in made.encode_batch(texts, add_special_tokens=False)]
    assert found.vocabulary.pieces(texts)[0][1] == number
    again(path, folder)


def test_a_special_token_that_is_an_added_one(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False, "mask_token": "<m>"})
    put(folder, "added_tokens.json", {"<m>": len(CASED), "<person>": len(CASED) + 1})
    found = tokenise.wordpiece(folder / "vocab.txt")
    assert found.mask_id == len(CASED) and found.vocabulary.pieces(["<person>"]) == [[len(CASED) + 1]]


@pytest.mark.parametrize(
    ("said", "settings", "name"),
    [
        ({"do_lower_case": False}, {"lowercase": True}, "do_lower_case"),
        ({"do_lower_case": True}, {"lowercase": False}, "do_lower_case"),
        ({"do_lower_case": True, "strip_accents": None}, {"lowercase": True, "strip_accents": False}, "strip_accents"),
        ({"tokenize_chinese_chars": True}, {"handle_chinese_chars": False}, "tokenize_chinese_chars"),
    ],
)
def test_settings_against_a_tokenizer_json(folder, said, settings, name):
    put_tokenizer(folder, **settings)
    put(folder, "tokenizer_config.json", said)
    with pytest.raises(
        ValueError, match=rf"tokenizer_config\.json: {name} amounts to .*tokenizer\.json beside it does"
    ):
        wordpiece.find_vocabulary(folder)


def test_a_tokenizer_json_says_what_a_vocabulary_beside_it_does_not(folder):
    put_tokenizer(folder, lowercase=False, strip_accents=False)
    found = wordpiece.find_vocabulary(folder)
    assert found.name == "tokenizer.json" and ids(found) == reference(lowercase=False, strip_accents=False)


def test_two_vocabularies_that_differ_are_refused(folder):
    put_tokenizer(folder, [*CASED[:-1], "$"])
    with pytest.raises(ValueError, match=r"different vocabularies: '#' is 17 and absent; .*--config\.tokenizer\.path"):
        wordpiece.find_vocabulary(folder)


def change(**fields):
    return lambda described: described | fields


def around(*single):
    """A post-processor of these parts: "A" is the caption, of the type that follows it."""
    parts = [
        {"Sequence": {"id": "A", "type_id": int(part[1:] or 0)}}
        if part[0] == "A"
        else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in single
    ]
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in ((2, "[CLS]"), (3, "[SEP]"))}
    pair = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    return change(
        post_processor={"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(post_processor={"type": "BertProcessing", "sep": ["the", 6], "cls": ["the", 6]}), None),
        (around("A", "[SEP]"), r"its post_processor makes \[UNK\] \[SEP\] of 'a'; expected one token before"),
        (around("[CLS]", "[SEP]", "A"), r"its post_processor makes \[CLS\] \[SEP\] \[UNK\] of 'a'"),
        (around("[CLS]", "A1", "[SEP]"), "all of type 0"),
        (change(model=None), "expected a tokenizer.json with a model"),
        (change(normalizer={"type": "None such"}), "no vocabulary of WordPiece"),
        (change(added_tokens=[{"id": 99, "content": "red"}]), "no vocabulary of WordPiece"),
        (
            change(
                added_tokens=[
                    {"id": 99, "content": "red"}
                    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
                ]
            ),
            "added token 'red' has the id 99",
        ),
        (
            change(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}, added_tokens=[]),
            "holds a BPE vocabulary; tokenizer.kind='wordp",
        ),
        (
            change(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}, added_tokens=[]),
            "holds a Unigram vocabulary; .*'sentencepiece' the .model",
        ),
    ],
)
def test_a_tokenizer_json_of_another_kind(folder, edit, message):
    described = put_tokenizer(folder, lowercase=False)
    (folder / "vocab.txt").unlink()
    put(folder, "tokenizer.json", edit(described))
    if message is None:  # other special tokens are read
        found = tokenise.wordpiece(folder / "tokenizer.json")
        assert (found.begin_id, found.end_id) == (6, 6)
        return
    with pytest.raises(ValueError, match=message):
        tokenise.wordpiece(folder / "tokenizer.json")


def test_stored_truncation_and_padding_change_nothing(folder):
    made = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=False, strip_accents=False)
    made.enable_truncation(2)
    made.enable_padding(length=64)
    made.save(str(folder / "tokenizer.json"))
    assert ids(folder / "tokenizer.json") == reference(lowercase=False, strip_accents=False)


@pytest.mark.parametrize(("kind", "file"), [("wordpiece", "vocab.txt"), ("clip", "merges.txt")])
def test_the_folder_in_place_of_its_file(kind, file, folder, monkeypatch):
    put(folder, "tokenizer_config.json", {"do_lower_case": False} if kind == "wordpiece" else {})
    (folder / "merges.txt").write_bytes((GOLDEN / "merges.txt").read_bytes())
    config = base.get_config()
    config.data.word_mask, config.tokenizer.kind, config.tokenizer.path = 0.0, kind, f"~/{folder.name}"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert tokenise.vocabulary_file(config) == folder / file
    assert tokenise.load_tokenizer(config).vocab_size > 10


def test_longer_captions_than_the_model_takes(folder):
    config = base.get_config()
    config.tokenizer.path = str(folder / "vocab.txt")
    put(folder, "tokenizer_config.json", {"do_lower_case": False, "model_max_length": 31})
    with pytest.raises(ValueError, match=r"max_tokens is 32, the model_max_length in .*tokenizer_config\.json 31"):
        tokenise.load_tokenizer(config)
    put(folder, "tokenizer_config.json", {"do_lower_case": False, "model_max_length": 1e30})
    assert tokenise.load_tokenizer(config).vocab_size == len(CASED)


def test_a_vocabulary_with_a_byte_order_mark_and_windows_lines(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False})
    expected = ids(folder / "vocab.txt")
    (folder / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*CASED, "", ""]).encode())
    assert ids(folder / "vocab.txt") == expected
    put_tokenizer(folder, lowercase=False)
    assert wordpiece.find_vocabulary(folder).name == "tokenizer.json"  # lines without a piece are no other vocabulary


@pytest.mark.parametrize("header", [b"", b'"bpe_simple_vocab_16e6.txt#version: 0.2\n', b"\xef\xbb\xbf#version: 0.2\n"])
def test_merges_with_another_first_line_or_none(header, tmp_path):
    expected = tokenise.clip(GOLDEN / "merges.txt").vocabulary.pieces(TEXTS)
    merges = (GOLDEN / "merges.txt").read_bytes().partition(b"\n")[2]
    (tmp_path / "merges.txt").write_bytes(header + merges + b"\n\n")
    assert tokenise.clip(tmp_path / "merges.txt").vocabulary.pieces(TEXTS) == expected


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt"])
def test_a_pointer_in_place_of_a_vocabulary(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"{name}: found a git-LFS pointer"):
        (tokenise.wordpiece if name == "vocab.txt" else tokenise.clip)(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class is 'BertTokenizer'; read"),
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case amounts to false, .* does the opposite"),
        ("special_tokens_map.json", {"eos_token": "</s>"}, "eos_token is '</s>' in the settings; CLIP's is"),
        ("added_tokens.json", {"<person>": 99999}, "has no '<person>', an added token"),
        ("added_tokens.json", {END: 0}, "is .* there, 0 in the settings"),
    ],
)
def test_settings_beside_clip(tmp_path, file, content, message):
    for name in ("tokenizer.json", "merges.txt"):
        path = tmp_path / name
        path.write_bytes((GOLDEN / name).read_bytes())
        put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
        put(tmp_path, "special_tokens_map.json", {"bos_token": {"content": BEGIN}, "eos_token": END})
        assert tokenise.clip(path).vocab_size > 500
        put(tmp_path, file, content)
        with pytest.raises(ValueError, match=message):
            tokenise.clip(path)
        (tmp_path / file).unlink()


@pytest.mark.parametrize(("template", "message"), [(f"$A {END}", "makes"), (f"{END} $A {END}", "puts .* expected")])
def test_a_post_processor_that_is_not_clips(tmp_path, template, message):
    made = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    number = made.token_to_id(END)
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(END, number)])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"its post_processor {message}"):
        tokenise.clip(tmp_path / "tokenizer.json")


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="needs `make minilm`")
def test_minilm_has_the_tokens_that_it_had():
    folder = minilm.folder()
    found = wordpiece.find_vocabulary(folder)
    assert wordpiece.read(found).kept() == (".txt", (folder / "vocab.txt").read_bytes())
    made = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    texts = TEXTS[:-1]  # without special tokens
    assert ids(found)[:-1] == [e.ids for e in made.encode_batch(texts, add_special_tokens=False)]


def test_share_of_unknown_pieces(folder):
    put(folder, "tokenizer_config.json", {"do_lower_case": False})
    found = tokenise.wordpiece(folder / "vocab.txt")
    captions = tokenise.tokenise_captions([["the Player", "the zebra"]], found)
    assert captions.unknown_share(found) == 0.25
    assert tokenise.tokenise_captions([], found).unknown_share(found) == 0.0
