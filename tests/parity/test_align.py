"""The check of heads on frozen features, on a recording made here by the float64 oracle."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from tests.losses.oracle import gradient, sigmoid_matrix, unit
from tests.models.test_align import oracle
from tests.parity import align
from tests.parity.__main__ import main

N, WIDTHS, DIM, FACTOR = 4, {"image": 3, "text": 2}, 2, 2
HIDDEN = {"star": {"f1": FACTOR, "f2": FACTOR, "g": -FACTOR}, "mlp": {"in": 4, "out": -4}, "linear": {"proj": 0}}


def layer(rng, inputs, outputs):
    return {"kernel": rng.normal(size=(inputs, outputs)) / 2, "bias": rng.normal(size=outputs)}


def head(rng, kind, width):
    """A head's parameters; its layers lead from the vector or from a hidden layer, a negative factor of the width."""
    params = {"norm": {"scale": 1 + rng.normal(size=width) / 4, "bias": rng.normal(size=width)}}
    for name, factor in HIDDEN[kind].items():
        params[name] = layer(rng, width if factor >= 0 else -factor * width, factor * width if factor > 0 else DIM)
    return params


def value(kind, arrays):
    """Everything recorded of a case from our parameters and inputs by path."""
    images = oracle(kind, arrays["image"]["head"], arrays["in"]["image_features"])
    scale, bias = np.exp(arrays["logit_scale"][0]), arrays["logit_bias"][0]
    texts = [oracle(kind, arrays["text"]["head"], x) for n, x in arrays["in"].items() if n != "image_features"]

    def loss(*texts):
        rows = np.stack(texts, axis=1).reshape(-1, DIM)
        options = {"scale": scale, "bias": bias, "mask": False, "reduction": "pairs"}
        return np.float64(sigmoid_matrix(unit(images) @ unit(rows).T, range(N), **options))

    found = {"image_embedding": images, "text_embedding": texts[0], "loss": loss(*texts)}
    return found | ({"extra_loss": loss(texts[1])} if len(texts) > 1 else {})


def replaced(tree, path, array):
    if not path:
        return array
    return tree | {path[0]: replaced(tree[path[0]], path[1:], array)}


@functools.cache
def recording():
    rng, out = np.random.default_rng(0), {"meta.width_factor": np.int64(FACTOR)}
    for kind in align.KINDS:
        for case in align.CASES:
            inputs = {f"{name}_features": rng.normal(size=(N, width)) for name, width in WIDTHS.items()}
            if case == "extra":
                inputs["extra_text_features"] = rng.normal(size=(N, WIDTHS["text"]))
            arrays = {"in": inputs} | {name: {"head": head(rng, kind, width)} for name, width in WIDTHS.items()}
            arrays |= {"logit_scale": np.array([1.5]), "logit_bias": np.array([-2.0])}
            places = {f"param.{name}": (slot.path, slot) for name, slot in align.slots(kind).items()}
            places |= {f"in.{name}": (("in", name), None) for name in inputs}
            places |= {f"param.{name}": ((name,), None) for name in align.LEARNED}
            for name, result in value(kind, arrays).items():
                out[f"{kind}.{case}.out.{name}"] = result
            for name, (path, slot) in places.items():
                array = functools.reduce(lambda tree, part: tree[part], path, arrays)

                def loss(x, path=path, arrays=arrays, kind=kind):
                    return value(kind, replaced(arrays, path, x))["loss"]

                for kept, ours in ((name, array), (f"grad.{name}", gradient(loss, array))):
                    out[f"{kind}.{case}.{kept}"] = ours.T if slot is not None and ours.ndim == 2 else ours
    return jax.tree.map(np.float32, out)


def run(folder, capsys, **changed):
    np.savez(folder / "align.npz", **recording() | changed)
    status = main(folder, ("align",))
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_the_oracle_s_recording_passes(tmp_path, capsys):
    status, text = run(tmp_path, capsys)
    assert status == 0 and text.endswith("120 arrays compared, 0 skipped, 0 missed\n"), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["star.extra.out.loss", "mlp.plain.grad.param.logit_bias"])
def test_another_recording_is_a_miss(tmp_path, capsys, name):
    status, text = run(tmp_path, capsys, **{name: recording()[name] * np.float32(1.01)})
    assert status == 1 and f"MISS heads on frozen features {name}" in text and "1 missed" in text


def test_the_reference_s_own_error_is_found_behind_the_name_of_its_case(tmp_path):
    np.savez(tmp_path / "align.npz", **{"star.plain.out.loss": 1.0, "star.plain.ref_err.out.loss": 0.25})
    fixture = align.Fixture(tmp_path / "align.npz")
    assert fixture.rounding("star.plain.out.loss") == 0.25 and fixture.expected() == {"star.plain.out.loss"}
