"""requirements/: what `make setup` installs fits setup.py, is pinned by hash and names no place to load it from."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
PIN = re.compile(
    r"(?P<pin>[A-Za-z0-9][\w.-]*==[\w.+!]+(?: ; [^\\]+?)?)(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)


def pins(path: Path) -> list[Requirement]:
    return [Requirement(actual["pin"]) for actual in PIN.finditer(path.read_text("utf-8"))]


def of_setup(name: str):
    """A constant of setup.py, which is run without setting anything up."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_but_pins_with_hashes(path):
    rest = [line for line in PIN.sub("", path.read_text("utf-8")).splitlines() if not re.match(r"\s*(#|$)", line)]
    assert pins(path) and rest == []


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_accelerators_add_to_the_lock(extra):
    """What JAX loads for them, of the version of JAX that is locked, and nothing that the lock has already."""
    plugin = "libtpu" if extra == "tpu" else f"jax-{extra}-plugin"
    added, locked = (pins(ROOT / "requirements" / f"{name}.txt") for name in (extra, "lock"))
    assert not {pin.name for pin in added} & {pin.name for pin in locked}
    (wanted,) = map(Requirement, of_setup("EXTRAS")[extra])
    assert wanted.extras == {extra} and any(pin.name == plugin for pin in added)
    if extra != "tpu":
        assert {(str(pin.specifier), str(pin.marker).split(" and sys")[0]) for pin in added if pin.name == plugin} == {
            (str(pin.specifier), str(pin.marker)) for pin in locked if pin.name == "jaxlib"
        }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_fits_setup_py(python):
    environment = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "platform_python_implementation": "CPython"}
    wanted = [Requirement(text) for text in of_setup("REQUIRED") + of_setup("EXTRAS")["dev"]]
    locked = pins(ROOT / "requirements" / "lock.txt")
    here = {canonicalize_name(p.name): p for p in locked if p.marker is None or p.marker.evaluate(environment)}
    for requirement in wanted:
        pin = here.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} of setup.py is not in requirements/lock.txt: run `make lock`"
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{pin} does not fit {requirement} of setup.py"
        )
