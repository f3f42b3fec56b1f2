"""What the figures of a scaling study say, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shnet_jax.observe.scale_rows import (
    ENOUGH,
    PARTS,
    Row,
    bytes_text,
    devices_text,
    efficiency_of,
    milliseconds_text,
    pairs_text,
)


def summary(rows: Sequence[Row]) -> list[str]:
    """What the figures say, in sentences."""
    said = []
    timed = [row for row in rows if row.examples_per_second]
    if any(row.virtual for row in rows):
        most = max(row.devices for row in rows)
        said.append(
            f"The devices are virtual: up to {most} of them share the processor of one machine. How fast they are "
            "together says nothing of real devices, so only one device was timed; for more there are the compiler's "
            "figures of memory, communication and operations, which hold for CPU programs and are a guide for others."
        )
    if timed:
        best = max(timed, key=lambda row: row.examples_per_second or 0.0)
        said.append(f"Fastest: {best.examples_per_second:,.0f} pairs/s, with {best}.")
        if {*PARTS} <= best.seconds.keys():
            part = max(PARTS, key=lambda name: best.seconds[name])
            alone = milliseconds_text(best, part)
            said.append(
                f"There {_PART_NAMES[part]} took most: {alone} alone, of a step of {milliseconds_text(best, 'step')}."
            )
        said += _collective_sentences(timed)
        above = sum(row.seconds.get("rest", 0.0) < -0.1 * row.seconds["step"] for row in timed)
        if above:
            said.append(
                f"In {above} of {len(timed)} timed points the parts took longer alone than the step as a whole: in "
                "the step they overlap, or the machine had other work meanwhile. Read the shares with care."
            )
    said += _efficiency_sentences(rows)
    said += _memory_sentences(rows)
    said += _sent_sentences(rows)
    lost = [row for row in rows if row.memory is None]
    if lost:
        said.append(
            f"{len(lost)} of {len(rows)} points have no result: "
            + "; ".join(f"{row}: {row.status}" for row in lost[:3])
            + (" and more" if len(lost) > 3 else "")
            + ". Their messages are below the table."
        )
    return said


_PART_NAMES = {
    "input": "waiting for data",
    "encode": "the towers",
    "loss": "the loss",
    "collectives": "the sum of the gradients over the devices",
    "optimiser": "the optimiser",
    "rest": "what the parts do not explain",
}


def _collective_sentences(timed: Sequence[Row]) -> Iterator[str]:
    """The most that the sum of the gradients takes of a step."""
    known = [(row, row.seconds["collectives"] / row.seconds["step"]) for row in timed if "collectives" in row.seconds]
    known = [(row, share) for row, share in known if row.devices > 1]
    if known:
        row, share = max(known, key=lambda found: found[1])
        yield (
            f"{_PART_NAMES['collectives'].capitalize()} takes at most {100 * share:.1f} % of a step, alone: "
            f"{milliseconds_text(row, 'collectives')} with {row}. What the loss sends is part of the loss."
        )


def _efficiency_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """For each size of weak and of strong scaling, where efficiency falls below ENOUGH."""
    for kind, size in dict.fromkeys(series for row in rows for series in row.series):
        on = [row for row in rows if (kind, size) in row.series and row.devices > 1]
        known = [(row, value) for row in on if (value := efficiency_of(row, kind)) is not None]
        if not known:
            continue
        most = max(row.devices for row, _ in known)
        there = [value for row, value in known if row.devices == most]
        low, high = (f"{100 * value:.0f}" for value in (min(there), max(there)))
        first: dict[str, int] = {}
        for row, value in sorted(known, key=lambda found: found[0].devices):
            if value < ENOUGH:
                first.setdefault(f"{row.strategy}, {row.dtype}", row.devices)
        below = "; ".join(f"{name} at {devices_text(devices)}" for name, devices in first.items())
        where = "Weak scaling" if kind == "weak" else "Strong scaling"
        spread = low if low == high else f"{low} to {high}"
        yield (
            f"{where}, {pairs_text(size)} {'on each device' if kind == 'weak' else 'over all devices'}: at "
            f"{devices_text(most)} efficiency is {spread} %. It falls below {100 * ENOUGH:.0f} % "
            + (f"with {below}." if below else "nowhere.")
        )


def _memory_sentences(rows: Sequence[Row]) -> Iterator[str]:
    yield from _by_strategy(rows, lambda row: row.memory, "Memory of a device, ")


def _sent_sentences(rows: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in rows if row.devices > 1]
    yield from _by_strategy(rows, lambda row: row.sent_beside, "Sent by a device in a step beside the all-reduce, ")


def _by_strategy(rows: Sequence[Row], value: Callable[[Row], float | None], what: str) -> Iterator[str]:
    """A figure by strategy, where the devices and then the pairs are most."""
    known = [row for row in rows if value(row) is not None]
    if not known:
        return
    top = max(known, key=lambda row: (row.devices, row.pairs))
    for dtype in dict.fromkeys(row.dtype for row in known):
        on = [row for row in known if (row.devices, row.pairs, row.dtype) == (top.devices, top.pairs, dtype)]
        if on:
            found = ", ".join(f"{row.strategy} {bytes_text(value(row))}" for row in on)
            yield f"{what}{devices_text(top.devices)} with {pairs_text(top.pairs)} each, {dtype}: {found}."
