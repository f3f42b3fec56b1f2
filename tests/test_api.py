"""The names of `import shnet_jax`: training, evaluation and search in a few lines."""

from __future__ import annotations

import pytest

import shnet_jax
from tests.retrieve import gallery
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def test_names():
    names = {"load", "train", "evaluate", "study", "open_dataset", "get_config", "Retriever", "__version__"}
    assert {*dir(shnet_jax)} == names and all(getattr(shnet_jax, name) for name in names)
    assert shnet_jax.get_config("demo").name == "3SHNet region"
    with pytest.raises(ValueError, match="did you mean demo"):
        shnet_jax.train("dem", "runs/none")


def test_numbers_of_a_run():
    """Training that is finished gives its validation result again; an evaluation needs the work folder alone."""
    trained = shnet_jax.train(gallery.toy(), gallery.toy_run())
    assert repr(trained).startswith("Results(val: image to text R@1/5/10 ") and "rSum" in repr(trained)
    evaluated = shnet_jax.evaluate(gallery.toy_run(), split="val")
    assert evaluated.metrics == pytest.approx(trained.metrics, abs=1e-4)
    page = evaluated._repr_html_()
    assert page.count("<tr>") == 3 and f"<td>{evaluated.metrics['rsum']:.1f}</td>" in page and ">chance<" in page
    assert shnet_jax.evaluate(gallery.toy_run()).card["split"] == "test"


def test_what_a_notebook_shows():
    model = shnet_jax.load(gallery.toy_run())
    assert repr(model) == "Retriever('3SHNet region': model tests.train.toy, step 2, on tiny)"
    answer = model.search("a <b>red</b> star", top_k=3)[0]
    first = answer.hits[0]
    assert repr(answer) == f"Answer('a <b>red</b> star': 3 images, first {first.image_id!r} with {first.score:.3f})"
    page = answer._repr_html_()
    assert page.count("<tr>") == 4 and all(hit.image_id in page for hit in answer.hits)
