"""The comparison itself: on recordings written here it passes, and every way of being wrong makes it fail."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from shnet_jax.interop.torch_weights import gpo_params, gpo_slots
from shnet_jax.models.pooling import GPO
from tests.losses.oracle import gradient, triplet, unit
from tests.models import image_oracle as oracle
from tests.parity import adamw
from tests.parity.__main__ import main, unread
from tests.parity.compare import Fixture, compare, compare_gradient, skip


@functools.cache
def losses() -> dict[str, np.ndarray]:
    """What losses.npz holds, by the float64 oracle."""
    rng, arrays = np.random.default_rng(0), {"meta.margin": np.float64(0.2)}
    for case, (kind, warm) in itertools.product(("random", "aligned"), (("sum", True), ("max", False))):
        images, texts = unit(rng.normal(size=(2, 4, 3))).astype(np.float32).astype(np.float64)
        images, texts = arrays.setdefault(f"{case}.in.im", images), arrays.setdefault(f"{case}.in.s", texts)

        def value(images, texts, warm=warm):
            return triplet(images @ texts.T, range(4), margin=0.2, warm=warm, mean=False, mask=False)

        arrays[f"{case}.{kind}.out.loss"] = np.float64(value(images, texts))
        arrays[f"{case}.{kind}.grad.in.im"] = gradient(functools.partial(value, texts=texts), images)
        arrays[f"{case}.{kind}.grad.in.s"] = gradient(functools.partial(value, images), texts)
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}


def run(folder: Path, capsys, **changed: np.ndarray) -> tuple[int, str]:
    np.savez(folder / "losses.npz", **losses() | changed)
    status = main(folder, ("losses",))
    return status, capsys.readouterr().out


def test_an_equal_recording_passes_and_what_no_check_reads_is_told(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **{"out.a": np.zeros(1), "case.grad.b": np.zeros(1), "in.c": np.zeros(1)})
    status, text = run(tmp_path, capsys)
    assert status == 0
    assert "losses out" in text and "losses grad" in text and "MISS" not in text
    assert "skipped 2: other.npz: no check of this run reads it" in text
    assert text.endswith("12 arrays compared, 2 skipped, 0 missed\n")


def shifted(array):
    return array + 0.01 * np.abs(array).max()


def with_nan(array):
    return np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array)


def one_less(array):
    return array.ravel()[:-1]


@pytest.mark.parametrize("name", ["aligned.max.out.loss", "random.sum.grad.in.s"])
@pytest.mark.parametrize("change", [shifted, with_nan, one_less])
def test_every_kind_of_difference_is_a_miss(name, change, tmp_path, capsys):
    status, text = run(tmp_path, capsys, **{name: change(losses()[name])})
    assert status == 1
    assert f"MISS losses {name}" in text and text.endswith("12 arrays compared, 0 skipped, 1 missed\n")
    assert (", recorded (" in text) is (change is one_less)


def test_a_changed_input_is_a_miss(tmp_path, capsys):
    status, text = run(tmp_path, capsys, **{"aligned.in.s": losses()["aligned.in.s"][::-1]})
    assert status == 1 and "MISS losses aligned.sum.out.loss" in text and "MISS losses random" not in text


def test_results_that_a_check_leaves_unread_are_skipped_rows(tmp_path):
    np.savez(
        tmp_path / "gpo.npz", **{"in.x": np.ones(1), "out.a": np.ones(1), "s.out": np.ones(1), "out.c": np.ones(1)}
    )
    fixture = Fixture(tmp_path / "gpo.npz")
    fixture["out.a"]
    rows = unread(tmp_path, [fixture], told={"out.c"})
    assert rows == [skip("gpo", "s.out", "gpo.npz: its check does not read them")]


@pytest.mark.slow
def test_gpo_equals_the_oracle_through_torch_s_layout(tmp_path, capsys):
    """gpo.npz as if recorded: values by the float64 oracle; gradients by the model itself, turned back."""
    rng, slots = np.random.default_rng(0), gpo_slots("")
    params = {name: rng.normal(0.0, 0.3, (96,) if "bias" in name else (96, 32)) for name in slots}
    params["linear.weight"] = rng.normal(0.0, 0.3, (1, 32))
    params = {name: array.astype(np.float32) for name, array in params.items()}
    ours = gpo_params(params)
    arrays = {f"param.{name}": array for name, array in params.items()}
    arrays["out.positional_encoding_32x40"] = np.stack([oracle.sinusoid(k, 32) for k in range(40)])
    for case, lengths in (("", [4, 1, 3]), ("short.", [2, 1, 2])):
        features, cotangent = rng.normal(size=(3, 4, 2)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
        mask = np.arange(4) < np.array(lengths)[:, None]
        weights = [oracle.gpo_weights(length, ours) for length in lengths]
        pooled = [oracle.pool(f[: len(w)].astype(np.float64), w) for f, w in zip(features, weights, strict=True)]
        padded = np.stack([np.pad(w, (0, max(lengths) - len(w))) for w in weights])

        def along(params, features, mask=mask, cotangent=cotangent):
            return jnp.vdot(GPO().apply({"params": params}, features, mask), cotangent)

        d_params, d_features = jax.jit(jax.grad(along, argnums=(0, 1)))(ours, features)
        recorded = {"in.features": features, "in.lengths": np.array(lengths), "in.cotangent": cotangent}
        recorded |= {"out.pool_weights": padded[..., None], "out.pooled": np.stack(pooled)}
        recorded["grad.in.features"] = d_features
        flat = traverse_util.flatten_dict(d_params)
        for name, slot in slots.items():
            turned = np.asarray(flat[slot.path])
            recorded[f"grad.param.{name}"] = turned[None] if slot.squeeze else turned.T
        arrays |= {case + name: np.asarray(array) for name, array in recorded.items()}
    np.savez(tmp_path / "gpo.npz", **arrays)
    assert main(tmp_path, ("gpo",)) == 0
    assert capsys.readouterr().out.endswith("25 arrays compared, 0 skipped, 0 missed\n")


def test_nothing_compared_is_no_success(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **{"out.a": np.zeros(1)})
    assert main(tmp_path, ()) == 1
    assert "0 arrays compared, 1 skipped" in capsys.readouterr().out


def test_missing_folder_and_file_are_named(tmp_path, capsys):
    assert main(tmp_path / "nowhere", ("gpo",)) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert main(tmp_path, ("gpo",)) == 2
    assert "holds no .npz recordings" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", **{"out.a": np.zeros(1)})
    assert main(tmp_path, ("losses", "gpo")) == 2
    assert "losses.npz is missing; the other checks: --only gpo" in capsys.readouterr().err


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "tests.parity", str(tmp_path / "nowhere"), "--only", "gpo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "nowhere is not a folder" in done.stderr


def test_compare_allows_atol_plus_rtol_of_the_reference():
    reference = np.array([0.0, 100.0])
    assert compare("g", "n", [0.009, 100.9], reference, atol=0.01, rtol=0.01).ok
    row = compare("g", "n", [0.011, 100.0], reference, atol=0.01, rtol=0.01)
    assert not row.ok and row.error == pytest.approx(0.011) and row.worst == pytest.approx(1.1)
    assert not compare("g", "n", [0.0, 101.02], reference, atol=0.01, rtol=0.01).ok
    assert not compare("g", "n", [0.0, np.inf], reference, atol=0.01, rtol=0.01).ok
    assert not compare("g", "n", reference, [0.0, np.nan], atol=0.01).ok


def test_compare_allows_ten_times_the_rounding_of_the_reference():
    reference = np.array([0.0, 100.0])
    assert compare("g", "n", [0.9, 100.9], reference, atol=0.01, rounding=0.1).ok
    assert not compare("g", "n", [1.1, 100.0], reference, atol=0.01, rounding=0.1).ok
    assert compare("g", "n", [0.0, 101.9], reference, atol=0.01, rtol=0.02, rounding=0.1).ok
    assert compare_gradient("g", "n", [100.0, 0.9], [100.0, 0.0], rounding=0.1).ok
    assert not compare_gradient("g", "n", [100.0, 1.1], [100.0, 0.0], rounding=0.1).ok


def test_the_rounding_of_a_recording_is_that_of_the_array(tmp_path):
    np.savez(tmp_path / "f.npz", **{"out.a": np.ones(2), "ref_err.out.a": np.float32(0.5), "out.b": np.ones(2)})
    fixture = Fixture(tmp_path / "f.npz")
    assert fixture.rounding("out.a") == 0.5 and fixture.rounding("out.b") == 0.0


def test_an_update_strays_only_where_its_gradients_are_within_their_rounding():
    """Each update of AdamW from gradients with errors is within the bound, which is large for small gradients alone."""
    rng, steps, d = np.random.default_rng(0), 3, adamw.GRADIENT_ROUNDING
    gradients = rng.choice([-1.0, 1.0], (steps, 4, 64)) * 10.0 ** rng.uniform(-7, 0, (4, 64))
    gradients[:, :, 0], gradients[:, 0], gradients[:, :, 7] = 1.0, 1.0, 0.0  # scales of rows and columns; no gradient
    tx = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    update_of = jax.jit(tx.update)

    def run(gradients):
        state, updates, slacks = tx.init(jnp.zeros((4, 64))), [], []
        for number, given in enumerate(np.asarray(gradients, np.float32), 1):
            update, state = update_of(given, state)
            updates.append(np.asarray(update, np.float64))
            slacks.append(adamw.slack(state, number, slacks[-1] if slacks else None))
        return np.stack(updates), np.diff(slacks, axis=0, prepend=0.0)

    exact, bounds = run(gradients)
    errors = rng.choice([-d, d], (40, *gradients.shape)) * (gradients != 0)
    strays = np.max([np.abs(run(gradients + error)[0] - exact) for error in errors], axis=0)
    assert (strays <= bounds + 1e-5).all() and bounds.max() <= 2.0 and (bounds[:, :, 7] == 0).all()
    size = np.abs(gradients)
    assert bounds[size > 1e3 * d].max() < 0.003 and strays[(size < d / 10) & (size > 0)].max() > 1.0


def test_rounding_is_that_of_the_row_or_column():
    """Gradients of an input that is small throughout are as exact as others."""
    gradient = np.float32([[1.0, 1.0], [1e-5, 1e-5]])
    for given in (gradient, gradient.T):
        state = optax.scale_by_adam().update(given, optax.scale_by_adam().init(given))[1]
        assert adamw.slack(state, 1).max() < 0.01


def test_tolerance_of_a_parameter():
    slack = np.array([0.0, 0.1, 6.0])
    found = adamw.tolerance(1e-3, 2, slack, rounding=0.0, zero_gradient=False)
    np.testing.assert_allclose(found, [2e-4, 3e-4, 4e-3])  # a fifth of the rate, and the slack, up to two rates a step
    found = adamw.tolerance(1e-3, 2, slack, rounding=5e-5, zero_gradient=False)
    np.testing.assert_allclose(found, [5e-4, 6e-4, 4e-3])
    assert adamw.tolerance(1e-3, 2, slack, rounding=1.0, zero_gradient=True) == 2e-3


def test_compare_of_equal_and_of_empty_arrays():
    exact = compare("g", "n", [1, 2], [1, 2], atol=0.0)
    assert exact.ok and exact.worst == 0.0
    assert not compare("g", "n", [1, 2], [1, 3], atol=0.0).ok
    assert compare("g", "n", np.zeros((0, 3)), np.zeros((0, 3)), atol=0.0).skipped == "empty array"
    assert not compare("g", "n", np.zeros(3), np.zeros((0, 3)), atol=0.0).ok


def test_gradients_are_compared_on_their_own_scale():
    reference = np.array([1000.0, 0.0])
    assert compare_gradient("g", "n", [1000.0, 0.9], reference).ok
    assert not compare_gradient("g", "n", [1000.0, 1.1], reference).ok
    assert not compare_gradient("g", "n", [1e-5, 0.0], np.zeros(2)).ok


def test_a_skipped_row_is_no_miss():
    assert skip("g", "n", "why").ok


def test_fixture_remembers_what_was_read(tmp_path):
    np.savez(
        tmp_path / "f.npz", **{"in.x": np.ones(1), "out.a": np.ones(2), "s.out.b": np.ones(3), "meta.out.c": np.ones(1)}
    )
    fixture = Fixture(tmp_path / "f.npz")
    assert fixture.expected() == {"out.a", "s.out.b"} and not fixture.seen
    assert fixture.section("s.out.")["b"].shape == (3,)
    assert fixture.expected() - fixture.seen == {"out.a"}
    with pytest.raises(KeyError, match=r"f: no array starts with 'grad\.'"):
        fixture.section("grad.")
