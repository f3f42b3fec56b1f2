"""From records of points to rows, sentences and a page that needs no other file."""

from __future__ import annotations

import csv
from html.parser import HTMLParser

import pytest

from shnet_jax import scaling
from shnet_jax.observe.scale_page import page
from shnet_jax.observe.scale_plots import plots
from shnet_jax.observe.scale_report import write_report
from shnet_jax.observe.scale_rows import Study
from shnet_jax.observe.scale_summary import summary
from shnet_jax.scaling import Point
from tests.test_scaling import CPU, MACHINE, configuration


def record(rate=None, *, peak=None, status="measured", message="", **figures):
    """What `scale_point` gives."""
    if peak is None:
        return {"status": status, "message": message}
    seconds = {"step": 0.2, "input": 0.02, "encode": 0.1, "loss": 0.03, "collectives": 0.015, "optimiser": 0.01,
               "rest": 0.025}  # fmt: skip
    timed = {"examples_per_second": rate, "seconds": seconds, "device_peak": 2 * peak} if rate else {}
    sent = {"all-reduce": 3.0 * 2**20, "all-gather": 2.0**20}
    return {"status": status, "message": message, "memory": {"peak": peak}, "flops": 4e9, "collectives": sent,
            "compile_seconds": 1.0} | timed | figures  # fmt: skip


def study_rows(virtual=False):
    config = configuration(scale__devices=(1, 2, 4), scale__batch_sizes=(16,), scale__dtypes=("float32", "bfloat16"))
    rates = {(1, 4): 100.0, (2, 4): 180.0, (4, 4): 300.0, (1, 16): 125.0, (2, 8): 200.0, (1, 8): 110.0}
    records = {}
    for point in scaling.sweep(config.scale, references=not virtual):
        rate = None if virtual and point.devices > 1 else rates[point.devices, point.pairs]
        records[point] = record(rate, peak=point.pairs * 2**20 * (2 if point.strategy == "gathered" else 1))
    lost = Point("ring", "bfloat16", 8, 2)
    records[lost] = record(status="out of memory", message='<img src="http://evil/x"> & more')
    return scaling.make_rows(config.scale, records, virtual=virtual)


def test_efficiency():
    rows = {(r.devices, r.pairs): r for r in study_rows() if (r.strategy, r.dtype) == ("ring", "float32")}
    assert rows[2, 4].ideal == 200 and rows[2, 4].efficiency == pytest.approx(0.9)
    assert rows[4, 4].ideal == 400 and rows[4, 4].efficiency == pytest.approx(0.75)
    assert rows[1, 4].efficiency == 1 and rows[1, 16].strong_efficiency == 1
    # One device with all 16 pairs makes 125 a second: 2 should make 250, 4 should make 500.
    assert rows[2, 8].strong_efficiency == pytest.approx(0.8) and rows[4, 4].strong_efficiency == pytest.approx(0.6)
    assert rows[2, 8].efficiency == pytest.approx(200 / 220)  # of 110, with 8 pairs on it
    assert rows[2, 4].strong_efficiency == pytest.approx(180 / 220)  # 8 pairs in all
    assert rows[4, 4].series == (("weak", 4), ("strong", 16)) and rows[1, 8].series == ()
    assert rows[4, 4].sent == 4 * 2**20 and rows[1, 4].sent == 0  # a device alone sends nothing


def test_what_has_no_reference_has_no_efficiency():
    rows = study_rows()
    lost = next(row for row in rows if row.memory is None)
    assert lost.ideal == 220 and lost.sent is None
    assert lost.status == "out of memory" and lost.examples_per_second is None and lost.efficiency is None
    assert all(row.efficiency is None for row in study_rows(virtual=True) if row.devices > 1)


def test_sentences():
    said = summary(study_rows())
    assert "Fastest: 300 pairs/s, with 4 devices with 4 pairs each, gathered, float32." in said
    assert "There the towers took most: 100.0 ms alone, of a step of 200.0 ms." in said
    sent = "The sum of the gradients over the devices takes at most 7.5 % of a step, alone: 15.0 ms with 2 devices"
    assert any(sentence.startswith(sent) for sentence in said)
    weak = next(
        s for s in said if s.startswith("Weak scaling, 4 pairs on each device: at 4 devices efficiency is 75 %.")
    )
    assert "It falls below 80 % with gathered, float32 at 4 devices; ring, float32 at 4 devices; gathered, b" in weak
    strong = next(s for s in said if s.startswith("Strong scaling, 16 pairs over all devices: at 4 devices"))
    assert "efficiency is 60 %" in strong and "ring, float32 at 4 devices" in strong
    assert "Memory of a device, 4 devices with 4 pairs each, float32: gathered 8 MiB, ring 4 MiB." in said
    assert "1 of 24 points have no result: 2 devices with 8 pairs each, ring, bfloat16: out of memory" in said[-1]
    virtual = summary(study_rows(virtual=True))
    assert virtual[0].startswith("The devices are virtual") and not any("efficiency" in s for s in virtual)
    assert "Fastest: 125 pairs/s, with 1 device with 16 pairs each, gathered, float32." in virtual


# ----------------------------------------------------------------------------------------------------------- the page

VOID = {"meta", "source", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest; keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)


def make_report(folder, virtual):
    study = Study("a < b & c", CPU if virtual else MACHINE, "python main.py --x='<y>'", "random", 2, 1, "2026-01-01")
    return write_report(folder, study, study_rows(virtual))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("report"), virtual=False)


def test_the_page_stands_alone(report):
    text = report.read_text("utf-8")
    page = Page(text)
    words = "".join(page.text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe"} & {*tags} and "@import" not in text and "url(" not in text
    for _, attributes in page.tags:
        for name in {"src", "srcset", "href"} & attributes.keys():
            assert attributes[name].startswith("data:image/png;base64,")
    # What was not ours to write is text, not markup.
    assert "Scaling study: a < b & c" in words and "--x='<y>'" in words and '<img src="http://evil/x"> & more' in words
    assert "Some <fast> card" in words
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    images = sorted(p.stem for p in (report.parent / "plots").iterdir())
    assert tags.count("img") == tags.count("source") == len(images) and tags.count("tr") == 1 + 24
    assert {"speed_weak_4", "efficiency_strong_16", "memory_weak_4", "shares_1", "shares_4", "collectives"} <= {*images}


def test_the_page_can_be_found_wrong():
    with pytest.raises(AssertionError, match="closes another element"):
        Page("<p><b>x</p></b>")
    with pytest.raises(AssertionError, match="not closed"):
        Page("<div>")


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


def test_virtual_devices_have_no_plots_of_speed():
    rows = study_rows(virtual=True)
    names = [name for name, _, _ in plots(rows)]
    assert not [name for name in names if name.startswith(("speed", "efficiency"))]
    assert {"memory_weak_4", "sent_weak_4", "memory_strong_16", "collectives", "shares_1"} <= {*names}
    study = Study("v", CPU, "c", "random", 2, 1, "2026-01-01")
    text = "".join(Page(page(study, rows, [])).text)
    assert "4 virtual" in text and "compiled" in text and "4 virtual CPU devices" in text


@pytest.mark.slow
def test_plots_of_points_that_are_gone_go_too(tmp_path):
    make_report(tmp_path, virtual=False)
    (tmp_path / "plots" / "speed_weak_999.png").write_bytes(b"old")
    make_report(tmp_path, virtual=False)
    assert not (tmp_path / "plots" / "speed_weak_999.png").exists() and (tmp_path / "plots" / "shares_1.png").exists()
