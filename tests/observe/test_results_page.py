"""The results as a page: what the Markdown says, escaped, and shown by a real browser without complaint."""

from __future__ import annotations

import re

import numpy as np
import pytest

from shnet_jax.evaluation.bootstrap import recall_intervals
from shnet_jax.evaluation.protocols import Provenance, evaluate
from shnet_jax.evaluation.report import card_table, interval_table, table
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.results_page import results_page
from shnet_jax.observe.table import Table
from shnet_jax.types import Embedding
from tests.browser import HOSTILE, look_at, needs_browser

EVIL = "<script>document.title='owned'</script>\"|&"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two rows, one of which has a name that would be a program if it were not escaped."""
    rng = np.random.default_rng(0)
    sides = [Embedding(rng.normal(size=(n, 4)).astype(np.float32)) for n in (20, 40)]
    actual = evaluate(
        *sides, np.arange(40) // 2, RetrievalModel.score, provenance=Provenance(dataset=EVIL, split="test")
    )
    arms = {f"two-stage 50, {EVIL}": actual, " ".join(HOSTILE): actual}
    assert actual.queries is not None
    intervals = interval_table({name: recall_intervals([actual.queries]) for name in arms})
    path = tmp_path_factory.mktemp("results") / "results.html"
    cards = [card_table(actual.card, name) for name in arms]
    path.write_text(results_page(f"Results of {EVIL}", [table(arms), intervals], cards), "utf-8")
    return path


def test_everything_is_there_and_escaped(path):
    text = path.read_text("utf-8")
    assert not re.findall(r"<(?:script|img|link|a|iframe)\b", text)
    assert text.count("&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;&quot;|&amp;") >= 6
    for wanted in (
        "Recall in per cent",
        "image to text R@1",
        "chance (20 images, 40 captions)",
        "95 % intervals",
        "<bdi>ties<",
    ):
        assert wanted in text, wanted
    assert re.findall(r"<details( open)?><summary><bdi>Protocol card of", text) == [" open", ""]
    assert text.count('<th scope="row"><bdi>rSum') == 2  # few names and many numbers: a line for each number
    assert len(re.findall(r"\d\.\d \[\d+\.\d, \d+\.\d\]", text)) == 2 * 7


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_it_without_a_word_of_complaint(path, tmp_path):
    seen = look_at(path, tmp_path)
    assert not seen.console and seen.title == f"Results of {EVIL}" and {"table", "details"} <= {*seen.tags}
    assert not {"script", "img", "a"} & {*seen.tags}
    for text in HOSTILE:
        assert " ".join(text.replace("\0", "\ufffd").split()) in " ".join(seen.text.split()), text


def test_a_table_as_text_keeps_its_columns():
    lines = str(Table("t", ["", "n|m"], [["a | b", "1"], ["c", "10"]])).splitlines()
    assert lines == ["|        | n\\|m |", "| ------ | ---: |", "| a \\| b |    1 |", "| c      |   10 |"]
    plain = Table("t", ["", "n"], [["a | b", "1"], ["c", "10"]]).plain()
    assert plain.splitlines() == ["        n", "a | b   1", "c      10"]
