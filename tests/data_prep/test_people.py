"""Rendered figures: the same for ever, true captions, twins that differ in one respect, pictures that show it."""

import re
from dataclasses import replace

import numpy as np
import pytest

from data_prep import people, schema
from data_prep.people import captions, features, wardrobe, write
from data_prep.people.figure import HEIGHT, WIDTH, render
from shnet_jax.data.records import open_dataset


def test_a_record_is_valid_and_a_function_of_seed_and_index():
    record = people.record(5, 9)
    schema.check_record(record, "here")
    assert record["identity"] == 2 and record["image"].shape == (128, 48, 3)
    assert record["grid"].shape == (features.ROWS * features.COLUMNS, features.SIZE)
    again = people.record(5, 9)
    assert all(np.array_equal(record[name], again[name]) for name in record)
    other = people.record(6, 9)
    assert not np.array_equal(record["image"], other["image"]) and record["captions"] != other["captions"]


def test_twins_differ_in_one_respect():
    for pair in range(60):
        first, twin = people.person(0, 2 * pair), people.person(0, 2 * pair + 1)
        differing = [name for name in wardrobe.CHOICES if getattr(first, name) != getattr(twin, name)]
        assert len(differing) == 1 and differing[0] in wardrobe.DIFFERENCES
        assert not (differing == ["bag_colour"] and first.bag == "none")  # nobody could tell


def test_captions_say_what_is_so_and_seldom_all_of_it():
    told = 0
    for number in range(80):
        figure = people.person(1, number)
        sentences = captions.caption(figure, np.random.default_rng(number))
        allowed = " ".join(captions.parts(figure).values())
        for word in re.findall(r"[a-z-]+", sentences.lower()):
            if word in wardrobe.COLOURS + wardrobe.TOPS + wardrobe.BOTTOMS + wardrobe.HAIR_STYLES:
                assert word in allowed, (figure, sentences)
        assert figure.top in sentences
        told += all(part in sentences for part in captions.parts(figure).values())
    assert told < 10


def test_what_a_figure_wears_is_in_the_picture():
    """Red trousers are redder than blue ones, whatever the view."""
    figure = people.person(0, 0)
    for seed in range(5):
        red, blue = (
            render(replace(figure, bottom="trousers", top="t-shirt", bottom_colour=c), np.random.default_rng(seed))
            for c in ("red", "blue")
        )
        legs = slice(int(0.65 * HEIGHT), int(0.8 * HEIGHT)), slice(WIDTH // 2 - 8, WIDTH // 2 + 8)
        assert (red[legs].mean((0, 1)) - blue[legs].mean((0, 1)))[[0, 2]] @ [1, -1] > 80


def test_a_set_is_written_once(tmp_path, capsys):
    assert write.main([f"--out={tmp_path}", "--train=2", "--val=1", "--test=0", "--seed=3"]) == 0
    dataset = open_dataset(tmp_path)
    assert dict(dataset.splits) == {"train": 8, "val": 4}
    assert not set(dataset.identities("train")) & set(dataset.identities("val"))
    assert write.main([f"--out={tmp_path}", "--train=2", "--val=1", "--test=0", "--seed=3"]) == 0
    assert "was made with these settings" in capsys.readouterr().err
    assert write.main([f"--out={tmp_path}", "--train=3", "--val=1", "--test=0", "--seed=3"]) == 1
    assert "was made otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["top", "pattern", "bottom", "shoes_colour", "bag", "hat", "hair_style"])
def test_every_choice_can_be_seen(name):
    figure = replace(people.person(0, 4), hat="none") if name == "hair_style" else people.person(0, 4)
    pictures = [
        render(replace(figure, **{name: value}), np.random.default_rng(0)).astype(int)
        for value in wardrobe.CHOICES[name]
    ]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (np.abs(a - b).max(-1) > 40).sum() > 10
