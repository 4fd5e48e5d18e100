"""The words of the planner's world: objects, places, people, devices, and how they are said."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTS = (
    "mug", "cup", "plate", "bowl", "spoon", "fork", "knife", "bottle", "book", "newspaper",
    "magazine", "phone", "remote control", "pillow", "blanket", "towel", "toothbrush", "candle",
    "vase", "toy car", "teddy bear", "ball", "backpack", "umbrella", "hat", "jacket", "key", "wallet",
    "laptop", "tablet", "charger", "notebook", "pen", "stapler", "apple", "banana", "lemon",
    "sandwich", "cereal box", "coffee can", "milk carton", "juice box", "soda can", "sponge",
    "drill", "hammer", "wrench", "screwdriver", "cable", "paint can", "helmet", "first aid kit",
    "battery", "flashlight", "box", "parcel",
)  # fmt: skip
SIZES = ("small", "large", "big", "tiny", "heavy", "empty", "old", "new")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "gray", "orange")
MATERIALS = ("wooden", "plastic", "metal", "cardboard")

CARGO = ("box", "crate", "parcel", "barrel", "sack", "bin", "drum", "tire", "package", "container")
TOOLS = ("sponge", "towel", "mop", "vacuum cleaner", "brush", "broom", "cloth")
LIQUIDS = ("water", "milk", "juice", "coffee", "tea", "lemonade", "soup", "oil")
VESSELS = ("cup", "mug", "bowl", "jug", "bottle", "bucket", "teapot", "pot")
DEVICES = (
    "light", "fan", "tv", "radio", "heater", "coffee machine", "air conditioner", "printer", "alarm",
    "dishwasher", "oven",
)  # fmt: skip
FIXTURES = (
    "door", "window", "cabinet", "drawer", "cupboard", "microwave", "fridge", "gate", "curtain",
    "safe", "locker", "toolbox",
)  # fmt: skip
PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jack", "Kate", "Liam",
    "Maria", "Noah", "Olga", "Peter", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe", "Omar",
)  # fmt: skip
TOPICS = {
    "the time": "time", "the weather": "weather", "the date": "date", "a joke": "joke",
    "the news": "news", "your name": "name", "the day of the week": "weekday",
    "your battery level": "battery",
}  # fmt: skip

ROOMS = (
    "kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "pantry",
    "laundry room", "dining room", "study", "basement", "library", "workshop", "warehouse",
    "meeting room", "storage room", "lobby",
)  # fmt: skip
SURFACES = (
    "kitchen table", "desk", "shelf", "counter", "coffee table", "sofa", "bed", "bookshelf", "workbench",
    "nightstand", "tv stand", "side table", "dining table", "conveyor belt", "storage rack",
)  # fmt: skip
CONTAINERS = ("fridge", "cabinet", "drawer", "sink", "trash can", "basket", "cupboard", "wardrobe")
ZONES = ("entrance", "front door", "loading dock", "packing station", "reception", "exit")
NUMBERED = tuple(f"{name} {n}" for name in ("aisle", "bay") for n in range(1, 10))

NUMBERS = {
    1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
    10: "ten", 11: "eleven", 12: "twelve",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A place: its name in plans, how it is said, and the preposition that goes with it."""

    name: str
    said: str
    preposition: str


def _places() -> tuple[Place, ...]:
    groups = ((ROOMS, "in"), (SURFACES, "on"), (CONTAINERS, "in"), (ZONES, "at"))
    named = [Place(name, f"the {name}", prep) for names, prep in groups for name in names]
    return (*named, *(Place(name, name, "in") for name in NUMBERED))


PLACES = _places()
ROOM_PLACES = tuple(p for p in PLACES if p.name in ROOMS)
DOCK_PLACES = tuple(p for p in PLACES if p.name in (*ZONES, *NUMBERED, "warehouse", "storage room"))
STANDING_PLACES = tuple(p for p in PLACES if p.name not in (*SURFACES, *CONTAINERS))  # where people are
FURNITURE = frozenset((*SURFACES, *CONTAINERS))


def plural(noun: str) -> str:
    """The plural of a noun of this vocabulary (the last word carries it)."""
    if noun.endswith("fe"):
        return noun[:-2] + "ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def article(phrase: str) -> str:
    """The indefinite article for a phrase of this vocabulary."""
    return "an" if phrase[0] in "aeiou" else "a"
