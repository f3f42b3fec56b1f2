"""The six commands of docs/frozen-features.md, as they stand there, on a few made vectors; and queries in words."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shnet_jax
from configs import align
from data_prep import encode_captions, from_vectors
from shnet_jax.modes.search import search
from shnet_jax.training.loop import train_and_evaluate
from tests.data_prep.test_from_vectors import folders
from tests.interop.test_sentence_vectors import bert
from tests.patience import PATIENCE
from tests.train import tiny

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "frozen-features.md").read_text("utf-8")
COMMANDS = re.search(r"## From vectors to search\n\n```bash\n(.*?)```", TEXT, re.S)[1].splitlines()
TINY = ["--config.train.batch_size=16", "--config.train.steps=6", "--config.model.dim=8", "--config.eval.batch_size=8"]


def made(folder):
    """Vectors of images and texts that say the same, with a query for each of the last 4 images."""
    rng = np.random.default_rng(1)
    folders(folder / "vectors", images=(30, 34), texts=(60, 68), dtype=np.float32)
    hidden = rng.normal(size=(64, 4))
    for name, rows, width in (("images", hidden, 3), ("texts", np.tile(hidden, (2, 1)), 2)):
        for path in (folder / "vectors" / name).iterdir():
            path.unlink()
        np.save(folder / "vectors" / name / "all.npy", (rows @ rng.normal(size=(4, width))).astype(np.float32))
    (folder / "texts.txt").write_text("".join(f"p5 p{6 + i % 9}\n" for i in range(128)))
    np.save(folder / "queries.npy", np.load(folder / "vectors" / "texts" / "all.npy")[60:64])


@pytest.mark.slow
def test_from_vectors_to_search_in_six_commands(tmp_path):
    assert len(COMMANDS) == 6
    made(tmp_path)
    for command in COMMANDS:
        words = shlex.split(command.replace("--val=1000", "--val=8"))
        assert words[0] == "shnet"
        changes = TINY if words[1] == "train" else []
        run = [sys.executable, "-m", "shnet_jax", *words[1:], *changes]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    results = json.loads((tmp_path / "runs" / "frozen" / "search.json").read_text())["results"]
    assert [len(result["hits"]) for result in results] == [3] * 4
    assert results[0]["query"] == "queries.npy row 0" and results[0]["hits"][0]["image_id"].isdecimal()


@pytest.mark.slow
def test_words_go_through_the_model_that_made_the_vectors(tmp_path):
    made(tmp_path)
    vectors = [tmp_path / "vectors" / name for name in ("images", "texts")]
    from_vectors.import_vectors(vectors[:1], vectors[1:], "v", tmp_path, captions=tmp_path / "texts.txt", val=8)
    folder = bert(tmp_path / "bert")
    argv = [
        str(tmp_path / "v"),
        f"--text_encoder={folder}",
        "--name=words",
        f"--out={tmp_path}",
        "--text_dtype=float32",
    ]
    assert encode_captions.main(argv) == 0
    c = align.get_config("small")
    c.data.dir = str(tmp_path / "words")
    c.model.dim, c.train.batch_size, c.train.steps, c.eval.batch_size = 8, 16, 2, 8
    c.search.split, c.parallel.devices = "val", 1
    with tiny.quick():
        train_and_evaluate(c, tmp_path / "run")
    model = shnet_jax.load(tmp_path / "run", config=c)
    captions = next(iter(model.dataset.captions("val")))
    assert len(captions) == 2
    encoded = model.encode_texts(captions).vector
    hits = model.search(captions[0], split="val", top_k=8)[0].hits
    stored = next(iter(model.dataset.open_split("val", ("caption_embeddings",))))["caption_embeddings"]
    np.save(tmp_path / "q.npy", stored)
    search(c, tmp_path / "run", query_vectors=str(tmp_path / "q.npy"), top_k=8)
    by_vector = json.loads((tmp_path / "run" / "search.json").read_text())["results"][0]["hits"]
    np.testing.assert_allclose([hit["score"] for hit in by_vector], [hit.score for hit in hits], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, rtol=1e-5)
    (folder / "model.safetensors").rename(folder / "gone")
    with pytest.raises(ValueError, match=r"expected a row for each of 1 queries, found 2"):
        search(c, tmp_path / "run", query="one", query_vectors=str(tmp_path / "q.npy"))
    np.save(tmp_path / "q.npy", stored[:, :3])
    with pytest.raises(ValueError, match=r"expected floats \[queries, 8\] as caption_embeddings .* found .* \[2, 3\]"):
        search(c, tmp_path / "run", query_vectors=str(tmp_path / "q.npy"))
