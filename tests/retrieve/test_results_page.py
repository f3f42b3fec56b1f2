"""The results as a page: what the Markdown says, escaped, and shown by a real browser without complaint."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from shnet_jax.evaluate.bootstrap import recall_intervals
from shnet_jax.evaluate.protocols import Subject, evaluate
from shnet_jax.evaluate.report import Table, card_table, interval_table, table
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.retrieve.results_page import results_page
from shnet_jax.types import Embedding

EVIL = "<script>document.title='owned'</script>\"|&"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two rows, one of which has a name that would be a program if it were not escaped."""
    rng = np.random.default_rng(0)
    sides = [Embedding(rng.normal(size=(n, 4)).astype(np.float32)) for n in (20, 40)]
    found = evaluate(*sides, np.arange(40) // 2, RetrievalModel.score, subject=Subject(dataset=EVIL, split="test"))
    arms = {f"two-stage 50, {EVIL}": found, "exact": found}
    assert found.queries is not None
    intervals = interval_table({name: recall_intervals([found.queries]) for name in arms})
    path = tmp_path_factory.mktemp("results") / "results.html"
    cards = [card_table(found.card, name) for name in arms]
    path.write_text(results_page(f"Results of {EVIL}", [table(arms), intervals], cards), "utf-8")
    return path


def test_everything_is_there_and_escaped(path):
    text = path.read_text("utf-8")
    assert "<script" not in text and "http" not in text and "src=" not in text
    assert text.count("&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;&quot;|&amp;") >= 6
    for wanted in ("Recall in per cent", "i→t R@1", "chance (20 images, 40 captions)", "95 % intervals", ">ties<"):
        assert wanted in text, wanted
    assert re.findall(r"<details( open)?><summary>", text) == [" open", ""]
    assert len(re.findall(r"\d\.\d \[\d+\.\d, \d+\.\d\]", text)) == 2 * 7


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_it(path, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [str(BROWSER), *flags, f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr and "<title>Results of &lt;script&gt;" in done.stdout


def test_a_table_as_text_keeps_its_columns():
    lines = str(Table("t", ["", "n|m"], [["a | b", "1"], ["c", "10"]])).splitlines()
    assert lines == ["|        | n\\|m |", "| ------ | ---: |", "| a \\| b |    1 |", "| c      |   10 |"]
