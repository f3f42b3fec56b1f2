"""Links of the pages, and the pages that code, messages and configurations name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAMED = re.compile(r"docs/[\w/-]+\.md")


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_pages_and_headings():
    broken = []
    for page in PAGES:
        for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {name}#{anchor}")
    assert not broken


def test_pages_named_in_code_exist():
    folders = ("shnet_jax", "data_prep", "configs", "benchmarks", "tests")
    files = [ROOT / "setup.py", ROOT / "Makefile", *(path for name in folders for path in ROOT.glob(f"{name}/**/*.py"))]
    named = {name: path for path in files for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert not {name: str(path) for name, path in named.items() if not (ROOT / name).is_file()}
    assert named
