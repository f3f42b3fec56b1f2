"""Scenes: records, true and telling captions, features without positions, maps without colours."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2hsv
from skimage.feature import hog

from data_prep import scenes, schema
from data_prep.scenes import captions, features, render, shapes, world, write
from data_prep.scenes.captions import Facts, Mention
from data_prep.scenes.world import ABOVE, BEHIND, CLASS_NAMES, COLOURS, LEFT_OF, ON, SHAPES
from shnet_jax.data.records import open_dataset

GALLERY = 250
WAVES = ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))
SKY, GRASS, SAND = (CLASS_NAMES.index(name) for name in ("sky", "grass", "sand"))
MEADOW = world.Ground(SKY, (GRASS, SAND), False, (0.3, 0.5), WAVES)


def look(colour, shape, size="large", texture="plain"):
    return world.Look(
        SHAPES.index(shape), COLOURS.index(colour), world.SIZES.index(size), world.TEXTURES.index(texture)
    )


def mention(colour, shape, **more):
    return Mention(SHAPES.index(shape), COLOURS.index(colour) if colour else None, **more)


def built(*things, ground=MEADOW):
    """The scene of (look, (x, y, radius)) things, back to front."""
    looks = tuple(thing for thing, _ in things)
    spots = tuple(shapes.Spot(x, y, radius, 0.0) for _, (x, y, radius) in things)
    scene = world.compose(looks, spots, ground)
    assert scene is not None
    return scene


@pytest.fixture(scope="module")
def example():
    """A red disc on the grass behind a blue square; two white rings to the right, one of them in the sky."""
    return built(
        (look("red", "disc"), (0.2, 0.6, 0.12)),
        (look("blue", "square"), (0.33, 0.62, 0.12)),
        (look("white", "ring"), (0.8, 0.6, 0.1)),
        (look("white", "ring"), (0.8, 0.15, 0.1)),
    )


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_record_depends_on_seed_and_index_only():
    alone = scenes.scene(3, 41)
    world.sample.cache_clear()
    in_order = list(scenes.records(3, 38, 43))
    same(in_order[3], alone)
    assert not np.array_equal(scenes.scene(4, 41)["seg_map"], alone["seg_map"])


def test_processes_give_the_same_records_in_order():
    with scenes.renderers(2) as pool:
        for made, index in zip(scenes.records(1, 7, 75, pool=pool, regions=10), range(7, 75), strict=True):
            assert made["image_id"] == f"scene-1-{index:010d}"
            if index in (7, 74):
                same(made, scenes.scene(1, index, regions=10))


def test_records_have_the_fields_of_the_schema():
    first = schema.signature(scenes.scene(0, 0))
    for record in scenes.records(0, 1, 12):
        schema.check_record(record, "scene")
        schema.check_like(record, first, "scene")
        assert len(set(record["captions"])) == 5
        assert not record["regions"][~record["region_mask"]].any()
        assert (np.diff(record["box_scores"]) <= 0).all()
        valid = record["relations"][record["relations"][:, 0] >= 0]
        assert len(valid) and record["region_mask"][valid[:, [0, 2]]].all()


def test_relations_are_true_of_the_boxes_they_name():
    for record in scenes.records(5, 0, 20, label_noise=0.0):
        centre = (record["boxes"][:, :2] + record["boxes"][:, 2:]) / 2
        for i, predicate, j in record["relations"][record["relations"][:, 0] >= 0]:
            dx, dy = centre[j] - centre[i]
            # the boxes are jittered, so the gap may be a little smaller than world.MARGIN
            assert {LEFT_OF: dx > 0.05, ABOVE: dy > 0.05, ON: dy > 0.05, BEHIND: abs(dx) < 0.4}[predicate]


@pytest.mark.parametrize("options, message", [({"regions": 4}, "at least 8"), ({"label_noise": 1.5}, "label_noise")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scenes.scene(0, 0, **options)


@pytest.mark.parametrize(
    "expected, mentions, relations, stuff",
    [
        (True, [mention("red", "disc")], [], []),
        (False, [mention("blue", "disc")], [], []),
        (False, [mention("red", "disc", size=world.SIZES.index("small"))], [], []),
        (True, [mention("red", "disc", place=GRASS)], [], []),
        (False, [mention("red", "disc", place=SAND)], [], []),
        (True, [mention("red", "disc"), mention(None, "square")], [(0, BEHIND, 1)], []),
        (False, [mention("red", "disc"), mention(None, "square")], [(1, BEHIND, 0)], []),
        (True, [mention("red", "disc"), mention("white", "ring", place=SAND)], [(0, LEFT_OF, 1)], []),
        # the ring beside the disc is not the ring above something: one mention is one thing
        (True, [mention(None, "ring"), mention(None, "ring")], [(0, ABOVE, 1)], []),
        (False, [mention("red", "disc"), mention(None, "ring", place=SKY)], [(0, ABOVE, 1)], []),
        (True, [mention("white", "ring", count=2)], [], []),
        (False, [mention("white", "ring", count=3)], [], []),
        (True, [mention("white", "ring", count=2, place=SKY)], [], []),
        (False, [mention("white", "ring", count=2, place=SKY, every=True)], [], []),
        (False, [mention("red", "disc"), mention("red", "disc")], [], []),  # there is only one
        (True, [], [], [(SKY, ABOVE, GRASS), (GRASS, LEFT_OF, SAND)]),
        (False, [], [], [(SAND, LEFT_OF, GRASS)]),
    ],
)
def test_holds(example, expected, mentions, relations, stuff):
    assert scenes.holds(example, Facts(mentions, relations, stuff)) is expected


def test_on_is_contact_with_what_is_below():
    scene = built((look("red", "square"), (0.5, 0.7, 0.12)), (look("pink", "heart"), (0.5, 0.7 - 0.115 - 0.12, 0.12)))
    assert (1, ON, 0) in scene.relations and (0, ON, 1) not in scene.relations
    assert scene.standing[1] == -1  # it stands on the square, not on the stuff behind its foot


def test_the_thing_in_front_hides_pixels(example):
    assert (0, BEHIND, 1) in example.relations
    picture = render.render(example, np.random.default_rng(0)).astype(int)
    row, column = int(0.62 * shapes.SIDE), int(0.26 * shapes.SIDE)  # inside the disc and inside the square
    assert example.label_map[row, column] == SHAPES.index("square")
    assert picture[row, column, 2] > picture[row, column, 0] + 60  # blue, not red


def test_captions_state_what_holds_and_say_it_in_words():
    names = {*SHAPES, *COLOURS}
    singular = {plural: name for name, plural in captions.PLURALS.items()} | {n + "s": n for n in SHAPES}
    for index in range(60):
        told = scenes.tell(2, index)
        assert len({text for text, _ in told}) == 5
        for text, facts in told:
            assert scenes.holds(scenes.sample(2, index), facts), text
            assert re.fullmatch(r"[A-Z][a-z ,]+\.", text) and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower())
            words = [singular.get(word, word) for word in re.findall("[a-z]+", text.lower())]
            said = sorted(word for word in words if word in names)
            meant = [SHAPES[m.shape] for m in facts.mentions]
            meant += [COLOURS[m.colour] for m in facts.mentions if m.colour is not None]
            assert said == sorted(meant), text


def test_a_caption_identifies_its_image_in_a_gallery():
    gallery = [scenes.sample(0, index) for index in range(GALLERY)]
    rng = random.Random(0)
    unique = 0
    for index in range(GALLERY):
        _, facts = rng.choice(scenes.tell(0, index))
        unique += [i for i, scene in enumerate(gallery) if scenes.holds(scene, facts)] == [index]
    assert unique / GALLERY > 0.97


def test_twins_share_one_source_of_information():
    kinds: dict[str, int] = {}
    for index in range(0, 60, 2):
        kinds.setdefault(world.pair_kind(0, index), index)
    assert kinds.keys() == set(world.PAIR_KINDS)
    moved = [scenes.sample(0, kinds["moved"] + i) for i in (0, 1)]
    assert sorted(moved[0].looks, key=str) == sorted(moved[1].looks, key=str)
    assert np.mean(moved[0].label_map != moved[1].label_map) > 0.1
    recoloured = [scenes.sample(0, kinds["recoloured"] + i) for i in (0, 1)]
    np.testing.assert_array_equal(recoloured[0].label_map, recoloured[1].label_map)
    assert all(a.colour != b.colour for a, b in zip(recoloured[0].looks, recoloured[1].looks, strict=True))


def test_captions_tell_twins_apart():
    told = [
        scenes.holds(scenes.sample(0, index ^ 1), facts)
        for index in range(60)
        if world.pair_kind(0, index) != "independent"
        for _, facts in scenes.tell(0, index)
    ]
    assert np.mean(told) < 0.05


def test_features_of_moved_pixels_are_the_same():
    picture = np.random.default_rng(0).integers(0, 256, (shapes.SIDE, shapes.SIDE, 3), dtype=np.uint8)
    boxes = np.array([[0.1, 0.2, 0.4, 0.6]])
    moved = features.planes(np.roll(picture, (32, 48), axis=(0, 1)))
    there = features.describe(moved, boxes + np.array([48, 32, 48, 32]) / shapes.SIDE)
    here = features.describe(features.planes(picture), boxes)
    np.testing.assert_allclose(there.astype(float), here.astype(float), atol=1e-2)


@pytest.mark.parametrize("texture", world.TEXTURES)
@pytest.mark.parametrize("shape", ["disc", "star", "crescent", "arrow"])
def test_region_features_do_not_tell_the_position(shape, texture):
    ground = world.Ground(SKY, (SAND,), False, (0.0, 0.5), WAVES)

    def feature(colour, shape, x, y):
        scene = built((look(colour, shape, texture=texture), (x, y, 0.15)), ground=ground)
        picture = render.render(scene, np.random.default_rng(0))
        return features.describe(features.planes(picture), scene.boxes)[0].astype(float)

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    here = feature("red", shape, 0.25, 0.25)
    elsewhere = cosine(here, feature("red", shape, 0.75, 0.625))
    assert elsewhere > 0.94
    assert cosine(here, feature("red", "cross", 0.25, 0.25)) < elsewhere - 0.1
    assert cosine(here, feature("blue", shape, 0.25, 0.25)) < elsewhere - 0.03


def test_features_have_unit_mean_square_and_their_sizes():
    made = list(scenes.records(0, 0, 40))
    regions = np.concatenate([r["regions"][r["region_mask"]] for r in made]).astype(float)
    grid = np.concatenate([r["grid"] for r in made]).astype(float)
    assert regions.shape[1] == features.REGION_SIZE == 200 and grid.shape[1] == features.GRID_SIZE == 64
    assert 0.8 < np.mean(regions**2) < 1.2 and 0.8 < np.mean(grid**2) < 1.2


@pytest.mark.parametrize("size", [16, 32])
def test_hog_is_that_of_scikit_image(size):
    crops = np.random.default_rng(0).random((5, size, size))
    cells = size // features.CELL
    expected = [
        hog(crop, features.ORIENTATIONS, (features.CELL,) * 2, (cells, cells), block_norm="L2-Hys") for crop in crops
    ]
    np.testing.assert_allclose(features.hog(crops), expected, atol=1e-6)


def test_crop_of_whole_pixels_is_a_slice_and_interpolates_ramps():
    plane = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    box = np.array([[8, 4, 16, 12]]) / 32
    np.testing.assert_allclose(features.crop(plane, box, 8)[0], plane[4:12, 8:16], atol=1e-5)
    ramp = np.tile(np.arange(32, dtype=np.float32), (32, 1))
    got = features.crop(ramp, np.array([[0.25, 0.2, 0.75, 0.9]]), 32)[0]
    np.testing.assert_allclose(got, np.tile(8 + (np.arange(32) + 0.5) / 2 - 0.5, (32, 1)), atol=1e-4)


def test_planes_follow_hsv():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    got, hsv = features.planes(image), rgb2hsv(image)
    np.testing.assert_allclose(got["value"], hsv[..., 2], atol=1e-6)
    np.testing.assert_allclose(got["chroma"], hsv[..., 1] * hsv[..., 2], atol=1e-6)
    turn = np.abs((got["hue"] - hsv[..., 0] + 0.5) % 1 - 0.5)
    assert turn[got["chroma"] > 0.05].max() < 0.01  # the angle differs from the hexagon's hue by 1.1 degrees at most


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_label_noise_has_its_rate(rate):
    wrong = []
    for index in range(30):
        clean = scenes.sample(0, index).label_map
        noisy = features.noisy_map(clean, rate, np.random.default_rng(index))
        wrong.append(np.mean(noisy != clean[::2, ::2]))
    assert abs(np.mean(wrong) - rate) < 0.2 * rate + 1e-9


def test_relation_noise_has_its_rate_and_names_other_regions():
    changed, rows = 0, 0
    for index in range(12):
        clean, noisy = (scenes.scene(0, index, relation_noise=rate) for rate in (0.0, 0.3))
        before, after, valid = clean.pop("relations"), noisy.pop("relations"), clean["region_mask"].sum()
        same(clean, noisy)
        np.testing.assert_array_equal(after[:, :2], before[:, :2])
        wrong = after[:, 2] != before[:, 2]
        assert (after[wrong, 2] != after[wrong, 0]).all() and (after[before[:, 0] >= 0, 2] < valid).all()
        changed, rows = changed + wrong.sum(), rows + (before[:, 0] >= 0).sum()
    assert 0.15 < changed / rows < 0.45


def test_semantic_map_is_the_share_of_each_cell():
    seg_map = scenes.scene(0, 3)["seg_map"]
    got = scenes.scene(0, 3)["seg_semantic"].astype(float)
    fine = seg_map.repeat(7, 0).repeat(7, 1).reshape(7, 64, 7, 64)  # each cell has 64 x 64 whole points
    expected = np.stack([(fine == c).mean((1, 3)) for c in range(len(CLASS_NAMES))])
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_categories_are_the_classes_of_the_scene():
    right = [
        scenes.scene(0, index)["categories"]
        == (np.bincount(scenes.sample(0, index).label_map.ravel(), minlength=22) > 0)
        for index in range(40)
    ]
    assert np.mean(right) > 0.95


@pytest.mark.slow
def test_a_linear_probe_retrieves_far_above_chance():
    with scenes.renderers() as pool:
        made = [*scenes.records(0, 0, 600, pool=pool), *scenes.records(0, 10_000, 10_100, pool=pool)]
    text = [re.findall("[a-z]+", " ".join(r["captions"]).lower()) for r in made]
    vocabulary = sorted({word for words in text for word in words})
    bags = np.array([[word in words for word in vocabulary] for words in map(set, text)], float)
    rows = [r["regions"][r["region_mask"]].astype(float) for r in made]
    images = np.array(
        [
            np.concatenate([x.mean(0), x.max(0), r["seg_semantic"].astype(float).ravel()])
            for x, r in zip(rows, made, strict=True)
        ]
    )
    images -= images[:600].mean(0)
    bags -= bags[:600].mean(0)
    weights = np.linalg.solve(
        images[:600].T @ images[:600] + 100 * np.eye(images.shape[1]), images[:600].T @ bags[:600]
    )
    scores = (images[600:] @ weights) @ bags[600:].T
    rank = (scores > np.diag(scores)[:, None]).sum(1)
    assert np.mean(rank < 10) > 0.6  # chance is 0.1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--regions=7", "--regions: expected a whole number >= 8, found '7'"),
        ("--label_noise=1", "--label_noise: expected a number in 0 <= share < 1, found '1'"),
        ("--relation_noise=-1", "--relation_noise: expected a number in 0 <= share < 1, found '-1'"),
        ("--label_noise=nan", "--label_noise: expected a number in 0 <= share < 1, found 'nan'"),
        ("--train=1000000001", "--train: expected at most 1000000000 images, found 1000000001"),
        ("--val=-1", "--val: expected a whole number >= 0, found '-1'"),
        ("--test=ten", "--test: expected a whole number >= 0, found 'ten'"),
    ],
)
def test_the_command_line_refuses_bad_values(tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit, match="2"):
        write.main([f"--out={tmp_path / 'sets'}", flag])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sets").exists()


def test_pictures(tmp_path):
    """Those that are there stay; find_dataset passes the folder over."""
    write.write_pictures(tmp_path / "pictures", 3, range(5, 7))
    paths = [tmp_path / "pictures" / f"{scenes.image_id(3, index)}.jpg" for index in (5, 6)]
    assert sorted((tmp_path / "pictures").iterdir()) == paths
    shown = np.asarray(Image.open(paths[1])).astype(int)
    assert shown.shape == (128, 128, 3) and np.abs(shown - scenes.draw(3, 6)).mean() < 6
    paths[0].write_bytes(b"mine")
    write.write_pictures(tmp_path / "pictures", 3, range(5, 7))
    assert paths[0].read_bytes() == b"mine"


@pytest.mark.slow
def test_command_line_writes_once(tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--val=8", "--test=0"]
    command = [sys.executable, "-m", "data_prep.scenes", *flags, "--train=70"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0 and first.stdout.strip() == str(tmp_path / "scenes" / "1.0.0"), first.stderr
    assert "scenes: 78 records in " in first.stderr
    data = open_dataset(tmp_path)
    assert data.splits == {"train": 70, "val": 8}
    assert data.num_classes == len(CLASS_NAMES) and list(data.metadata["predicates"]) == list(world.PREDICATES)
    read = data.open_split("train", ("image_id", "captions", "regions", "seg_map", "categories"))[69]
    made = scenes.scene(0, 69)
    same(read, {name: made[name] for name in read})
    assert write.main([*flags, "--train=70", "--pictures"]) == 0 and not [*(tmp_path / "scenes/pictures").iterdir()]
    assert "exists and was made with these settings" in capsys.readouterr().err
    assert write.main([*flags, "--train=71"]) == 1
    error = capsys.readouterr().err
    assert "--name" in error and '"train": 70' in error
    again = tmp_path / "again"
    assert write.main([f"--out={again}", *flags[1:], "--train=70"]) == 0
    sums = [(folder / "scenes/1.0.0/checksums.json").read_text() for folder in (tmp_path, again)]
    assert sums[0] == sums[1], "another process wrote other bytes, and a run would refuse to go on with them"
