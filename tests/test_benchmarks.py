"""The benchmarks run and say what their README documents; the published model's operations are counted right."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import (
    embed,
    flops,
    interaction,
    losses,
    memory,
    momentum,
    pool,
    published,
    ranking,
    resident,
    runner,
    stage_one,
    step,
    text,
)
from benchmarks.rows import Row, compare, table
from benchmarks.timing import Timing, interleave
from configs import base
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.ranks import Ranks
from shnet_jax.models import shnet
from shnet_jax.types import WARM_UP, Array

DOCUMENTED = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_a_run_writes_what_is_documented(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "QUICK", pool.Sizes(sets=2, members=5, channels=8, rounds=1))
    monkeypatch.setattr(losses, "QUICK", losses.Sizes(pairs=(16,), dim=4, rounds=1))
    monkeypatch.setattr(losses, "LOSSES", ("infonce",))
    monkeypatch.setattr(losses, "ONE_DEVICE", ("streamed",))
    monkeypatch.setattr(losses, "_with_devices", lambda sizes: losses.measure(sizes, losses.SEVERAL_DEVICES, 4))
    out = tmp_path / "new" / "results.json"
    assert runner.main(["--only=pool,losses", "--quick", f"--out={out}"]) == 0
    actual = json.loads(out.read_text(encoding="utf-8"))
    assert set(actual) == {"machine", "quick", "seconds", "rows"} and actual["quick"] is True
    assert set(actual["seconds"]) == {"pool", "losses"}
    for name in [*actual, *actual["machine"], *actual["rows"][0]]:
        assert f"`{name}`" in DOCUMENTED, name
    assert len(actual["rows"]) == 4 + 2
    for row in actual["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        speed, reference = (row[f"{of}work"] / row[f"{of}seconds"] for of in ("", "reference_"))
        assert row["ratio"] == pytest.approx(speed / reference) and row["ratio"] > 0
        assert 0 < row["best_seconds"] <= row["seconds"] and row["rounds"] == 1
        assert row["benchmark"] == "pool" or row["memory_bytes"] > 0
    printed = capsys.readouterr().out
    assert "| losses | infonce, ring, 16 pairs, D 4, 4 virtual CPU devices |" in printed and str(out) in printed


@pytest.mark.slow
def test_two_stages_are_compared_by_what_their_candidates_hold():
    sizes = dataclasses.replace(stage_one.QUICK, candidates=stage_one.QUICK.images)
    rows = stage_one.run(sizes)
    assert [" by global vectors" in row.what for row in rows] == [True, False]
    assert all(row.ratio > 0 and "hold 100.0% of the exact first 10" in row.note for row in rows)
    (of_few, _) = stage_one.run(dataclasses.replace(sizes, candidates=2))
    assert "hold 100.0%" not in of_few.note


@pytest.mark.slow
def test_the_interaction_is_compared_in_pairs():
    score, stages = interaction.run(dataclasses.replace(interaction.QUICK, images=6, captions=12, dim=4))
    assert score.work == stages.work == 6 * 12 and score.ratio > 0 and stages.ratio > 0
    assert " of 72 pairs scored" in stages.what


def test_ranks_are_those_of_the_product(monkeypatch):
    monkeypatch.setattr(ranking, "peak_increase", lambda *_: None)
    sizes = ranking.Sizes(images=6, captions=18, dim=4, rounds=1)
    (row,) = ranking.run(sizes)
    assert row.ratio > 0
    calls, owner = ranking.contenders(sizes), ranking.owners(sizes)
    actual, scores = calls["ranks"](), calls["product"]()
    for query, wrong in (
        ("image 2", dataclasses.replace(actual, i2t=actual.i2t + (np.arange(6) == 2))),
        ("caption 7", dataclasses.replace(actual, t2i=actual.t2i + (np.arange(18) == 7))),
    ):
        with pytest.raises(RuntimeError, match=rf"{query} has rank \d+; by NumPy's scores \d+, or up to 0 more"):
            ranking.check_ranks(wrong, scores, owner)
    tied = np.float32([[0.5, 0.1], [0.5 + 1e-7, 0.9]])  # the first caption's images, if summed in another order
    for rank in (0, 1):
        ranking.check_ranks(Ranks(np.zeros(2, int), np.array([rank, 0])), tied, np.arange(2))
    with pytest.raises(RuntimeError, match="caption 0 has rank 2; by NumPy's scores 0, or up to 1 more by near ties"):
        ranking.check_ranks(Ranks(np.zeros(2, int), np.array([2, 0])), tied, np.arange(2))


def test_ranks_of_a_gallery_whose_scores_do_not_fit():
    """NumPy multiplies some of the images, and the ranks are checked by rows and columns of the scores."""
    sizes = ranking.Sizes(images=6, captions=18, dim=4, rounds=1, product=2)
    (row,) = ranking.run(sizes)
    assert (row.work, row.reference_work) == (6 * 18, 2 * 18) and "of 2 images" in row.reference
    calls, owner = ranking.contenders(sizes), ranking.owners(sizes)
    actual = calls["ranks"]()
    with pytest.raises(RuntimeError, match="caption 5 has rank"):
        ranking.check_ranks(dataclasses.replace(actual, t2i=actual.t2i + (owner == 5)), calls["scores"](), owner)


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "SHAPES", step.SHAPES | {"regions": (36, 8)})
    monkeypatch.setattr(step, "VOCABULARY", 20)
    monkeypatch.setattr("benchmarks.product.CPU_SIZES", (64,))
    monkeypatch.setattr(step, "QUICK", step.Sizes(pairs=2, tokens=3, images=2, layers=1, rounds=1))
    monkeypatch.setattr(text, "QUICK", text.Sizes(images=2, batch=4, layers=1, rounds=1))
    monkeypatch.setattr(pool, "QUICK", pool.Sizes(sets=2, members=5, channels=8, rounds=1))
    monkeypatch.setattr(losses, "QUICK", losses.Sizes(pairs=(8,), dim=4, devices=0, rounds=1))
    small = ranking.Sizes(images=4, captions=8, dim=4, rounds=1, product=2)
    monkeypatch.setattr(ranking, "QUICK", (small, dataclasses.replace(small, product=3)))
    monkeypatch.setattr(embed, "QUICK", embed.Sizes(batch=2, tokens=3, layers=1, rounds=1))
    find = importlib.util.find_spec  # PyTorch: see the test below
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    out = tmp_path / "gpu.json"
    assert runner.main(["--gpu", "--quick", f"--out={out}"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    measured = {row["benchmark"] for row in rows if row["ratio"]}
    assert measured == set(runner.ON_GPU) - {"published", "align"}
    assert all(row["note"].startswith("no PyTorch here") for row in rows if not row["ratio"])
    assert {row["what"].split(",")[0] for row in rows if row["benchmark"] == "losses"} == set(losses.LOSSES)
    assert len([row for row in rows if row["benchmark"] == "ranking"]) == 2
    assert {row["what"] for row in rows if row["benchmark"] == "embed"} == {
        f"2 {side} embedded, {dtype}" for side in ("images", "captions") for dtype in step.DTYPES
    }
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and page.count("\n| embed ") == 4


def test_after_its_time_a_gpu_run_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GPU_SECONDS", -1.0)
    out = tmp_path / "gpu.json"
    assert runner.main(["--gpu", "--only=step,pool", f"--out={out}"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["note"].split()[-1] for row in rows] == ["--only=step", "--only=pool"]


def test_the_formulas_in_pytorch_compute_the_same(monkeypatch):
    pytest.importorskip("torch")
    rows = published.run(published.QUICK)
    assert len(rows) == len(losses.LOSSES) + 1 and all(row.ratio > 0 for row in rows)
    monkeypatch.setattr(losses, "MARGIN", 0.3)
    with pytest.raises(RuntimeError, match=r"triplet, gathered, 64 pairs, D 32: .* in PyTorch"):
        published.run(published.QUICK)


def test_a_benchmark_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    def fail(sizes):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of | memory")

    monkeypatch.setattr(pool, "run", fail)
    monkeypatch.setattr(text, "run", lambda sizes: [Row("text", "captions", "padded", ratio=2.0)])
    out = tmp_path / "results.json"
    assert runner.main(["--only=pool,text", "--quick", f"--out={out}"]) == 1
    lost, measured = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert lost["benchmark"] == "pool" and lost["ratio"] is None and "RESOURCE_EXHAUSTED" in lost["note"]
    assert measured["ratio"] == 2
    output = capsys.readouterr()
    assert "| pool | did not run to its end |" in output.out and "failed: pool" in output.err


@pytest.mark.slow
def test_momentum_encoders_are_measured_against_the_step_without(monkeypatch):
    monkeypatch.setattr(step, "SHAPES", step.SHAPES | {"regions": (36, 8)})
    monkeypatch.setattr(step, "VOCABULARY", 20)
    (row,) = momentum.run(momentum.Sizes(pairs=2, tokens=3, layers=1, queues=(4096,), rounds=1))
    assert "queues of 4096 " in row.what and row.ratio > 0
    # Vectors of 1,024 numbers for images and captions, and a copy of the parameters.
    assert row.memory_bytes - row.reference_memory_bytes > 2 * 4096 * 1024 * 4


@pytest.mark.slow
def test_the_ring_is_measured_in_a_process_of_its_own():
    sizes = losses.Sizes(pairs=(8,), dim=4, devices=2, rounds=1)
    assert [row.what for row in losses._with_devices(sizes)] == [
        f"{loss}, ring, 8 pairs, D 4, 2 virtual CPU devices" for loss in losses.LOSSES
    ]


@pytest.mark.parametrize("only", ["pool,speed", ""])
def test_an_unknown_benchmark_is_told(only, capsys):
    with pytest.raises(SystemExit):
        runner.main([f"--only={only}"])
    assert "step,momentum,pool,ranking,losses,input,text,sets" in capsys.readouterr().err


def test_what_does_not_fit_is_told_and_compared_with_the_last_that_did(monkeypatch):
    sizes = losses.Sizes(pairs=(8, 16), dim=4, rounds=1)
    limit = losses.dense_program("infonce", 8, 4).memory * jax.device_count() / losses.FITS
    monkeypatch.setattr(losses, "LOSSES", ("infonce",))
    monkeypatch.setattr(losses.machine, "free_bytes", lambda: 1.01 * limit)
    monkeypatch.setattr(losses, "loss_program", lambda *_: losses.Program(16, lambda: None, 1))
    small, large = losses.measure(sizes, ("streamed",), 1)
    assert small.reference.endswith("8 pairs") and large.reference.endswith("8 pairs")
    assert small.note == "" and "16 pairs does not fit" in large.note
    assert (large.work, large.reference_work) == (256, 64)
    monkeypatch.setattr(losses.machine, "free_bytes", lambda: 0)
    assert all(row.ratio is None and "does not fit" in row.note for row in losses.measure(sizes, ("streamed",), 1))


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_plain_losses_and_those_of_the_library_agree(loss):
    plain = losses.dense_program(loss, 12, 6).call()
    (value, _), gradients = plain
    program = losses.loss_program(loss, "gathered", 12, 6, 1)
    own_gradients, (terms, _) = program.call()
    np.testing.assert_allclose(terms[f"{loss}_loss"][0], value, rtol=1e-5)
    for own, other in zip(own_gradients, gradients, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    assert (WARM_UP in program.call.func.as_text()) == (loss == "triplet")  # part of the program, and over


def test_a_step_is_measured_with_the_default_loss():
    loss = base.get_config().loss.to_dict()
    assert step.configuration("float32", 12).loss.to_dict() == loss and loss["triplet"]["warmup_epochs"] > 0


def test_plain_pooling_and_that_of_the_library_agree():
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(3, 6, 5)).astype(np.float32), rng.random((3, 6), np.float32)
    mask = np.ones((3, 6), bool)
    expected = pool.numpy_pool(features, weights)
    for pooled in (pool.sorted_pool, pool.set_pool):
        np.testing.assert_allclose(pooled(features, jnp.asarray(mask), weights), expected, rtol=1e-5)


def test_calls_take_turns_and_a_spent_budget_ends_them(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.SHORTEST", 0.0)
    seen: list[str] = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    monkeypatch.setattr("benchmarks.timing._seconds", lambda call, count: call() or 1.0)
    times = interleave(calls, 3, before={"b": lambda: seen.append("before b")})
    assert seen == ["a", "before b", "b"] * 5 and len(times["a"].rounds) == 3
    assert len(interleave(calls, 3, budget=0.0)["a"].rounds) == 1


def test_a_ratio_is_of_speeds():
    row = compare("pool", "x", Timing((4.0, 1.0, 2.0)), "y", Timing((8.0,)), work=10.0, reference_work=20.0, aim=3.0)
    assert (row.seconds, row.best_seconds, row.rounds) == (2.0, 1.0, 1)
    assert row.ratio == (10 / 2) / (20 / 8)
    cells = [cell.strip() for cell in table([row]).splitlines()[2].split("|")]
    assert cells[1:-1] == ["pool", "x", "2 s", "y", "8 s", "2", "≥ 3", "", "", ""]


def test_lengths_are_those_of_captions():
    lengths = text.caption_lengths(4)
    assert len(lengths) == 20 and lengths.min() > 2 and lengths.max() <= text.LIMIT
    for tokens, mask in text.batches(np.sort(lengths), 8, text.BUCKETS):
        assert tokens.shape[1] in text.BUCKETS and (mask == (tokens > 0)).all()


def test_operations_by_hand():
    # 36 regions, 4096 positions, 128 channels: attention of 18.9 million multiplications, twice (docs: K: c -> P -> c).
    config = step.configuration("float32", 12)
    spatial = flops.image_flops(config.model, step.SHAPES)["spatial"] / 2
    attention = 2 * 36 * 4096 * 128
    convolution = 4096 * 81 * 128
    assert spatial - attention - convolution == 36 * (1024 * 512 + 512 * 128) + 36 * (128 * 512 + 512 * 1024)
    # BERT-base: 85 million weights in its layers; attention adds 2 * 16 * 768 for each token and layer.
    layers = flops.text_flops(config.text, 1024, 16)["layers"] / 2
    assert layers == 16 * 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 16 * 768)
    parts = {**flops.image_flops(config.model, step.SHAPES), **flops.text_flops(config.text, 1024, 16)}
    assert {"units", "semantic", "fusion", "scene", "category", "layers", "head"} < set(parts)
    one, two = (flops.step_flops(config, step.SHAPES, 16, pairs) for pairs in (1, 2))
    assert two == 2 * one + 3 * 2 * 2 * 1024  # towers grow with the pairs, scores with their square


@pytest.mark.parametrize("arm", ["full", "none"])
def test_operations_are_those_that_the_compiler_counts(arm):
    # Without the spatial branch, whose convolution and loop over images the implementation has in another form.
    config = ConfigDict(step.configuration("float32", 1).to_dict())
    config.model.update(spatial=False)
    if arm == "none":
        config.model.update(semantic=False, scene_tokens=False, category_token=False)
    model, batch = shnet.build(config), step.host_batch(step.configuration("float32", 1), 2, 16)
    batch["regions"], batch["seg_semantic"] = (batch[f].astype(np.float32) for f in ("regions", "seg_semantic"))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), batch)

    def vectors(variables, batch, method) -> Array:
        return model.apply(variables, batch, train=False, method=method).vector

    def count(function, *arguments) -> float:
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    # It counts additions of biases and the like as well.
    image = 2 * sum(flops.image_flops(config.model, step.SHAPES).values())
    assert 1.0 <= count(partial(vectors, method="encode_image"), variables, batch) / image < 1.03
    if arm == "none":
        words = 2 * sum(flops.text_flops(config.text, config.model.dim, 16).values())
        assert 1.0 <= count(partial(vectors, method="encode_text"), variables, batch) / words < 1.03

        # The features have no gradient: their products count twice, all others three times.
        def value(params, rest, batch) -> Array:
            return vectors(rest | {"params": params}, batch, "encode_image")[:, ::2].sum()

        params = variables.pop("params")
        counted = count(jax.grad(value), params, variables, batch)
        assert 1.0 <= counted / (2 * flops.image_training_flops(config.model, step.SHAPES)) < 1.1


def test_memory_of_a_process_over_its_life(tmp_path, monkeypatch):
    """The process goes on to hold and to give back memory once it was looked at before."""
    wait = "\nwhile not os.path.exists({!r}): time.sleep(0.01)\n".format
    hold = f"import os, time; x = bytearray(60 * 2**20){wait('held')}del x{wait('given back')}"
    looked, most = [], 60 * 2**20

    def bytes_of(process, entry="VmRSS"):
        actual = resident_bytes_of(process, entry)
        if entry == "VmRSS":
            looked.append(actual)
            held = max(looked) > most
            if held and (tmp_path / "held").exists() and actual < most:
                (tmp_path / "given back").touch()
            elif held:
                (tmp_path / "held").touch()
        return actual

    resident_bytes_of = resident.bytes_of
    monkeypatch.setattr(resident, "bytes_of", bytes_of)
    curve, peak = resident.watch(["-c", hold], tmp_path)
    assert peak - curve[-1][1] > 50 * 2**20  # it was given back
    assert [held for _, held in curve] == [held for held in looked if held] and curve[-1][0] > curve[0][0]
    with pytest.raises(RuntimeError, match="status 3:\nno such data set"):
        resident.watch(["-c", "print('no such data set'); raise SystemExit(3)"], tmp_path)


def test_the_stages_of_memory_are_commands_of_main(tmp_path, monkeypatch):
    commands = memory.stages(tmp_path / "set" / "1.0.0", tmp_path / "run", images=3, val=2)
    assert set(commands) == {"import", "training", "evaluation", "embedding"}
    monkeypatch.setattr(sys, "argv", list(commands["import"][1:]))  # of `python -m benchmarks.memory`
    memory.main()
    assert open_dataset(tmp_path / "set").splits["test"] == 3
    for command in list(commands.values())[1:]:
        assert command[0] == "main.py" and f"--config.data.dir={tmp_path / 'set' / '1.0.0'}" in command
