"""The examples of CONTRIBUTING.md are right as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.experiment import assemble, init_variables
from shnet_jax.losses import total
from shnet_jax.parallel import mapping
from shnet_jax.types import DATA, Context, Embedding
from tests.patience import PATIENCE
from tests.train import tiny

TEXT = Path(__file__).parents[1].joinpath("CONTRIBUTING.md").read_text("utf-8")
MODEL, CONFIGURATION, LOSS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def module(name, source, monkeypatch):
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(source, name, "exec", dont_inherit=True), made.__dict__)
    return made


def test_a_model(monkeypatch):
    module("example.mean", MODEL, monkeypatch)
    experiment = assemble(tiny.config(model__name="example.mean"))
    variables = init_variables(experiment, seed=0)
    rng = np.random.default_rng(0)
    kernel = np.asarray(variables["params"]["image"]["Dense_0"]["kernel"], np.float64)
    x, mask = rng.normal(size=(3, 8, len(kernel))).astype(np.float32), np.arange(8) < np.array([[8], [3], [1]])
    batch = {"regions": jnp.asarray(x), "region_mask": jnp.asarray(mask)}
    images = experiment.model.apply(variables, batch, train=False, method="encode_image").vector
    mean = np.stack([row[valid].mean(0) for row, valid in zip(x.astype(np.float64), mask, strict=True)]) @ kernel
    np.testing.assert_allclose(images, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_a_configuration():
    names: dict = {}
    exec(CONFIGURATION, names)
    assert names["get_config"]().model.name == "mean"


@pytest.mark.parametrize("devices", [1, 4])
def test_a_loss(devices, monkeypatch):
    made = module("example_loss", LOSS, monkeypatch)
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(2, 8, 5)).astype(np.float32)

    def share(images, texts):
        context = Context(step=jnp.zeros((), jnp.int32), params={}, score=lambda a, b: a, axis=DATA)
        terms = made.loss(Embedding(images), Embedding(texts), jnp.arange(len(images)), context)
        return jax.lax.psum(terms["msd_loss"], DATA)

    rows = jax.sharding.PartitionSpec(DATA)
    mesh = mapping.data_mesh(jax.devices()[:devices])
    whole = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=rows, out_specs=jax.sharding.PartitionSpec()))
    expected = np.mean(np.sum((images.astype(np.float64) - texts) ** 2, axis=1))
    assert float(whole(images, texts)) == pytest.approx(expected, rel=1e-6)


def test_a_loss_without_a_term_of_the_objective(monkeypatch):
    monkeypatch.setattr(total.registry, "loss", lambda name: module(name, LOSS.replace("msd_loss", "msd"), monkeypatch))
    config = tiny.config().loss
    config.weights = type(config.weights)({"triplet": 1.0})
    config.triplet = type(config.weights)()
    _, compute = total.build(config, steps_per_epoch=1)
    context = Context(step=jnp.zeros((), jnp.int32), params={"triplet": {}}, score=lambda a, b: a)
    with pytest.raises(ValueError, match=r"loss 'triplet' returns \['msd'\]; expected a term of the objective"):
        compute(Embedding(jnp.ones((2, 3))), Embedding(jnp.ones((2, 3))), jnp.arange(2), context)


def test_the_examples_pass_the_lint(tmp_path):
    for name, source in (("mean.py", MODEL), ("configuration.py", CONFIGURATION), ("loss.py", LOSS)):
        (tmp_path / name).write_text(source)
    project = f"--config={Path(__file__).parents[1] / 'pyproject.toml'}"
    for command in (["check"], ["format", "--check"]):
        run = [sys.executable, "-m", "ruff", *command, project, str(tmp_path)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout
