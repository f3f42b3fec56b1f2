"""The page of a scaling study in a real browser, with texts that would be a program."""

from __future__ import annotations

import pytest

from shnet_jax.observe.scale_page import page, picture
from shnet_jax.observe.scale_rows import Row, Study
from tests.browser import HOSTILE, look_at, needs_browser

ALL = " ".join(HOSTILE)


@needs_browser
@pytest.mark.slow
def test_hostile_texts_are_shown_as_text(tmp_path):
    rows = [
        Row(1, 4, 4, f"ring {text}", text, (), text, f"message {i} {text}", False, *[None] * 7, {}, {}, None)
        for i, text in enumerate(HOSTILE)
    ]
    named = dict.fromkeys(("platform", "device_kind", "cpu", "cores", "system", "python"), ALL)
    study = Study(ALL, named | {"devices": 4, "versions": {ALL: ALL}}, ALL, ALL, 2, 1, ALL)
    path = tmp_path / "report.html"
    path.write_text(page(study, rows, [picture(ALL, b"", b"")]), encoding="utf-8")
    seen = look_at(path, tmp_path / "browser")
    assert not [line for line in seen.console if "owned" in line or "dialog" in line.lower()]
    assert seen.title.startswith("Scaling study: <script>") and not {"script", "svg", "textarea", "a"} & {*seen.tags}
    assert seen.tags.count("img") == 1
    words = " ".join(seen.text.split())
    for number, text in enumerate(HOSTILE):
        assert " ".join(f"message {number} {text}".replace("\0", "").split()) in words
