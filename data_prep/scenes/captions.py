"""Captions of a scene: the facts that a caption states, whether they hold of any scene, and their English."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from data_prep.scenes.world import ABOVE, BEHIND, CLASS_NAMES, COLOURS, LEFT_OF, ON, SHAPES, SIZES, TEXTURES, Scene

PHRASES = {  # (predicate, turned round) -> wordings; "a left of b" turned round is "b right of a"
    (LEFT_OF, False): ("to the left of", "left of", "on the left side of"),
    (LEFT_OF, True): ("to the right of", "right of", "on the right side of"),
    (ABOVE, False): ("above", "higher than", "over"),
    (ABOVE, True): ("below", "lower than", "under"),
    (BEHIND, False): ("behind", "partly hidden behind", "partly covered by"),
    (BEHIND, True): ("in front of", "partly covering", "partly hiding"),
    (ON, False): ("on top of", "resting on", "balanced on"),
    (ON, True): ("directly under", "carrying", "supporting"),
}
PLACES = {"sky": "in the sky", "forest": "in the forest", "wall": "against the wall", "sea": "in the sea"}
PLURALS = {"cross": "crosses", "crescent": "crescents"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
WEIGHTS = {ON: 5, BEHIND: 5, LEFT_OF: 2, ABOVE: 2}  # "on" and "behind" are rarer in the scenes than the others


@dataclass(frozen=True)
class Mention:
    """A thing that a caption speaks of; an attribute of None is not stated.

    place: class id of the stuff it stands on.
    count: exactly so many things of the scene have the stated attributes; None: at least one.
    every: the place is stated of all of them, not of the one that the relations are about.
    """

    shape: int
    colour: int | None = None
    size: int | None = None
    texture: int | None = None
    place: int | None = None
    count: int | None = None
    every: bool = False


@dataclass
class Facts:
    """Facts that a caption states.

    mentions: of different things.  relations: (mention, predicate, mention), the mentions by their number.
    stuff: (class id, predicate, class id) of regions of stuff.
    """

    mentions: list[Mention] = field(default_factory=list)
    relations: list[tuple[int, int, int]] = field(default_factory=list)
    stuff: list[tuple[int, int, int]] = field(default_factory=list)


def _alike(scene: Scene, mention: Mention) -> list[int]:
    """Things of the scene with the stated attributes."""
    return [
        i
        for i, look in enumerate(scene.looks)
        if look.shape == mention.shape
        and mention.colour in (None, look.colour)
        and mention.size in (None, look.size)
        and mention.texture in (None, look.texture)
    ]


def holds(scene: Scene, facts: Facts) -> bool:
    """Whether the scene has different things for all mentions such that every stated fact is true of them."""
    if not scene.ground.relations().issuperset(facts.stuff):
        return False
    candidates = []
    for mention in facts.mentions:
        alike = _alike(scene, mention)
        there = [i for i in alike if mention.place in (None, scene.standing[i])]
        if not there or (mention.count not in (None, len(alike))) or (mention.every and there != alike):
            return False
        candidates.append(there)

    def assign(chosen: list[int]) -> bool:
        if any(
            (chosen[a], predicate, chosen[b]) not in scene.relations
            for a, predicate, b in facts.relations
            if max(a, b) == len(chosen) - 1
        ):
            return False
        if len(chosen) == len(candidates):
            return True
        return any(assign([*chosen, i]) for i in candidates[len(chosen)] if i not in chosen)

    return assign([])


class _Speaker:
    """Words for one caption of a scene; collects the facts that the words state."""

    def __init__(self, scene: Scene, rng: random.Random):
        self.scene, self.rng, self.facts = scene, rng, Facts()
        self.things: list[int] = []  # the thing of each mention

    def name(self, thing: int, *, place: float = 0.0, every: bool = False) -> str:
        """Noun phrase of a thing not mentioned before, with its place with probability `place`."""
        rng, look = self.rng, self.scene.looks[thing]
        group = [i for i, other in enumerate(self.scene.looks) if other == look]
        places = {self.scene.standing[i] for i in (group if every else [thing])}
        place_id = places.pop() if rng.random() < place and len(places) == 1 and -1 not in places else None
        mention = Mention(
            shape=look.shape,
            colour=look.colour if rng.random() < 0.9 else None,
            size=look.size if rng.random() < 0.55 else None,
            texture=look.texture if TEXTURES[look.texture] != "plain" and rng.random() < 0.65 else None,
            place=place_id,
            count=len(group) if len(group) > 1 else None,
            every=every and len(group) > 1,
        )
        self.things.append(thing)
        self.facts.mentions.append(mention)
        words = [
            names[value]
            for names, value in ((SIZES, mention.size), (TEXTURES, mention.texture), (COLOURS, mention.colour))
            if value is not None
        ]
        shape = SHAPES[look.shape]
        if mention.count:
            plural = " ".join([NUMBERS[mention.count], *words, PLURALS.get(shape, shape + "s")])
            phrase = plural if every else f"one of {plural}"
        else:
            phrase = " ".join([*words, shape])
            phrase = ("an " if phrase[0] in "aeiou" else "a ") + phrase
        return f"{phrase} {_place(place_id)}" if place_id is not None else phrase

    def relation(self, choices: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        return self.rng.choices(choices, [WEIGHTS[predicate] for _, predicate, _ in choices])[0]

    def phrase(self, first: int, relation: tuple[int, int, int]) -> str:
        """Wording of a relation between mentioned things, for a sentence whose subject is `first`."""
        i, predicate, j = relation
        self.facts.relations.append((self.things.index(i), predicate, self.things.index(j)))
        return self.rng.choice(PHRASES[predicate, first == j])

    def unnamed(self) -> list[int]:
        """One thing of every group that no mention is about."""
        return list({look: i for i, look in enumerate(self.scene.looks) if self.is_new(i)}.values())

    def is_new(self, thing: int) -> bool:
        """Whether neither the thing nor one of its group has been mentioned."""
        return all(self.scene.looks[thing] != self.scene.looks[i] for i in self.things)

    def tellable(self) -> list[tuple[int, int, int]]:
        """Relations between things that words can tell apart."""
        looks = self.scene.looks
        return sorted(r for r in self.scene.relations if looks[r[0]] != looks[r[2]])

    def landscape(self) -> str:
        """A relation between regions of stuff, e.g. "the sky above the sea"."""
        first, predicate, second = self.rng.choice(sorted(self.scene.ground.relations()))
        self.facts.stuff.append((first, predicate, second))
        if turned := self.rng.random() < 0.4:
            first, second = second, first
        phrase = self.rng.choice(PHRASES[predicate, turned][:1])
        return f"the {CLASS_NAMES[first]} {phrase} the {CLASS_NAMES[second]}"


def _place(stuff: int) -> str:
    name = CLASS_NAMES[stuff]
    return PLACES.get(name, f"on the {name}")


def _related(speaker: _Speaker, place: float) -> tuple[str, str, str, int]:
    """Random relation (subject, wording, object), and the thing that is the object."""
    relation = speaker.relation(speaker.tellable())
    first, other = (relation[0], relation[2]) if speaker.rng.random() < 0.6 else (relation[2], relation[0])
    subject, target = speaker.name(first, place=place), speaker.name(other, place=place)
    return subject, speaker.phrase(first, relation), target, other


def _clause(speaker: _Speaker, place: float) -> str:
    subject, wording, target, _ = _related(speaker, place)
    return speaker.rng.choice([f"{subject} is {wording} {target}", f"there is {subject} {wording} {target}"])


def _pair_and_landscape(speaker: _Speaker) -> str:
    clause = _clause(speaker, 0.5)
    scenery = speaker.landscape()
    return speaker.rng.choice([f"{clause}, with {scenery}", f"in a picture with {scenery}, {clause}"])


def _pair_and_third(speaker: _Speaker) -> str:
    clause = _clause(speaker, 0.3)
    third = speaker.name(speaker.rng.choice(speaker.unnamed()), place=1.0, every=True)
    return speaker.rng.choice(
        [f"{clause}, and {third} can be seen", f"{clause}, with {third}", f"besides {third}, {clause}"]
    )


def _chain(speaker: _Speaker) -> str:
    subject, wording, target, middle = _related(speaker, 0.0)
    further = [(r, sum(r[::2]) - middle) for r in speaker.tellable() if middle in r[::2]]
    further = [(r, third) for r, third in further if speaker.is_new(third)]
    if not further:
        return f"{subject} is {wording} {target}, with {speaker.landscape()}"
    relation, third = further[speaker.rng.randrange(len(further))]
    last = speaker.name(third, place=0.6)
    return f"{subject} is {wording} {target}, which is {speaker.phrase(middle, relation)} {last}"


def _list(speaker: _Speaker) -> str:
    things = speaker.unnamed()
    speaker.rng.shuffle(things)
    names = [speaker.name(i, place=1.0, every=True) for i in things[:4]]
    return f"{', '.join(names[:-1])} and {names[-1]}, with {speaker.landscape()}"


FORMS = (_pair_and_landscape, _pair_and_third, _chain, _list)


def caption(scene: Scene, rng: random.Random, form: int) -> tuple[str, Facts]:
    """A sentence of one of the FORMS about the scene, and the facts that it states, which hold."""
    speaker = _Speaker(scene, rng)
    text = FORMS[form](speaker)
    return text[0].upper() + text[1:] + ".", speaker.facts


def captions(scene: Scene, rng: random.Random, count: int = 5, unlike: Scene | None = None) -> list[tuple[str, Facts]]:
    """`count` different captions of a scene with their facts.

    Facts that also hold of the scene `unlike` are drawn again up to 12 times: people, too, name what sets
    a picture apart from its neighbour.
    """
    forms = rng.sample(range(len(FORMS)), len(FORMS))
    drawn: dict[str, Facts] = {}
    while len(drawn) < count:
        for _ in range(12):
            text, facts = caption(scene, rng, forms[len(drawn) % len(FORMS)])
            if text not in drawn and (unlike is None or not holds(unlike, facts)):
                break
        drawn.setdefault(text, facts)
    return list(drawn.items())
