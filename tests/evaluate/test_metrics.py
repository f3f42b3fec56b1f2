import numpy as np
import pytest

from shnet_jax.evaluation.metrics import chance, mean, recalls
from shnet_jax.evaluation.ranks import Ranks


def test_numbers_by_hand():
    found = recalls(Ranks(np.array([0, 1, 4, 9]), np.array([0, 0, 5, 10, 20])))
    assert found == pytest.approx(
        {
            "i2t_r1": 25, "i2t_r5": 75, "i2t_r10": 100, "i2t_medr": 3, "i2t_meanr": 4.5,
            "t2i_r1": 40, "t2i_r5": 40, "t2i_r10": 60, "t2i_medr": 6, "t2i_meanr": 8,
            "rsum": 340,
        }
    )  # fmt: skip


def test_folds_average_every_number():
    assert mean([{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 8.0}]) == {"a": 1.5, "b": 6.0}


@pytest.mark.parametrize("counts", [[1] * 12, [5] * 8, [1, 2, 6, 3, 3, 5, 1], [4]])
def test_chance_is_the_mean_over_random_orders(counts):
    rng, n, t = np.random.default_rng(0), len(counts), sum(counts)
    first = np.cumsum([0, *counts[:-1]])
    # Position of each item in a random list; the lists of different queries are independent in the mean.
    i2t = np.stack([np.minimum.reduceat(rng.permutation(t), first) for _ in range(20_000)])
    t2i = rng.integers(0, n, 100_000)
    simulated, exact = recalls(Ranks(i2t.ravel(), t2i)), chance(np.array(counts))
    for name, value in exact.items():
        tolerance = 2.5 if name == "rsum" else 1.0 if "_r" in name else 0.1
        if "medr" not in name:
            assert simulated[name] == pytest.approx(value, abs=tolerance), name
    assert exact["i2t_medr"] == simulated["i2t_medr"]


def test_chance_of_a_large_gallery():
    found = chance(np.full(1000, 5))
    assert found["i2t_r1"] == pytest.approx(0.1)
    assert found["t2i_r10"] == pytest.approx(1.0)
    assert found["t2i_medr"] == 500
    assert found["t2i_meanr"] == pytest.approx(500.5)
    assert found["i2t_meanr"] == pytest.approx(5001 / 6)
