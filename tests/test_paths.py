"""Paths as people type them, through the helper and through the commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import base
from data_prep import from_bottom_up, from_grid_feats
from shnet_jax import cli as main
from shnet_jax.bundled import config_path
from shnet_jax.data.records import open_dataset
from shnet_jax.paths import expand, named_paths, to_path, to_paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_home(home, tmp_path):
    assert to_path("~/a=1,b") == home / "a=1,b" and to_path(Path("~")) == home
    assert to_path("a~") == Path("a~") and expand("hub/name") == "hub/name"
    (tmp_path / "~").mkdir()  # there is such a folder: meant as written
    assert to_path("~") == Path("~")


def test_lists_of_paths(home, tmp_path):
    for name in ("a,b=c.csv", "x.csv", "train=y.csv"):
        (tmp_path / name).write_text("")
    (home / "h,1").write_text("")
    assert to_paths("a,b=c.csv") == [Path("a,b=c.csv")]
    assert to_paths("x.csv,a,b=c.csv,~/h,1,none") == [*map(Path, ("x.csv", "a,b=c.csv")), home / "h,1", Path("none")]
    assert named_paths("train=a,b=c.csv,val=x.csv") == [("train", Path("a,b=c.csv")), ("val", Path("x.csv"))]
    assert named_paths("train=y.csv") == [("", Path("train=y.csv"))]  # a path that exists is a path
    assert named_paths("test=train=y.csv,a,b=c.csv") == [("test", Path("train=y.csv")), ("", Path("a,b=c.csv"))]
    assert named_paths("train=~/h,1") == [("train", home / "h,1")]
    assert named_paths("/data/x=1/none.csv") == [("", Path("/data/x=1/none.csv"))]  # no split has a slash
    assert named_paths("x.csv, ,".replace(" ", "")) == [("", Path("x.csv"))] and to_paths("") == named_paths(",") == []
    assert named_paths("val=none=1.csv") == [("val", Path("none=1.csv"))]


def test_every_flag_of_an_import(home):
    folder = home / "a=1,b"
    (folder / "grids,=").mkdir(parents=True)
    for name in ("1", "2"):
        np.save(folder / "grids,=" / f"{name}.npy", np.ones((2, 3), np.float32))
    (folder / "cap,s=.csv").write_text("image,caption\n1.jpg,a dog\n2.jpg,a cat\n")
    (folder / "list,=.txt").write_text("1.jpg\n2.jpg\n")
    flags = ["--captions=~/a=1,b/cap,s=.csv", "--split_lists=train=~/a=1,b/list,=.txt", "--grids=~/a=1,b/grids,="]
    assert from_grid_feats.main([*flags, "--name=toy", "--out=~/a=1,b/out,="]) == 0
    assert open_dataset("~/a=1,b/out,=").splits == {"train": 2}


def test_several_tables(home, capsys):
    for name in ("a,b.tsv", "c.tsv"):
        (home / name).write_text("7\t9\t9\t1\tAA==\tAA==\n")
    (home / "c.csv").write_text("image,caption\n1.jpg,a dog\n")
    flags = ["--captions=train=~/c.csv", "--name=toy", "--out=~/out"]
    assert from_bottom_up.main([*flags, "--bottom_up=~/a,b.tsv,~/c.tsv"]) == 1
    assert f"{home}/a,b.tsv, {home}/c.tsv: image '1.jpg': expected its line, found none" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["eval.ensemble", "cross.runs", "cross.data_dirs"])
def test_lists_of_folders_in_flags(home, flag):
    (home / "a,b=1").mkdir()
    for given, expected in (("~/a,b=1,runs/c", (str(home / "a,b=1"), "runs/c")), ("runs/a=1", ("runs/a=1",))):
        assert main._with_paths(f"--config.{flag}={given}") == f"--config.{flag}={expected!r}"
    for given in ("('a','b')", "'a'", ""):
        assert main._with_paths(f"--config.{flag}={given}") == f"--config.{flag}={given}"


def test_home_in_flags_and_fields(home):
    (home / "a=1,b.py").write_text("")
    assert config_path("~/a=1,b.py") == f"{home}/a=1,b.py"
    assert main._with_paths("--workdir=~/r") == f"--workdir={home}/r"
    assert main._with_paths("--query=~ about") == "--query=~ about"
    config = base.get_config()
    config.data.dir, config.cross.runs, config.convert.source = "~/data=1,2", ("~/a", "b"), "~/none,=.pth"
    main._expand_paths(config)
    assert config.data.dir == f"{home}/data=1,2" and config.cross.runs == (f"{home}/a", "b")
    assert config.convert.source == f"{home}/none,=.pth"


def test_the_command_takes_such_paths(home):
    root = Path(main.__file__).parents[1]
    (home / "a=1,b").mkdir()
    (home / "a=1,b" / "c.py").write_text("from configs import demo\n\n\nget_config = demo.get_config\n")
    flags = ["--config=~/a=1,b/c.py", "--workdir=~/run=1,2", "--config.data.dir=~/d=1,2", "--mode=cross"]
    run = [sys.executable, str(root / "main.py"), *flags, "--config.cross.runs=~/a=1,b,x"]
    done = subprocess.run(
        [*run, "--config.cross.data_dirs=~/none=1,~/a=1,b"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 1 and f"data set folder '{home}/none=1': no such folder" in done.stderr
