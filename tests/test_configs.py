"""The documentation of the configuration, and that every configuration keeps to its fields."""

from __future__ import annotations

import importlib
import io
import pkgutil
import re
import tokenize
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import configs
from configs import base, hybrid_flickr8k, shnet_flickr8k
from shnet_jax.modes.study import arm_config

# Fields that a configuration may have beyond those of base.py: {file name: {"section.field", ...}}.
USER = {f"model.user.{name}" for name in ("guides", "attention_scale", "dropout", "norm")}
OWN_FIELDS = dict.fromkeys(("user_coco", "user_f30k", "user_flickr8k", "user_small", "user_demo"), USER)
_ESA = {
    "model.esa": "source head size text_size mode depth heads similarity sharpness eta",
    "model.clip": "grid patch layers width heads mlp_dim projection activation remat",
}
ESA = {f"{section}.{name}" for section, names in _ESA.items() for name in names.split()}
_ESA_FILES = ("esa_people", "esa_cuhk_pedes", "esa_icfg_pedes", "esa_rstpreid", "esa_flickr8k", "esa_frozen")
OWN_FIELDS |= dict.fromkeys(_ESA_FILES, ESA)

NAMES = [module.name for module in pkgutil.iter_modules(configs.__path__)]
# One entry for each loss term, named by the user: its value is compared with that of any entry of base.
OPEN = ("loss.weights.",)


def fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Every field that is not a section, by its dotted name."""
    found: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def undocumented(source: str) -> list[str]:
    """Lines "number: text" that assign a field without a comment of at least two words beside it.

    A line that opens a section (`c.data = data = ConfigDict()`) needs none.
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
        and not line.rstrip().endswith("= ConfigDict()")
        and len(comments.get(number, "").split()) < 2
    ]


def test_every_field_is_documented():
    path = Path(base.__file__)
    assert not undocumented(path.read_text("utf-8")), f"{path.name}: fields without a comment beside them"


def test_every_field_of_a_model_s_own_is_documented():
    for name, own in OWN_FIELDS.items():
        source = Path(importlib.import_module(f"configs.{name}").__file__).read_text("utf-8")
        lines = [line.split(": ", 1)[1] for line in undocumented(source)]
        fields_set = {".".join(field.split(".")[-2:]) for field in own}
        assert not [line for line in lines if line.split(" = ")[0] in fields_set], f"{name}.py: no comment beside it"


def test_the_check_of_comments_can_fail():
    source = 'c.data = data = ConfigDict()\ndata.dir = ""\ndata.kind = "a # b"  # x\ndata.size = 3  # in rows\n'
    assert undocumented(source) == ['2: data.dir = ""', '3: data.kind = "a # b"  # x']


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_keeps_to_the_fields_of_base(name):
    known = fields(base.get_config())
    config = importlib.import_module(f"configs.{name}").get_config()
    for arm in config.study.arms:
        arm_config(config, arm, seed=0)  # names the field of an arm that the configuration does not have
    for field, value in fields(config).items():
        field = re.sub(r"^study\.arms\.\w+\.", "", field)  # an arm sets fields of the configuration
        if field in OWN_FIELDS.get(name, ()):
            continue
        if field.startswith(OPEN):
            assert isinstance(value, float), f"configs/{name}.py: {field} is {value!r}, expected a float"
            continue
        if field.startswith("study.ensembles."):
            assert isinstance(value, tuple), f"configs/{name}.py: {field} is {value!r}, expected names of arms"
            continue
        field = re.sub(r"^study\.arms\.\w+\.", "", field)  # a field that the arm changes
        assert field in known, f"configs/{name}.py: {field} is not a field of base.py"
        expected = type(known[field])
        assert type(value) is expected, f"configs/{name}.py: {field} is {value!r}, expected {expected.__name__}"


def test_the_joint_arms_of_the_hybrid_study_are_those_of_its_base():
    hybrid, joint = hybrid_flickr8k.get_config(), shnet_flickr8k.get_config()
    for arm in joint.study.arms:
        ours, theirs = (arm_config(c, name, 1).to_dict() for c, name in ((hybrid, f"joint_{arm}"), (joint, arm)))
        for config in (ours, theirs):
            del config["study"], config["name"]
        assert ours == theirs
    region = arm_config(hybrid, "region_none", 1).model
    assert region.units == ("regions",) and not (region.semantic or region.spatial or region.scene_tokens)
    assert hybrid.study.ensembles.ensemble_semantic == ("region_semantic", "grid_semantic")


@pytest.mark.parametrize("name", NAMES)
def test_the_arms_of_a_study_change_fields_that_there_are(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    for arm in config.study.arms:
        arm_config(config, arm, seed=0)


def test_fields_of_their_own_exist():
    for name, own in OWN_FIELDS.items():
        found = fields(importlib.import_module(f"configs.{name}").get_config())
        assert own <= found.keys(), f"configs/{name}.py no longer has {sorted(own - found.keys())}"
