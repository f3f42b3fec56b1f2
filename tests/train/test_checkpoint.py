"""Which checkpoints are kept, which is the best, and what happens when a checkpoint does not fit."""

from __future__ import annotations

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.state import create_state


def make_state(rows=3, ema=True, value=0.0, statistics=True):
    variables = {"params": {"image": {"kernel": jnp.full((rows, 2), value)}}}
    if statistics:
        variables["batch_stats"] = {"image": {"mean": jnp.full(2, value)}}
    loss_params = {"infonce": {"log_scale": jnp.float32(value)}, "triplet": {}}
    return create_state(variables, loss_params, optax.adam(0.1), ema, seed=5)


def iterator():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(checkpoints, step, value=0.0, metrics=None, state=None, data=None):
    state = dataclasses.replace(state or make_state(value=value), step=jnp.int32(step))
    checkpoints.save(step, state, {"sums": {"loss": 0.1}}, data or iterator(), metrics)


def steps(checkpoints):
    checkpoints.wait()
    return sorted(int(path.name) for path in checkpoints.folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    rsums = {1: 10.0, 3: 30.0, 5: 20.0, 7: 29.0}
    for step in range(1, 9):
        metrics = {"rsum": rsums[step], "i2t_r1": -rsums[step]} if step in rsums else None
        save(checkpoints, step, metrics=metrics)
    assert steps(checkpoints) == [3, 7, 8]
    assert (checkpoints.step("best"), checkpoints.step("last")) == (3, 8)
    # A new process finds the same, and goes on to keep it.
    again = Checkpoints(tmp_path, keep=2)
    assert again.notes(8) == {"sums": {"loss": 0.1}}
    assert (again.step("best"), again.step("last")) == (3, 8)
    save(again, 9)
    assert steps(again) == [3, 8, 9]
    save(again, 10, metrics={"rsum": 31.0})
    assert steps(again) == [9, 10]
    assert again.step("best") == 10


def test_without_an_evaluation_the_best_is_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.step("best") is None and checkpoints.step("last") is None
    for step in (4, 5, 6):
        save(checkpoints, step)
    assert steps(checkpoints) == [5, 6]
    assert checkpoints.step("best") == checkpoints.step("last") == 6


def test_neither_best_nor_last(tmp_path):
    with pytest.raises(ValueError, match=r"config\.eval\.checkpoint is 'newest'; choose best or last"):
        Checkpoints(tmp_path, keep=2).step("newest")


@pytest.mark.parametrize("options", [{}, {"ema": False}, {"statistics": False}])
def test_everything_comes_back(options, tmp_path):
    data = iterator()
    for _ in range(4):
        next(data)
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 7, state=make_state(value=0.3, **options), data=data)
    checkpoints.close()
    fresh = iterator()
    like = jax.eval_shape(lambda: make_state(**options))
    restored = Checkpoints(tmp_path).restore(7, like, fresh)
    expected = dataclasses.replace(make_state(value=0.3, **options), step=jnp.int32(7))
    assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert restored.notes == {"sums": {"loss": 0.1}}
    assert next(fresh) == 4


def test_only_the_variables(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = make_state(value=0.3)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda a: jnp.full_like(a, 0.7), state.ema))
    save(checkpoints, 7, state=state)
    checkpoints.close()
    like = jax.eval_shape(lambda: {"params": make_state().params["model"], "batch_stats": make_state().batch_stats})
    for averaged, value in ((True, 0.7), (False, 0.3)):
        variables = Checkpoints(tmp_path).restore_variables(7, like, averaged=averaged)
        assert (np.asarray(variables["params"]["image"]["kernel"]) == np.float32(value)).all()
        assert (np.asarray(variables["batch_stats"]["image"]["mean"]) == np.float32(value)).all()


def test_a_checkpoint_that_does_not_fit(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 7, state=make_state(ema=False))
    checkpoints.wait()
    with pytest.raises(CheckpointError) as fault:
        checkpoints.restore(7, make_state(rows=4, ema=False), iterator())
    assert str(tmp_path) in str(fault.value) and "checkpoint 7" in str(fault.value)
    assert "model/image/kernel: saved (3, 2), expected (4, 2)" in str(fault.value)
    with pytest.raises(CheckpointError, match="has no 'ema'"):
        checkpoints.restore(7, make_state(), iterator())
    like = {"params": {"image": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}, "batch_stats": {}}
    with pytest.raises(CheckpointError, match=r"model/image/bias: saved absent, expected \(2,\)"):
        checkpoints.restore_variables(7, like, averaged=False)


def test_a_save_that_was_cut_off_is_not_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    checkpoints.close()
    # Orbax gives the folder its name at the end; until then it is called so.
    (checkpoints.folder / "6").rename(checkpoints.folder / "6.orbax-checkpoint-tmp")
    reader = Checkpoints(tmp_path)
    assert reader.step("last") == 3
    assert len(list(checkpoints.folder.glob("*tmp*"))) == 1  # who reads may not disturb a run that is saving
    again = Checkpoints(tmp_path, keep=2)
    assert again.step("last") == 3
    save(again, 5)
    again.wait()
    assert again.step("last") == 5
    assert not list(checkpoints.folder.glob("*tmp*"))


def test_reading_leaves_no_trace(tmp_path):
    assert Checkpoints(tmp_path).step("best") is None
    assert not list(tmp_path.iterdir())
