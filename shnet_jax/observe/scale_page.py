"""A scaling study as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence

from shnet_jax.observe.scale_rows import Row, Study, bytes_text, number_text
from shnet_jax.observe.scale_summary import summary


def picture(caption: str, light: bytes, dark: bytes) -> str:
    """An HTML figure with the images in it."""
    code = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    text = html.escape(caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{code[1]}">'
        f'<img src="{code[0]}" alt="{text}"></picture><figcaption>{text}</figcaption></figure>'
    )


def page(study: Study, rows: Sequence[Row], figures: Sequence[str]) -> str:
    """The whole page. figures: of `picture`."""
    e = html.escape
    sentences = "".join(f"<li>{e(sentence)}</li>" for sentence in summary(rows))
    what = "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in _facts(study, rows))
    reading = "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in _reading(study, rows))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling study: {e(study.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>Scaling study: {e(study.name)}</h1>\n"
        f"<h2>In short</h2><ul>{sentences}</ul>\n"
        f"<h2>What was measured</h2><dl>{what}</dl>\n"
        f'<h2>Plots</h2><div class="plots">{"".join(figures)}</div>\n'
        f"<h2>All points</h2>{_html_table(rows)}\n{_messages(rows)}"
        f"<h2>How to read it</h2><dl>{reading}</dl>\n"
        f"<h2>The command</h2><pre>{e(study.command)}</pre>\n"
        f"</body></html>\n"
    )


def _facts(study: Study, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    machine = study.machine
    devices = max((row.devices for row in rows), default=0)
    virtual = any(row.virtual for row in rows)
    kind = f"{devices} virtual CPU devices" if virtual else f"{machine['devices']} x {machine['device_kind']}"
    yield "Step", "one training step, towers forward and backward, loss, optimiser, as --mode=train runs it"
    yield "Devices", kind
    yield "Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    yield "Software", ", ".join([f"Python {machine['python']}", *(f"{n} {v}" for n, v in machine["versions"].items())])
    yield "Batches", study.data
    yield "Timing", f"median of {study.steps} steps after {study.warmup_steps} steps of warm-up"
    yield "Date", study.date


def _reading(study: Study, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    yield "Weak scaling", "every device keeps the same number of pairs, so the batch grows with the devices."
    yield "Strong scaling", "the batch stays the same, so each device gets fewer pairs."
    yield (
        "Efficiency",
        "pairs/s divided by the devices times the pairs/s of one device with the same strategy, precision and pairs on "
        "it; the column for strong scaling divides by one device with the whole batch instead.",
    )
    yield (
        "Strategy",
        "how the pairs of other devices meet in the loss. gathered: all at once; streamed: gathered, scored in tiles; "
        "ring: embeddings travel from device to device; local: not at all, which is another loss.",
    )
    yield (
        "Memory",
        "by the compiler: arguments, results and temporaries of the step on one device. By the allocator: the most "
        "that the device held while stepping, where it tells.",
    )
    yield (
        "Sent",
        "bytes of collectives that one device hands in or receives in a step: whole arrays, as the program names them, "
        "not what crosses each wire.",
    )
    yield (
        "Parts of the time",
        "each is a program of its own, compiled and timed alone, so they do not add up exactly: inside the step the "
        "compiler fuses and overlaps what alone runs one after another. input: how much longer a step takes when its "
        "batch has to be fetched and sent than when it is there. encode: both towers forward and backward under a "
        "trivial loss. loss: value and gradient by the embeddings, the collectives of its strategy included. "
        "collectives: the sum of the gradients over the devices, of arrays that are ready; in the step it can overlap "
        "with the backward pass. optimiser: the update alone. rest: the step less these; below zero where the parts "
        "take longer alone than together.",
    )


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("devices", lambda r: f"{r.devices}{' virtual' if r.virtual else ''}"),
    ("pairs each", lambda r: f"{r.pairs:,}"),
    ("batch", lambda r: f"{r.batch:,}"),
    ("strategy", lambda r: r.strategy),
    ("precision", lambda r: r.dtype),
    ("result", lambda r: "compiled" if r.virtual and r.memory is not None else r.status),
    ("pairs/s", lambda r: number_text(r.examples_per_second, ",.0f")),
    ("step, ms", lambda r: number_text(r.seconds.get("step"), ",.1f", 1e3)),
    ("efficiency", lambda r: number_text(r.efficiency if r.devices > 1 else None, ".0f", 100, " %")),
    ("strong", lambda r: number_text(r.strong_efficiency if r.devices > 1 else None, ".0f", 100, " %")),
    ("memory", lambda r: bytes_text(r.memory)),
    ("allocator", lambda r: bytes_text(r.device_memory)),
    ("GFLOP", lambda r: number_text(r.flops, ",.2f", 1e-9)),
    ("sent", lambda r: bytes_text(r.sent)),
    ("beside all-reduce", lambda r: bytes_text(r.sent_beside)),
)


def _html_table(rows: Sequence[Row]) -> str:
    """Without the columns of which nothing is known."""
    e = html.escape
    columns = [(name, [text(row) for row in rows]) for name, text in _COLUMNS]
    columns = [(name, cells) for name, cells in columns if set(cells) - {"-"}]
    heads = "".join(f'<th scope="col">{e(name)}</th>' for name, _ in columns)
    lines = "".join(
        "<tr>" + "".join(f'<td class="{_align(name)}">{e(cells[i])}</td>' for name, cells in columns) + "</tr>"
        for i in range(len(rows))
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _messages(rows: Sequence[Row]) -> str:
    """What went wrong, each message once with its first point: it is too long for a column."""
    first = {row.message: row for row in reversed(rows) if row.message}
    items = "".join(f"<li>{html.escape(f'{row}: {row.status}; {text}')}</li>" for text, row in reversed(first.items()))
    return f'<h2>What went wrong</h2><ul class="said">{items}</ul>\n' if items else ""


def _align(column: str) -> str:
    return "text" if column in ("strategy", "precision", "result") else "number"


_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --card: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22; --line: #30363d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
ul { padding-left: 1.2rem; max-width: 50rem; }
li { margin: .4rem 0; }
dl { max-width: 50rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
th { background: var(--card); }
.number { text-align: right; }
.said { overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; }
"""
