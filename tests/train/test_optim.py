"""The optimiser against AdamW written in NumPy, its groups, its schedules."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from configs import base
from shnet_jax.training.optim import make_optimiser, schedule

LEAVES = {
    "model/image/linear/kernel": (4, 3),
    "model/image/linear/bias": (3,),
    "model/text/tower/layer_0/kernel": (3, 3),
    "model/text/tower/layer_1/kernel": (3, 3),
    "model/text/tower/words": (5, 2),
    "model/text/head/kernel": (3, 2),
    "loss/infonce/log_scale": (),
}


def tree(flat):
    nested = {}
    for name, value in flat.items():
        *sections, last = name.split("/")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = np.float32(value)
    return nested


def flat(nested):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nested)
    }


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.normal(size=shape)) for name, shape in LEAVES.items()}


def configuration(**changes):
    c = base.get_config()
    c.optim.update({"lr": 0.01, "weight_decay": 0.3, "text_lr_factor": 0.25, "clip_norm": 2.0, "schedule": "constant"})
    c.text.frozen_layers = changes.pop("frozen_layers", 0)
    c.optim.update(changes)
    return c


def run(config, grads, rate=None):
    tx = make_optimiser(config, rate or schedule(config, 10, 100))

    @jax.jit
    def descend(params, gradients):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return flat(descend(tree(draw(0)), [tree(gradient) for gradient in grads]))


def adamw(config, grads, rate):
    """Loshchilov and Hutter 2019, algorithm 2, with clipping by the global norm; float64."""
    o = config.optim
    params = {name: np.float64(value) for name, value in draw(0).items()}
    first, second = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for step, gradient in enumerate(grads, 1):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = np.float64(g) * min(1.0, o.clip_norm / norm if o.clip_norm else 1.0)
            first[name] = o.b1 * first[name] + (1 - o.b1) * g
            second[name] = o.b2 * second[name] + (1 - o.b2) * g**2
            direction = first[name] / (1 - o.b1**step) / (np.sqrt(second[name] / (1 - o.b2**step)) + 1e-8)
            if o.decay_all or g.ndim > 1:
                direction = direction + o.weight_decay * params[name]
            lr = rate(step - 1) * (o.text_lr_factor if "/tower/" in name else 1.0)
            params[name] = params[name] - lr * direction
    return params


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_against_adamw(decay_all, clip_norm):
    config = configuration(decay_all=decay_all, clip_norm=clip_norm)
    # The second gradient is within the norm, the others are clipped.
    grads = [draw(1), draw(2, 0.05), draw(3, 4.0)]
    rate = lambda step: 0.01 / (1 + step)  # noqa: E731
    expected = adamw(config, grads, rate)
    for name, value in run(config, grads, rate).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_text_tower_is_slower_and_its_head_is_not():
    fast, slow = (run(configuration(text_lr_factor=factor), [draw(1)]) for factor in (1.0, 0.25))
    for name, start in draw(0).items():
        factor = 0.25 if name.startswith("model/text/tower/") else 1.0
        np.testing.assert_allclose(slow[name] - start, factor * (fast[name] - start), rtol=1e-4, atol=1e-7)


def test_frozen_layers_do_not_even_decay():
    found = run(configuration(frozen_layers=1), [draw(1), draw(2)])
    same = {name for name, start in draw(0).items() if (found[name] == start).all()}
    assert same == {"model/text/tower/words", "model/text/tower/layer_0/kernel"}


@pytest.mark.slow
def test_accumulated_gradients_are_averaged():
    first, second = draw(1), draw(2)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    once = run(configuration(), [mean])
    twice = run(configuration(accumulate=2), [first, second])
    halfway = run(configuration(accumulate=2), [first])
    for name, start in draw(0).items():
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(halfway[name], start)


def test_a_norm_that_is_known_is_taken_unless_several_batches_make_an_update():
    gradient, params = tree(draw(1)), tree(draw(0))
    twice = 2 * optax.global_norm(gradient)
    for accumulate, factor in ((1, 0.5), (2, 1.0)):
        config = configuration(accumulate=accumulate, weight_decay=0.0, b1=0.0)
        tx = make_optimiser(config, schedule(config, 10, 100))
        state = tx.init(params)
        for _ in range(accumulate):
            _, state = tx.update(gradient, state, params, grad_norm=twice)
        clipped = state.inner_opt_state[1].mu if accumulate > 1 else state[1].mu
        expected = factor * config.optim.clip_norm
        np.testing.assert_allclose(optax.global_norm(clipped), expected, rtol=1e-5)


def rates(steps, **changes):
    rate = schedule(configuration(lr=0.5, **changes), 10, 40)
    return jax.jit(jax.vmap(rate))(np.array([*steps]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, {0: 0.5, 7: 0.5, 39: 0.5}),
        (
            {"schedule": "step", "decay_epochs": (1.0, 2.5), "decay_factor": 0.1},
            {0: 0.5, 9: 0.5, 10: 0.05, 24: 0.05, 25: 0.005, 39: 0.005},
        ),
        ({"schedule": "cosine"}, {s: 0.25 * (1 + np.cos(np.pi * s / 40)) for s in (0, 10, 39, 40)}),
    ],
    ids=["constant", "step", "cosine"],
)
def test_schedule(options, expected):
    np.testing.assert_allclose(rates(expected, **options), [*expected.values()], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["constant", "step", "cosine"])
def test_warm_up(kind):
    """Linear from 0; then the schedule, whose epochs are counted from the start of training."""
    found = rates([0, 1, 4, 5, 19, 20], schedule=kind, warmup_epochs=0.5, decay_epochs=(2.0,))
    after = {
        "constant": [0.5, 0.5, 0.5],
        "step": [0.5, 0.5, 0.05],
        "cosine": [0.25 * (1 + np.cos(np.pi * step / 35)) for step in (0, 14, 15)],
    }[kind]
    np.testing.assert_allclose(found, [0.0, 0.1, 0.4, *after], rtol=1e-5)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'linear'; choose step, cosine or constant"):
        rates([0], schedule="linear")


def test_lion_is_the_published_rule():
    """Chen et al. 2023, algorithm 2, with decay on everything; float64."""
    config = configuration(name="lion", b1=0.9, b2=0.99, clip_norm=0.0, text_lr_factor=1.0)
    grads, o = [draw(seed, scale=3.0) for seed in (1, 2, 3)], config.optim
    params = {name: np.float64(value) for name, value in draw(0).items()}
    average = {name: np.zeros_like(value) for name, value in params.items()}
    for gradient in grads:
        for name, g in gradient.items():
            direction = np.sign(o.b1 * average[name] + (1 - o.b1) * np.float64(g)) + o.weight_decay * params[name]
            params[name] = params[name] - o.lr * direction
            average[name] = o.b2 * average[name] + (1 - o.b2) * np.float64(g)
    for name, ours in run(config, grads).items():
        np.testing.assert_allclose(ours, params[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match=r"config\.optim\.name is 'sgd'; choose from adamw, lion"):
        run(configuration(name="sgd"), [])
