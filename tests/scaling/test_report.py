"""From records of points to rows, sentences and a page that needs no other file."""

from __future__ import annotations

import csv
from xml.etree import ElementTree

import pytest

from shnet_jax.observe.html import tag
from shnet_jax.scaling.charts import charts
from shnet_jax.scaling.report import page, sentences, write_report
from shnet_jax.scaling.rows import make_rows
from shnet_jax.scaling.sweep import Point, sweep
from tests.browser import HOSTILE, look_at, needs_browser
from tests.scaling.test_study import CPU, MACHINE, configuration

CONFIG = configuration(scale__devices=(1, 2, 4), scale__batch_sizes=(16,), scale__dtypes=("float32", "bfloat16"))


def record(rate=None, *, peak=None, status="measured", message="", **figures):
    """The record of a point, with the figures of `scaling.point`."""
    if peak is None:
        return {"status": status, "message": message}
    seconds = {"step": 0.2, "input": 0.02, "encode": 0.1, "loss": 0.03, "collectives": 0.015, "optimiser": 0.01,
               "rest": 0.025}  # fmt: skip
    timed = {"examples_per_second": rate, "seconds": seconds, "device_peak": 2 * peak} if rate else {}
    sent = {"all-reduce": 3.0 * 2**20, "all-gather": 2.0**20}
    return {"status": status, "message": message, "memory": {"peak": peak}, "flops": 4e9, "collectives": sent,
            "compile_seconds": 1.0} | timed | figures  # fmt: skip


def study_rows(virtual=False):
    rates = {(1, 4): 100.0, (2, 4): 180.0, (4, 4): 300.0, (1, 16): 125.0, (2, 8): 200.0, (1, 8): 110.0}
    records = {}
    for point in sweep(CONFIG.scale, references=not virtual):
        rate = None if virtual and point.devices > 1 else rates[point.devices, point.pairs]
        records[point] = record(rate, peak=point.pairs * 2**20 * (2 if point.strategy == "gathered" else 1))
    lost = Point("ring", "bfloat16", 8, 2)
    records[lost] = record(status="out of memory", message='<img src="http://evil/x"> & more')
    return make_rows(CONFIG.scale, records, virtual=virtual)


def test_efficiency():
    ring = [row for row in study_rows() if (row["strategy"], row["dtype"]) == ("ring", "float32")]
    by_size = {(row["devices"], row["pairs"]): row for row in ring}
    efficiency = {size: row["efficiency"] for size, row in by_size.items()}
    strong = {size: row["strong_efficiency"] for size, row in by_size.items()}
    assert by_size[2, 4]["ideal"] == 200 and efficiency[2, 4] == pytest.approx(0.9)
    assert by_size[4, 4]["ideal"] == 400 and efficiency[4, 4] == pytest.approx(0.75)
    assert efficiency[1, 4] == strong[1, 16] == 1
    # One device with all 16 pairs makes 125 a second: 2 should make 250, 4 should make 500.
    assert strong[2, 8] == pytest.approx(0.8) and strong[4, 4] == pytest.approx(0.6)
    assert efficiency[2, 8] == pytest.approx(200 / 220)  # of 110, with 8 pairs on it
    assert strong[2, 4] == pytest.approx(180 / 220)  # 8 pairs in all
    assert by_size[4, 4]["collective_bytes"] == 4 * 2**20 and by_size[4, 4]["exchange_bytes"] == 2**20
    assert by_size[1, 4]["collective_bytes"] == 0  # a device alone sends nothing


def test_goodput():
    rows = study_rows(virtual=True)
    assert {row["goodput"] for row in rows if row["devices"] > 1} == {None}
    assert {round(row["goodput"], 9) for row in rows if row["devices"] == 1} == {0.9}
    assert "goodput" in page(CONFIG, MACHINE, rows, [])


def test_what_has_no_reference_has_no_efficiency():
    lost = next(row for row in study_rows() if row["memory"] is None)
    assert lost["ideal"] == 220 and lost["status"] == "out of memory"
    assert lost["collective_bytes"] is lost["examples_per_second"] is lost["efficiency"] is None
    assert all(row["efficiency"] is None for row in study_rows(virtual=True) if row["devices"] > 1)


def test_sentences():
    output = [*sentences(CONFIG.scale, study_rows())]
    assert "Fastest: 300 pairs/s, with 4 devices with 4 pairs each, gathered, float32." in output
    assert "Its slowest part is encode: 100.0 ms alone, of a step of 200.0 ms." in output
    sent = "The sum of the gradients over the devices takes at most 7.5 % of a step, alone: 15.0 ms with 2 devices"
    assert any(sentence.startswith(sent) for sentence in output)
    weak = output.index(
        "Efficiency, 4 pairs on each device, 4 devices with 4 pairs each, float32: gathered 75 %, ring 75 %."
    )
    low = "gathered, float32 with 4 devices; ring, float32 with 4 devices; gathered, bfloat16 with 4 devices; "
    assert output[weak + 2].startswith(f"It falls below 80 %: {low}")
    strong = "Efficiency, 16 pairs over all devices, 4 devices with 4 pairs each, bfloat16: gathered 60 %, ring 60 %."
    assert strong in output
    assert "Memory of a device, 4 devices with 4 pairs each, float32: gathered 8.00 MiB, ring 4.00 MiB." in output
    assert "1 of 24 points have no result: 2 devices with 8 pairs each, ring, bfloat16: out of memory" in output[-1]
    virtual = [*sentences(CONFIG.scale, study_rows(virtual=True))]
    assert virtual[0].startswith("The devices are virtual") and not any("Efficiency" in s for s in virtual)
    assert "Fastest: 125 pairs/s, with 1 device with 16 pairs each, gathered, float32." in virtual


