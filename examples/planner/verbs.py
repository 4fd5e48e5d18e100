"""The table of verbs: every intent with its phrasings, and the clauses that lean on the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import intents as i
import vocabulary as v
from intents import Intent
from skills import Plan

INTENTS: tuple[Intent, ...] = (
    Intent("go", 1.0, ("go to {place}", "drive to {place}", "move to {place}", "head to {place}",
                       "navigate to {place}", "go over to {place}", "drive over to {place}"),
           i.anywhere, i.go),
    Intent("bring", 2.0, ("bring me {obj} from {place}", "get me {obj} from {place}",
                          "fetch me {obj} from {place}",
                          "fetch {obj} from {place} for me", "grab {obj} from {place} and bring it to me",
                          "pick up {obj} {at} and give it to me", "get {obj} that is {at} and hand it to me"),
           i.item_at, lambda s: [*i.reach(s), *i.hand_to_user(s)],
           ("bring me {obj}", "get me {obj}", "hand me {obj}", "give me {obj}",
            "find me {obj} and bring it here")),
    Intent("deliver", 1.6, ("take {obj} from {place} to {who}", "give {who} {obj} from {place}",
                            "bring {who} {obj} from {place}", "bring {obj} from {place} to {who}",
                            "get {obj} from {place} and hand it to {who}", "deliver {obj} {at} to {who}"),
           i.item_to_person, lambda s: [*i.reach(s), *i.hand_to_person(s)],
           ("give {obj} to {who}", "take {obj} to {who}", "bring {who} {obj}", "deliver {obj} to {who}")),
    Intent("move", 2.4, ("put {obj} from {src} {dest}", "move {obj} from {src} and put it {dest}",
                         "take {obj} from {src} and place it {dest}",
                         "pick up {obj} {at_src} and put it {dest}",
                         "grab {obj} {at_src} and leave it {dest}", "get {obj} from {src} and set it {dest}"),
           i.item_moved, lambda s: [*i.reach(s), *i.put_down(s)],
           ("put {obj} {dest}", "place {obj} {dest}", "set {obj} {dest}", "leave {obj} {dest}",
            "pick up {obj} and put it {dest}")),
    Intent("find", 1.2, ("find {obj} {at}", "look for {obj} {at}", "locate {obj} {at}",
                         "search for {obj} {at}",
                         "go to {place} and find {obj}", "search {place} for {obj}"),
           i.item_at, i.call("find", "object"), ("find {obj}", "look for {obj}", "locate {obj}",
                                                 "search for {obj}")),
    Intent("pick", 0.7, ("pick up {obj} {at}", "grab {obj} from {place}", "take {obj} from {place}"),
           i.item_at,
           i.reach, ("pick up {obj}", "grab {obj}", "take {obj}")),
    Intent("inspect", 0.8, ("inspect {obj} {at}", "check {obj} {at}", "examine {obj} {at}",
                            "have a look at {obj} {at}"),
           i.item_at, lambda s: [*i.go(s), {"skill": "find", "object": s["object"]},
                                  {"skill": "inspect", "object": s["object"]}],
           ("inspect {obj}", "check {obj}", "examine {obj}")),
    Intent("meet", 0.9, ("meet {who} {at}", "find {who} {at}", "look for {who} {at}",
                         "go to {place} and meet {who}"),
           i.person_at, i.meet, ("meet {who}", "find {who}", "look for {who}", "go to {who}")),
    Intent("follow", 1.1, ("follow {who} to {place}", "go after {who} to {place}"),
           i.person_at, lambda s: [{"skill": "find_person", "person": s["person"]},
                                    {"skill": "follow", "person": s["person"],
                                     **({"place": s["place"]} if "place" in s else {})}],
           ("follow {who}", "go after {who}")),
    Intent("escort", 1.4, ("guide {who} from {src} to {place}", "escort {who} from {src} to {place}",
                           "meet {who} {at_src} and lead them to {place}",
                           "accompany {who} from {src} to {place}"),
           i.escort, lambda s: [*i.meet(s), *i.lead(s, "guide")],
           ("guide {who} to {place}", "escort {who} to {place}", "lead {who} to {place}",
            "show {who} the way to {place}",
            "take {who} to {place}", "accompany {who} to {place}")),
    Intent("count", 1.0, ("count the {many} {at}", "tell me how many {many} there are {at}",
                          "tell me the number of {many} {at}", "go to {place} and count the {many}"),
           i.thing_at((*v.OBJECTS, *v.CARGO[1:])),
           lambda s: [*i.go(s), {"skill": "count", "object": s["object"]}, {"skill": "go_to",
                                                                            "place": "user"},
                      {"skill": "say", "topic": "count", "to": "user"}]),
    Intent("tell", 1.0, ("tell {who} {at} {topic}", "go to {place} and tell {who} {topic}",
                         "tell {topic} to {who} {at}"),
           i.speech, lambda s: [*i.meet(s), {"skill": "say", "topic": s["topic"], "to": s["person"]}],
           ("tell {who} {topic}", "tell {topic} to {who}")),
    Intent("report", 0.4, ("tell me {topic}", "let me know {topic}"), i.topic,
           lambda s: [{"skill": "say", "topic": s["topic"], "to": "user"}]),
    Intent("answer", 0.8, ("answer the question of {who} {at}",
                           "go to {place} and answer the question of {who}",
                           "answer {who} who is {at}"),
           i.person_at, lambda s: [*i.meet(s), {"skill": "answer", "to": s["person"]}],
           ("answer the question of {who}", "answer {who}")),
    Intent("open", 0.8, ("open {obj} {at}", "go to {place} and open {obj}"), i.thing_at(v.FIXTURES,
                                                                                        v.ROOM_PLACES),
           i.call("open", "object"), ("open {obj}", "open up {obj}")),
    Intent("close", 0.8, ("close {obj} {at}", "shut {obj} {at}", "go to {place} and close {obj}"),
           i.thing_at(v.FIXTURES, v.ROOM_PLACES), i.call("close", "object"), ("close {obj}", "shut {obj}")),
    Intent("clean", 1.0, ("clean {place} with {obj}", "wipe {place} with {obj}", "use {obj} to clean {place}",
                          "take {obj} and clean {place}"),
           i.thing_at(v.TOOLS),
           lambda s: [{"skill": "find", "object": s["object"]}, {"skill": "pick", "object": s["object"]},
                      *i.go(s),
                      {"skill": "clean", "place": s["place"]}]),
    Intent("tidy", 0.6, ("clean {place}", "clean up {place}", "tidy up {place}", "wipe {place}"), i.anywhere,
           lambda s: [*i.go(s), {"skill": "clean", "place": s["place"]}]),
    Intent("pour", 0.9, ("pour {obj} into {into} {at}", "fill {into} {at} with {obj}",
                         "put {obj} into {into} {at}"),
           i.pouring, i.call("pour", "object", "into"), ("pour {obj} into {into}", "fill {into} with {obj}")),
    Intent("load", 0.9, ("load {n} {many} onto {onto} {at}", "stack {n} {many} onto {onto} {at}",
                         "go to {place} and load {n} {many} onto {onto}"),
           i.cargo, i.cargo_call("load"), ("load {n} {many} onto {onto}", "stack {n} {many} onto {onto}")),
    Intent("unload", 0.9, ("unload {n} {many} from {onto} {at}", "take {n} {many} off {onto} {at}"),
           i.cargo, i.cargo_call("unload"), ("unload {n} {many} from {onto}", "take {n} {many} off {onto}")),
    Intent("patrol", 0.7, ("patrol {place} {times}", "walk around {place} {times}",
                           "check on {place} {times}"),
           i.rounds, lambda s: [*i.go(s), {"skill": "patrol", "place": s["place"], "rounds": s["rounds"]}]),
    Intent("watch", 0.5, ("patrol {place}", "keep watch over {place}", "guard {place}"), i.anywhere,
           lambda s: [*i.go(s), {"skill": "patrol", "place": s["place"], "rounds": 1}]),
    Intent("switch on", 0.8, ("turn on {obj} {at}", "switch on {obj} {at}", "turn {obj} {at} on"),
           i.thing_at(v.DEVICES, v.ROOM_PLACES), i.switching("on"), ("turn on {obj}", "switch on {obj}",
                                                                     "turn {obj} on")),
    Intent("switch off", 0.8, ("turn off {obj} {at}", "switch off {obj} {at}", "turn {obj} {at} off"),
           i.thing_at(v.DEVICES, v.ROOM_PLACES), i.switching("off"),
           ("turn off {obj}", "switch off {obj}", "turn {obj} off")),
    Intent("wait", 0.6, ("wait {at} for {time}", "go to {place} and wait for {time}"), i.duration,
           i.call("wait", "seconds"), ("wait for {time}", "wait {time}", "pause for {time}")),
    Intent("charge", 0.25, ("charge yourself", "go and charge", "recharge your battery",
                            "go back to your charger",
                            "return to the charging station"),
           i.anywhere, lambda s: [{"skill": "charge"}]),
    Intent("stop", 0.25, ("stop", "stop moving", "halt", "stop right there", "stop what you are doing"),
           i.anywhere, lambda s: [{"skill": "stop"}]),
)  # fmt: skip


@dataclass(frozen=True)
class FollowUp:
    """A clause about "it" or "them": the verb it counts as, and its plan given who or what that is."""

    verb: str
    phrasings: tuple[str, ...]
    steps: Callable[[Mapping[str, str | int]], Plan]


def _pick(s: Mapping[str, str | int]) -> Plan:
    return [{"skill": "pick", "object": s["object"]}]


AFTER_OBJECT = (
    FollowUp("move", ("put it {dest}", "place it {dest}", "take it and put it {dest}",
                      "pick it up and leave it {dest}"),
             lambda s: [*_pick(s), *i.put_down(s)]),
    FollowUp("bring", ("bring it to me", "give it to me", "take it and bring it to me",
                       "pick it up and hand it to me"),
             lambda s: [*_pick(s), *i.hand_to_user(s)]),
    FollowUp("deliver", ("give it to {who}", "bring it to {who}", "take it to {who}", "hand it to {who}"),
             lambda s: [*_pick(s), *i.hand_to_person(s)]),
    FollowUp("pick", ("pick it up", "take it", "grab it"), _pick),
)  # fmt: skip
AFTER_PERSON = (
    FollowUp("escort", ("guide them to {place}", "escort them to {place}", "take them to {place}",
                        "lead them to {place}"),
             lambda s: i.lead(s, "guide")),
    FollowUp("follow", ("follow them to {place}", "go after them to {place}"), lambda s: i.lead(s, "follow")),
    FollowUp("follow", ("follow them", "go after them"),
             lambda s: [{"skill": "follow", "person": s["person"]}]),
    FollowUp("tell", ("tell them {topic}", "let them know {topic}"),
             lambda s: [{"skill": "say", "topic": s["topic"], "to": s["person"]}]),
    FollowUp("answer", ("answer their question",), lambda s: [{"skill": "answer", "to": s["person"]}]),
)  # fmt: skip
