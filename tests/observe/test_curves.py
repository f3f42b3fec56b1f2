"""The picture of a run: its curves come from the right fields, and it can be drawn at any moment of a run."""

import pytest
from matplotlib.figure import Figure

from shnet_jax.observe import curves
from shnet_jax.observe.writer import MetricWriter


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_curves(tmp_path, drawn):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        terms = {
            "triplet_loss": 1.0,
            "infonce_loss": 2.0 if step != 2 else float("nan"),
            "triplet_violated": 0.5,
        }
        writer.write(step, "train", {"loss": 3.0 * step, "lr": 0.1 / step} | terms, {"seconds": 1.0})
    recalls = {f"{d}_r{k}": 10.0 * k for d in ("i2t", "t2i") for k in (1, 5, 10)}
    writer.write(3, "eval", recalls | {"rsum": 320.0, "i2t_medr": 3.0})
    writer.close()
    assert curves.write_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    loss, rate, recall = drawn[0].axes
    actual = {line.get_label(): list(line.get_xydata().tolist()) for axes in drawn[0].axes for line in axes.lines}
    assert actual["total"] == [[1, 3.0], [2, 6.0], [3, 9.0]]
    assert actual["lr"] == [[1, 0.1], [2, 0.05], [3, 0.1 / 3]]
    assert actual["text to image, R@5"] == [[3, 50.0]]
    assert [len(axes.lines) for axes in (loss, rate, recall)] == [3, 1, 6]
    assert "320.0" in recall.get_title()
    assert drawn[0].get_suptitle() == curves.run_name(tmp_path) == f"{tmp_path.parent.name}/{tmp_path.name}"


def test_run_without_evaluation_yet(tmp_path, drawn):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 3.0})
    writer.close()
    assert curves.write_curves(tmp_path).stat().st_size > 0
    assert [bool(axes.lines) for axes in drawn[0].axes] == [True, False, False]