# ----------------------------------------------------------------------------------------------------------- the page


def make_report(folder, virtual):
    config = configuration(name="a < b & c", **{f"scale__{name}": value for name, value in CONFIG.scale.items()})
    return write_report(folder, config, CPU if virtual else MACHINE, study_rows(virtual))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a study in a folder that has a chart of points that are gone."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "plots").mkdir()
    (folder / "plots" / "speed_weak_999.png").write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["main.py", "--x=<y>"])
        return make_report(folder, virtual=False)


def test_the_page_stands_alone(report):
    text = report.read_text("utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>"))  # fails where elements do not nest
    elements, words = [*page.iter()], "".join(page.itertext())
    tags = [element.tag.rpartition("}")[2] for element in elements]
    assert not {"script", "link", "iframe", "img"} & {*tags} and "@import" not in text and "http-equiv" not in text
    # Nothing is loaded: parts of an SVG refer to others of the same page.
    assert text.count("url(") == text.count("url(#")
    for name, value in (item for element in elements for item in element.attrib.items()):
        assert value.startswith("#") or not name.endswith(("src", "srcset", "href"))
    # Names, the command and messages are text, not markup.
    hostile = ("Scaling study: a < b & c", "main.py '--x=<y>'", '<img src="http://evil/x"> & more', "Some <fast> card")
    assert all(phrase in words for phrase in hostile)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [e.attrib for e in elements]
    assert "#1d1d22" not in text[text.index("<body") :] and "currentColor" in text  # light and dark
    names = {path.stem for path in (report.parent / "plots").iterdir()}
    assert tags.count("svg") == tags.count("figure") == len(names) and tags.count("tr") == 1 + 24
    assert {"speed_weak_4", "efficiency_strong_16", "memory_weak_4", "shares_1", "shares_4", "collectives"} <= names
    assert "speed_weak_999" not in names


def test_the_table(report):
    with (report.parent / "scaling.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    row = next(
        r for r in rows if (r["strategy"], r["dtype"], r["devices"], r["pairs"]) == ("ring", "float32", "4", "4")
    )
    assert float(row["efficiency"]) == pytest.approx(0.75) and float(row["all-gather_bytes"]) == 2**20
    assert float(row["encode_seconds"]) == 0.1 and float(row["collectives_seconds"]) == 0.015
    assert float(row["memory"]) == 4 * 2**20
    lost = next(r for r in rows if r["status"] == "out of memory")
    assert lost["memory"] == lost["all-gather_bytes"] == lost["examples_per_second"] == "" and "evil" in lost["message"]


def test_virtual_devices_have_no_charts_of_speed():
    rows = study_rows(virtual=True)
    names = [name for name, _, _ in charts(CONFIG.scale, rows)]
    assert not [name for name in names if name.startswith(("speed", "efficiency"))]
    assert {"memory_weak_4", "sent_weak_4", "memory_strong_16", "collectives", "shares_1"} <= {*names}
    text = page(CONFIG, CPU, rows, [])
    assert "compiled" in text and "4 virtual CPU devices" in text


@needs_browser
@pytest.mark.slow
def test_hostile_texts_are_shown_as_text(tmp_path, monkeypatch):
    everything = " ".join(HOSTILE)
    monkeypatch.setattr("sys.argv", [everything])
    records = {
        Point(f"ring {text}", text, 4, 1): {"status": text, "message": f"message {i} {text}"}
        for i, text in enumerate(HOSTILE)
    }
    machine = dict.fromkeys(("platform", "device_kind", "cpu", "cores", "system", "python"), everything)
    machine |= {"devices": 4, "versions": {everything: everything}}
    config = configuration(name=everything, data__dir=everything)
    path, figures = tmp_path / "report.html", [tag("figure", tag("figcaption", everything))]
    path.write_text(page(config, machine, make_rows(config.scale, records, virtual=False), figures), encoding="utf-8")
    seen = look_at(path, tmp_path / "browser")
    assert not [line for line in seen.console if "owned" in line or "dialog" in line.lower()]
    assert seen.title.startswith("Scaling study: <script>")
    assert not {"script", "svg", "textarea", "a", "img"} & {*seen.tags} and seen.tags.count("figure") == 1
    words = " ".join(seen.text.split())
    for number, text in enumerate(HOSTILE):
        assert " ".join(f"message {number} {text}".replace("\0", "\ufffd").split()) in words
