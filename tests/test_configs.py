"""Every configuration keeps to the fields of base.py, which documents them all, and lists its variants."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import pkgutil
import re
import tokenize
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import configs
from configs import base, shnet, units_study
from configs.variants import choose
from shnet_jax.modes.study import arm_config
from shnet_jax.training.load import _model_differences, _sections_of_others

FILES = sorted({module.name for module in pkgutil.iter_modules(configs.__path__)} - {"variants"})
# One entry for each loss term or ensemble, named by the user; {prefix of the field: type of its value}.
OPEN = {"loss.weights.": float, "study.ensembles.": tuple}


def load(name: str):
    return importlib.import_module(f"configs.{name}")


def choices(name: str) -> list[list[str]]:
    """The groups of names that a configuration file takes as its variant, as its error message has them."""
    if not load(name).get_config.__code__.co_argcount:
        return []
    with pytest.raises(ValueError, match="variant 'unknown': expected one of") as error:
        load(name).get_config("unknown")
    return [
        group.split(", ") for group in re.findall(r"one of (.*?)(?= and one of |; the default is )", str(error.value))
    ]


VARIANTS = [(name, ",".join(variant)) for name in FILES for variant in itertools.product(*choices(name))]


@functools.cache
def build(name: str, variant: str) -> ConfigDict:
    get_config = load(name).get_config
    return get_config(variant) if variant else get_config()


def fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Every field that is not a section, by its dotted name."""
    values: dict[str, object] = {}
    for name, value in config.items():
        values |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    return values


def undocumented(source: str) -> list[str]:
    """Lines "number: text" that assign a field without a comment of at least two words beside it.

    A line that opens a section (`loss.triplet = triplet = ConfigDict()`, `c.data = _data()`) needs none.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(source.splitlines(), 1)
        if " = " in line.split("#")[0]
        and "." in line.split(" = ")[0]
        and not re.search(r"= (ConfigDict|_\w+)\(\)$", line.rstrip())
        and len(comments.get(number, "").split()) < 2
    ]


def test_every_field_is_documented():
    assert not undocumented(Path(base.__file__).read_text("utf-8")), "base.py: fields without a comment beside them"
    source = 'c.data = _data()\ndata.dir = ""\ndata.kind = "a # b"  # x\ndata.size = 3  # in rows\n'
    assert undocumented(source) == ['2: data.dir = ""', '3: data.kind = "a # b"  # x']


def test_sections_are_in_reading_order():
    order = "name seed data tokenizer model text loss momentum optim train parallel eval search mine page study cross"
    source = Path(base.__file__).read_text("utf-8")
    sections = re.findall(r"(?m)^    c\.(\w+) = ", source)
    assert sections == [*order.split(), "convert", "plan", "scale"]
    functions = re.findall(r"(?m)^def _(\w+)", source)
    assert functions == [*sections[2:5], "user", "esa", "clip", "cmsei", "align", "head", "dual", *sections[5:]]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_configuration_keeps_to_the_fields_of_base(name, variant):
    known = fields(base.get_config())
    config = build(name, variant)
    for arm in config.study.arms:
        arm_config(config, arm, seed=0)  # names the field of an arm that the configuration does not have
    values = fields(config)
    lacking = [field for field in known.keys() - values.keys() if not field.startswith("study.arms.")]
    assert not lacking, "a field of base.py that this configuration cannot override"
    for field, value in values.items():
        field = re.sub(r"^study\.arms\.\w+\.", "", field)  # an arm sets fields of the configuration
        opened = [kind for prefix, kind in OPEN.items() if field.startswith(prefix)]
        assert opened or field in known, f"{field} is not a field of base.py"
        expected = opened[0] if opened else type(known[field])
        assert type(value) is expected, f"{field} is {value!r}, expected {expected.__name__}"


@pytest.mark.parametrize("name", [name for name in FILES if choices(name)])
def test_the_variants_are_listed_and_the_first_ones_are_the_default(name):
    groups = choices(name)
    listed = set(re.findall(r"\w+", load(name).__doc__))
    assert not [choice for group in groups for choice in group if choice not in listed], f"{name}.py: not in its docs"
    default = build(name, ",".join(group[0] for group in groups))
    assert load(name).get_config().to_dict() == default.to_dict()


def test_choose():
    units, data = ("region", "grid"), ("coco", "f30k")
    assert choose("", units, data) == ["region", "coco"]
    assert choose("f30k, grid", units, data) == ["grid", "f30k"]
    message = "expected one of region, grid and one of coco, f30k; the default is region,coco"
    for wrong in ("f31k", "grid,region", "grid,grid", "grid f30k"):
        with pytest.raises(ValueError, match=f"variant '{wrong}': {message}"):
            choose(wrong, units, data)


def test_the_joint_arms_of_the_study_of_units_are_those_of_its_base():
    study, joint = units_study.get_config(), shnet.get_config("hybrid,flickr8k")
    for arm in joint.study.arms:
        ours, theirs = (arm_config(c, name, 1).to_dict() for c, name in ((study, f"joint_{arm}"), (joint, arm)))
        for config in (ours, theirs):
            del config["study"], config["name"]
        assert ours == theirs
    region = arm_config(study, "region_none", 1).model
    assert region.units == ("regions",) and not (region.semantic or region.spatial or region.scene_tokens)
    assert study.study.ensembles.ensemble_semantic == ("region_semantic", "grid_semantic")


def test_the_block_of_a_score_is_free_to_change():
    trained, given = base.get_config(), base.get_config()
    trained.model.name = given.model.name = "cmsei"
    trained.model.cmsei.block = 64
    assert not _model_differences(trained, given, set())
    given.model.cmsei.sharpness = (1.0, 2.0)
    assert [one.name for one in _model_differences(trained, given, set())] == ["config.model.cmsei.sharpness"]


def test_options_of_other_models_say_nothing_about_a_trained_one():
    trained, given = base.get_config(), base.get_config()
    given.model.user.norm = "layer"
    assert not _model_differences(trained, given, _sections_of_others(trained))
    for name in ("user", "my_package.user"):
        trained.model.name = given.model.name = name
        (difference,) = _model_differences(trained, given, _sections_of_others(trained))
        assert difference.name == "config.model.user.norm"
