"""Mistakes on the command line are one line, not a traceback. Each test is a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shnet_jax import bundled, cli, stored_config
from shnet_jax.training.workdir import CONFIG, save_config
from tests.patience import PATIENCE
from tests.train import tiny

ROOT = Path(__file__).parent.parent
DEMO = "--config=configs/demo.py"


def main(*flags):
    return subprocess.run(
        [sys.executable, "main.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.stepss=3"], "--config.train.stepss: no field 'stepss'; did you mean 'steps'?"),
        (["--config.trian.steps=3"], "--config.trian.steps: no field 'trian'; did you mean 'train'?"),
        (["--noconfig.data.residen"], "--config.data.residen: no field 'residen'; did you mean 'resident'?"),
        (["--config.data.dir.x=3"], "--config.data.dir.x: 'x' is asked of a value, not of a section"),
        (["--config.loss.weights.hinge=3"], "no field 'hinge'; there are "),
        (["--config.train.steps=many"], "flag --config.train.steps=many: invalid literal for int()"),
        (["--config.data.resident=maybe"], "flag --config.data.resident=maybe"),
        (["--mode=evaluate"], "flag --mode=evaluate: value should be one of <train|eval"),
        (["--confg.train.steps=3"], "Unknown command line flag 'confg.train.steps'"),
        (["train"], "unexpected arguments: train"),
        (["--query=snow", "--mode=embed"], "--query belongs to --mode=search, not to --mode=embed"),
        (["--target=gpu"], "--target belongs to --mode=plan, not to --mode=train"),
        (["--workdir="], "--workdir is missing or empty: give the folder of the run"),
    ],
)
def test_mistakes_in_flags(flags, message, tmp_path):
    done = main(DEMO, f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([DEMO], "--workdir is missing or empty: give the folder of the run"),
        (["photos", "MY_PHOTOS"], "--out is missing or empty: give the folder of the run"),
        (["--workdir=runs/x"], "--config is missing: a bundled name or a file, as in: shnet train --config=demo"),
        (["--workdir=runs/x", "--config=configs/dmo.py"], "configs/dmo.py: no such file, and no bundled configuration"),
        (["--workdir", "runs/x", "--config", "dmo", "--config.seed=1"], "did you mean demo?"),
        (["eval", "--workdir=runs/none"], "runs/none: no config.json; not the work folder of a training run; give"),
        (["serach"], "serach: no such mode; did you mean search?"),
        (["zzz"], "zzz: no such mode; modes: train, eval, "),
        (["--workdir=runs/x", "--config=configs/shnet.py:grid,f31k"], "variant 'grid,f31k': expected one of region, "),
        (["--workdir=runs/x", "--config", "demo:x"], "--config=demo:x: "),
    ],
)
def test_missing_flags(flags, message):
    done = main(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("shnet:f31k", "--config=shnet:f31k: variant 'f31k': expected one of region, grid, hybrid and one of "),
        ("configs/demo.py:x", "--config=configs/demo.py:x: expected --config=configs/demo.py, which has no variants"),
        ("none:x", "--config=none:x: no such file, and no bundled configuration of that name; bundled: align, base, "),
        ("shnt", "; did you mean shnet?"),
    ],
)
def test_a_configuration_that_is_not_there(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bundled.get_config(value)


def test_variants_of_a_configuration(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # bundled ones are found from any folder
    grid = bundled.get_config("configs/shnet.py:grid,f30k")
    assert grid.model.units == ("grid",) and bundled.get_config("shnet").model.units == ("regions",)
    assert bundled.config_path("shnet:grid,f30k") == f"{bundled.CONFIGS / 'shnet.py'}:grid,f30k"


def test_an_unknown_field_of_a_variant():
    argv = ["shnet", "--config=esa:frozen", "--config.study.arms.slot={}", "--config.modl.dim=3"]
    assert cli._unknown_field(argv) == "--config.modl.dim: no field 'modl'; did you mean 'model'?"


@pytest.mark.parametrize("variant", ["", ":grid"])
def test_a_colon_in_the_path_of_a_configuration(variant, tmp_path):
    path = tmp_path / "a:b.py"
    path.write_text("")
    message = f"--config={path}{variant}: expected a path without ':'; copy the file, or call it by a relative path"
    with pytest.raises(ValueError, match=re.escape(message)):
        bundled.config_path(f"{path}{variant}")


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    done = main(f"--config={path}", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr == (
        f"error: {path}: expected a configuration with a function get_config, found none\n"
    )


def test_a_fault_in_the_configuration_file_shows_where(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs import demo\n\ndef get_config():\n    c = demo.get_config()\n    return c.modell\n")
    done = main(f"--config={path}", f"--workdir={tmp_path}")
    assert done.returncode == 1 and f'File "{path}", line 5' in done.stderr


def test_help_names_the_flags_of_several_processes_where_they_serve():
    assert {name for name in cli.MODES if "--process_count" in cli.mode_help(name)} == set(cli.SHARED)


def test_help():
    done = main("--help")
    assert all(f"\n  {name:9}" in done.stdout for name in cli.MODES) and not done.stderr
    of_search = main("search", "--help").stdout
    assert "--query " in of_search and "--top_k " in of_search and "--target " not in of_search


@pytest.mark.parametrize(
    ("devices", "asked", "platforms"),
    [((), None, "cpu"), (("nvidia0",), None, None), (("accel0",), None, None), ((), "tpu", "tpu")],
)
def test_jax_looks_for_accelerators_only_where_there_may_be_some(devices, asked, platforms, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {} if asked is None else {"JAX_PLATFORMS": asked})
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    cli._choose_platform(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.parametrize("name", cli.MODES)
def test_the_example_of_each_mode_is_right(name):
    """Its flags are known, and it names a configuration where the mode needs one."""
    mode = cli.MODES[name]
    arguments = [f"--mode={name}", *shlex.split(mode.example)]
    arguments = cli._of_photos(arguments) if name == "photos" else arguments
    given = {flag.partition("=")[0].lstrip("-") for flag in arguments[1:]}
    fields = {flag.removeprefix("config.") for flag in given if flag.startswith("config.")}
    assert {"workdir"} <= given and ("config" in given) == mode.configured
    assert given - {f"config.{field}" for field in fields} <= {"config", "workdir", *mode.own_flags}
    base = bundled.get_config("base")
    assert all(name in base[section] for section, _, name in (field.partition(".") for field in fields))


@pytest.mark.parametrize(
    ("text", "path"),
    [("('a b', 'c')", "a b"), ("('runs/x,1',)", "runs/x,1"), ("['it\\'s']", "it's")],
)
def test_the_first_of_several_runs(text, path):
    assert cli._first_path(text) == path
    argument = cli._with_paths("--config.cross.runs=none one,other")
    assert cli._first_path(argument.partition("=")[2]) == "none one"
    for wrong in ("()", "('a'", "(1,)"):
        with pytest.raises(ValueError, match="expected work folders"):
            cli._first_path(wrong)


@pytest.mark.parametrize("value", ["wandb,mlflow", "wandb, mlflow", "('wandb', 'mlflow')"])
def test_names_by_commas(value):
    assert cli._with_paths(f"--config.train.log_to={value}") == "--config.train.log_to=('wandb', 'mlflow')"
    assert cli._with_paths("--config.train.log_tags=small") == "--config.train.log_tags=('small',)"
    assert cli._with_paths("--config.train.log_to=") == "--config.train.log_to="


def test_a_run_gives_its_own_configuration(tmp_path):
    """Younger fields of the model are off, as they were; those of the tools have their defaults; another tower is not
    taken up unasked."""
    config = bundled.get_config("demo")
    del config.search.nprobe, config.optim.ema
    config.eval.tile = 7
    save_config(config, tmp_path / CONFIG)
    (tmp_path / "vocabulary.model").write_bytes(b"x")
    stored = stored_config.get_config(str(tmp_path))
    base = bundled.get_config("base")
    assert stored.eval.tile == 7 and stored.search.nprobe == base.search.nprobe and stored.optim.ema == 0
    assert stored.tokenizer.path == str(tmp_path / "vocabulary.model")
    config.text.tower = "somebody.elses"
    save_config(config, tmp_path / CONFIG)
    with pytest.raises(ValueError, match="somebody"):
        stored_config.get_config(str(tmp_path))
    with pytest.raises(ValueError, match=f"runs below it: {tmp_path / 'a'}$"):
        shutil.copytree(tmp_path, tmp_path / "a")
        (tmp_path / CONFIG).unlink()
        stored_config.get_config(str(tmp_path))


def test_a_run_works_from_another_folder(tmp_path, monkeypatch):
    """The relative path of its data set leads nowhere from there, but from a folder above the run."""
    config, workdir = bundled.get_config("demo"), tmp_path / "project/runs/demo/full"
    workdir.mkdir(parents=True)
    save_config(config, workdir / CONFIG)
    (workdir / "vocabulary.model").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert stored_config.get_config(str(workdir)).data.dir == config.data.dir  # nowhere: as it was
    (tmp_path / "project" / config.data.dir).mkdir(parents=True)
    found = stored_config.get_config("project/runs/demo/full").data.dir
    assert Path(found) == tmp_path / "project" / config.data.dir
    (tmp_path / config.data.dir).mkdir(parents=True)
    assert stored_config.get_config(str(workdir)).data.dir == config.data.dir  # what is here comes first


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_faults_of_the_run(debug, tmp_path):
    flags = ["-v=1"] if debug else []
    done = main(DEMO, f"--workdir={tmp_path}", f"--config.data.dir={tmp_path / 'nothing'}", *flags)
    assert done.returncode == 1
    assert f"{str(tmp_path / 'nothing')!r}: no such folder" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    if not debug:
        about, error = done.stderr.splitlines()
        assert " train: 8 x cpu, 1 process, work folder " in about and error.startswith("error: ")


@pytest.mark.slow
def test_a_finished_run_says_so_on_a_terminal_without_arrows(tmp_path):
    flags = [*tiny.flags(tiny.config()), "--config.model.name=tests.train.toy", "--config.train.steps=2"]
    command = [sys.executable, "main.py", DEMO, f"--workdir={tmp_path}", *flags, "--config.name=scenes → ü"]
    for _ in range(2):  # the second one finds nothing left to do
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"scenes -> \\xfc, val" in done.stdout


def test_a_failed_command_ends_although_a_thread_waits_for_ever(tmp_path):
    program = f"""
import threading
from shnet_jax import cli
cli.END_SECONDS = 1
def waits_for_ever(): threading.Event().wait()
threading.Thread(target=waits_for_ever).start()
cli.run(["shnet", "eval", "--workdir={tmp_path / "none"}"])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and "in waits_for_ever" in done.stderr


def test_ctrl_c_is_one_line():
    program = """
import sys, types
from shnet_jax import cli
def pressed(*_, **__): raise KeyboardInterrupt
sys.modules["pressed"] = types.SimpleNamespace(pressed=pressed)
cli.MODES["train"] = cli.MODES["train"]._replace(target="pressed:pressed")
cli.run(["shnet", "train", "--config=demo", "--workdir=unused"])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 128 + signal.SIGINT and done.stderr.endswith("\ninterrupted\n")
    assert "Traceback" not in done.stderr
