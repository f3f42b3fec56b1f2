"""English sentences that describe a figure; each tells some of what it wears, and nothing that is not so."""

from __future__ import annotations

import numpy as np

from data_prep.people.wardrobe import Person

OPENINGS = ("The person", "This pedestrian", "Somebody", "The figure", "A person")
WEARS = ("wears", "is dressed in", "has on")
TOLD = (2, 4)  # least and, less one, most parts told beside the top


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def parts(person: Person) -> dict[str, str]:
    """Phrases that describe a person, by the part that they are about: "top", "hair", "bag", ..."""
    pattern = "" if person.pattern == "plain" else f"{person.pattern} "
    phrases = {
        "top": _article(f"{pattern}{person.top_colour} {person.top}"),
        "bottom": f"{person.bottom_colour} {person.bottom}",
        "shoes": f"{person.shoes_colour} shoes",
        "hair": f"{person.hair_style} {person.hair} hair",
    }
    if person.bottom == "skirt":
        phrases["bottom"] = _article(phrases["bottom"])
    phrases["bag"] = "no bag" if person.bag == "none" else _article(f"{person.bag_colour} {person.bag}")
    phrases["hat"] = "no hat" if person.hat == "none" else _article(f"{person.hat_colour} {person.hat}")
    return phrases


def caption(person: Person, rng: np.random.Generator) -> str:
    """One or two sentences, a function of the state of `rng`."""
    told = parts(person)
    others = [name for name in told if name != "top"]
    if person.hat != "none":
        others.remove("hair")  # under the hat
    count = min(int(rng.integers(*TOLD)), len(others))
    chosen = {"top", *(others[i] for i in rng.permutation(len(others))[:count])}
    garments = [told[name] for name in ("top", "bottom", "shoes") if name in chosen]
    if rng.random() < 0.5 and len(garments) > 1:
        garments = garments[::-1]
    opening, wears = (str(rng.choice(words)) for words in (OPENINGS, WEARS))
    first = f"{opening} {wears} {_list(garments)}"
    if "hair" in chosen:
        first += f" and has {told['hair']}" if len(garments) == 1 else f", with {told['hair']}"
    rest = []
    if "bag" in chosen:
        rest.append(f"carries {told['bag']}")
    if "hat" in chosen:
        rest.append(f"has {told['hat']}")
    return f"{first}." + (f" The person {' and '.join(rest)}." if rest else "")


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
