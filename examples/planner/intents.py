"""The intents: for each, how people say it and which skill calls it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import vocabulary as v
from skills import Plan
from vocabulary import Place


@dataclass(frozen=True)
class Slots:
    """What one clause talks about: the words said, and the values that its plan uses.

    `subject` and `site` are the object and place of the clause's (verb, object, place) combination;
    either is None where the clause does not name one.
    """

    said: Mapping[str, str]
    value: Mapping[str, str | int]
    subject: str | None = None
    site: str | None = None


@dataclass(frozen=True)
class Intent:
    """One verb of the grammar."""

    name: str
    weight: float
    phrasings: tuple[str, ...]
    draw: Callable[[Random], Slots]
    steps: Callable[[Mapping[str, str | int]], Plan]
    bare: tuple[str, ...] = ()  # phrasings that name no place; their plan has no value "place"


def item(rng: Random) -> tuple[str, str, str]:
    """An object: (head noun, name in the plan, phrase as said)."""
    noun = rng.choice(v.OBJECTS)
    words: list[str] = []
    for group, chance in ((v.SIZES, 0.15), (v.COLORS, 0.4), (v.MATERIALS, 0.1)):
        if rng.random() < chance and len(words) < 2:
            words.append(rng.choice(group))
    name = " ".join([*words, noun])
    start = rng.random()
    said = f"the {name}" if start < 0.7 else f"{v.article(name)} {name}" if start < 0.92 else f"my {name}"
    return noun, name, said


def at(place: Place) -> str:
    return f"{place.preposition} {place.said}"


def _place_words(place: Place) -> dict[str, str]:
    return {"place": place.said, "at": at(place)}


def item_at(rng: Random) -> Slots:
    noun, name, said = item(rng)
    place = rng.choice(v.PLACES)
    words = {"obj": said, **_place_words(place)}
    return Slots(words, {"object": name, "place": place.name}, noun, place.name)


def item_to_person(rng: Random) -> Slots:
    base = item_at(rng)
    person = rng.choice(v.PEOPLE)
    return Slots({**base.said, "who": person}, {**base.value, "person": person}, base.subject, base.site)


def destination(rng: Random) -> tuple[Place, str, str]:
    """Where something is put: (place, relation, phrase as said)."""
    place = rng.choice(v.PLACES)
    relation = place.preposition
    if place.name in v.FURNITURE and rng.random() < 0.25:
        relation = rng.choice(("under", "next to"))
    return place, relation, f"{relation} {place.said}"


def item_moved(rng: Random) -> Slots:
    noun, name, said = item(rng)
    place, relation, where = destination(rng)
    source = rng.choice([p for p in v.PLACES if p.name != place.name])
    words = {"obj": said, "dest": where, "src": source.said, "at_src": at(source)}
    value = {"object": name, "relation": relation, "target": place.name, "place": source.name}
    return Slots(words, value, noun, place.name)


def person_at(rng: Random) -> Slots:
    person, place = rng.choice(v.PEOPLE), rng.choice(v.STANDING_PLACES)
    words = {"who": person, **_place_words(place)}
    return Slots(words, {"person": person, "place": place.name}, person, place.name)


def escort(rng: Random) -> Slots:
    base = person_at(rng)
    source = rng.choice([p for p in v.STANDING_PLACES if p.name != base.site])
    said = {**base.said, "src": source.said, "at_src": at(source)}
    return Slots(said, {"person": base.subject or "", "target": base.site or "", "place": source.name},
                 base.subject, base.site)  # fmt: skip


def speech(rng: Random) -> Slots:
    base = person_at(rng)
    words = rng.choice(list(v.TOPICS))
    value = {**base.value, "topic": v.TOPICS[words]}
    return Slots({**base.said, "topic": words}, value, base.subject, base.site)


def thing_at(things: tuple[str, ...], places: tuple[Place, ...] = v.PLACES) -> Callable[[Random], Slots]:
    def draw(rng: Random) -> Slots:
        thing, place = rng.choice(things), rng.choice(places)
        said = {"obj": f"the {thing}", "many": v.plural(thing), **_place_words(place)}
        return Slots(said, {"object": thing, "place": place.name}, thing, place.name)

    return draw


def pouring(rng: Random) -> Slots:
    base = thing_at(v.LIQUIDS)(rng)
    vessel = rng.choice(v.VESSELS)
    liquid = str(base.subject)
    words = rng.choice((liquid, f"some {liquid}", f"the {liquid}"))
    said = {**base.said, "obj": words, "into": f"the {vessel}"}
    return Slots(said, {**base.value, "into": vessel}, liquid, base.site)


def _number(rng: Random, most: int) -> tuple[int, str]:
    n = rng.randint(2, most)
    return n, v.NUMBERS[n] if rng.random() < 0.6 else str(n)


def cargo(rng: Random) -> Slots:
    base = thing_at(v.CARGO, v.DOCK_PLACES)(rng)
    n, said = _number(rng, 12)
    onto = rng.choice(("pallet", "cart", "truck", "trolley"))
    return Slots({**base.said, "n": said, "onto": f"the {onto}"}, {**base.value, "count": n, "onto": onto},
                 base.subject, base.site)  # fmt: skip


def rounds(rng: Random) -> Slots:
    place = rng.choice(v.PLACES)
    n, said = _number(rng, 9)
    times = "twice" if n == 2 and rng.random() < 0.5 else f"{said} times"
    return Slots({**_place_words(place), "times": times}, {"place": place.name, "rounds": n})


def duration(rng: Random) -> Slots:
    place = rng.choice(v.PLACES)
    unit = rng.choice(("second", "minute"))
    n = rng.choice((1, 2, 3, 5, 10)) if unit == "minute" else rng.choice((5, 10, 15, 20, 30, 45, 60, 90))
    count = v.NUMBERS[n] if n in v.NUMBERS and rng.random() < 0.5 else str(n)
    words = f"{count} {unit}" + ("" if n == 1 else "s")
    seconds = n * 60 if unit == "minute" else n
    return Slots({**_place_words(place), "time": words}, {"place": place.name, "seconds": seconds})


def topic(rng: Random) -> Slots:
    words = rng.choice(list(v.TOPICS))
    return Slots({"topic": words}, {"topic": v.TOPICS[words]})


def anywhere(rng: Random) -> Slots:
    place = rng.choice(v.PLACES)
    return Slots(_place_words(place), {"place": place.name})


def switching(state: str) -> Callable[[Mapping[str, str | int]], Plan]:
    return lambda s: [*go(s), {"skill": "switch", "object": s["object"], "state": state}]


def go(s: Mapping[str, str | int]) -> Plan:
    """The drive that a clause begins with, where it names a place."""
    return [{"skill": "go_to", "place": s["place"]}] if "place" in s else []


def reach(s: Mapping[str, str | int]) -> Plan:
    """Get hold of an object: drive to where it is said to be, or else look for it."""
    first: Plan = go(s) or [{"skill": "find", "object": s["object"]}]
    return [*first, {"skill": "pick", "object": s["object"]}]


def meet(s: Mapping[str, str | int]) -> Plan:
    return [*go(s), {"skill": "find_person", "person": s["person"]}]


def hand_to_user(s: Mapping[str, str | int]) -> Plan:
    return [{"skill": "go_to", "place": "user"}, {"skill": "give", "object": s["object"], "to": "user"}]


def hand_to_person(s: Mapping[str, str | int]) -> Plan:
    give: Plan = [{"skill": "give", "object": s["object"], "to": s["person"]}]
    return [{"skill": "find_person", "person": s["person"]}, *give]


def put_down(s: Mapping[str, str | int]) -> Plan:
    put: Plan = [{"skill": "put", "object": s["object"], "relation": s["relation"], "place": s["target"]}]
    return [{"skill": "go_to", "place": s["target"]}, *put]


def lead(s: Mapping[str, str | int], skill: str) -> Plan:
    end = {"place": s["target"]} if "target" in s else {}
    return [{"skill": skill, "person": s["person"], **end}]


def call(skill: str, *names: str) -> Callable[[Mapping[str, str | int]], Plan]:
    """The drive, then one call that takes the named values."""
    return lambda s: [*go(s), {"skill": skill, **{name: s[name] for name in names}}]


def cargo_call(skill: str) -> Callable[[Mapping[str, str | int]], Plan]:
    def steps(s: Mapping[str, str | int]) -> Plan:
        return [*go(s), {"skill": skill, "object": s["object"], "count": s["count"], "place": s["onto"]}]

    return steps
