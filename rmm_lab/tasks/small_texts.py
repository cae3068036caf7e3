"""How the small language tasks are made: a seeded grammar, one task modelled on each of the paper's.

Every example is a row ``{"input": text, "choices": [texts], "label": number of the right choice}``.
Its text decides its split, so that no input is in two splits. ``story`` writes the text that the small T5
is pretrained on, and ``drill`` its short exercises; both describe the same world in other words than the
tasks use.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


MEN = _words("tom ben max leo sam dan jack paul finn carl hugo otto")
WOMEN = _words("anna mia eva lucy kate nora ida rosa emma jane lena ruth")
NAMES = MEN + WOMEN
THINGS = _words(
    "box cup bag hat book ball lamp key coat chair boat kite shoe ring drum bell vase clock brush rope "
    "plate spoon knife mirror basket pillow hammer ladder barrel candle"
)
COLOURS = _words("red blue green white black yellow brown pink")
ANIMALS = _words(
    "fox owl bear wolf hare mouse deer frog crow duck goat snake horse sheep cat dog hen pig bee ant eel "
    "lynx mole otter"
)
SEASONS = ("", "in spring ", "in summer ", "in autumn ", "in winter ", "long ago ")
HOMES = _words("wood lake barn cave field house hill river garden tree")
FOODS = _words("fish corn grass nuts milk bread fruit seeds eggs meat")
MONTHS = _words("january march april june july august october december")
# Opposites as comparatives: (more, less).
OPPOSITES = (
    ("hotter", "colder"),
    ("bigger", "smaller"),
    ("heavier", "lighter"),
    ("faster", "slower"),
    ("older", "younger"),
    ("stronger", "weaker"),
    ("higher", "lower"),
    ("longer", "shorter"),
    ("louder", "quieter"),
    ("wetter", "drier"),
    ("thicker", "thinner"),
    ("brighter", "darker"),
)
OPPOSITE = dict(OPPOSITES) | {less: more for more, less in OPPOSITES}
STUFF = _words(
    "fire stone river wheel tree engine star cloud road wall tower bridge tunnel motor drill wave cable "
    "blade mast beam pipe sail flag gate"
)
TIMES = ("", "yesterday ", "on monday ", "last week ", "one night ")
PLACES = ("in the park", "at home", "at noon", "by the lake", "at school", "on the hill")
DEEDS = _words("chased helped pushed called hugged followed painted pulled kissed warned")


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    a, b = rng.sample(words, 2)
    return a, b


def _holdings(rng: random.Random, n: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """n people, their things and the things' colours, and two facts on each, person by person."""
    people, things, colours = (rng.sample(w, n) for w in (NAMES, THINGS, COLOURS))
    facts = [
        f"{p} has the {t} . the {t} is {c} ."
        for p, t, c in zip(people, things, colours, strict=True)
    ]
    rng.shuffle(facts)
    return people, things, colours, facts


# ------------------------------------------------------------------------------- the seven tasks


def colours(rng: random.Random) -> Row:
    """After QASC: two facts must be joined, one of eight choices. Chance 12.5 %."""
    people, things, hues, facts = _holdings(rng, 3)
    right = (things[0], hues[0])
    pairs = [(t, c) for t in things for c in hues]
    pairs.remove(rng.choice([p for p in pairs if p != right]))  # nine pairs, eight choices
    rng.shuffle(pairs)
    return {
        "input": f"question : what has {people[0]} ? facts : {' '.join(facts)}",
        "choices": [f"a {thing} painted {colour}" for thing, colour in pairs],
        "label": pairs.index(right),
    }


_ASK = {
    "home": ("where does the {a} live ?", "the {a} lives in the {v} .", HOMES),
    "food": ("what does the {a} eat ?", "the {a} eats {v} .", FOODS),
    "fear": ("whom does the {a} fear ?", "the {a} fears the {v} .", ANIMALS),
    "birth": ("when was the {a} born ?", "the {a} was born in {v} .", MONTHS),
}


def answers(rng: random.Random) -> Row:
    """After WikiQA: does the sentence answer the question? 78 % do not. Chance 50 %, balanced."""
    kind, other = _two(rng, list(_ASK))
    animal, second = _two(rng, ANIMALS)
    right = rng.random() < 0.25
    if not right:  # the wrong animal, the wrong matter, or both
        case = rng.randrange(3)
        told, about = (kind, second) if case == 0 else (other, animal if case == 1 else second)
    else:
        told, about = kind, animal
    value = rng.choice([v for v in _ASK[told][2] if v not in (animal, second)])
    return {
        "input": f"question : {_ASK[kind][0].format(a=animal)} "
        f"sentence : {rng.choice(SEASONS)}{_ASK[told][1].format(a=about, v=value)}",
        "choices": ["no", "yes"],
        "label": int(right),
    }


def antonyms(rng: random.Random) -> Row:
    """After QuaRTz: a rule of proportion, applied to the case at hand. Chance 50 %."""
    cause, effect = (rng.choice(pair) for pair in rng.sample(OPPOSITES, 2))
    thing = rng.choice(STUFF)
    same = rng.random() < 0.5
    case = cause if same else OPPOSITE[cause]
    choices = [effect, OPPOSITE[effect]]
    rng.shuffle(choices)
    return {
        "input": f"rule : the {cause} the {thing} the {effect} it gets . "
        f"now : the {thing} is {case} , so it gets",
        "choices": choices,
        "label": choices.index(effect if same else OPPOSITE[effect]),
    }


def _deed(rng: random.Random, doer: str, deed: str, other: str) -> str:
    """The deed in the active or in the passive voice."""
    return rng.choice([f"{doer} {deed} {other}", f"{other} was {deed} by {doer}"])


def swaps(rng: random.Random) -> Row:
    """After PAWS: two sentences of the same words, one of which says the same. Chance 50 %."""
    (a, b), deed, place = _two(rng, NAMES), rng.choice(DEEDS), rng.choice(PLACES)
    active, passive = f"{a} {deed} {b}", f"{b} was {deed} by {a}"
    swapped = {active: f"{a} was {deed} by {b}", passive: f"{b} {deed} {a}"}
    given = rng.choice([active, passive])
    other = passive if given == active else active
    choices = [f"{place} {other}", f"{place} {swapped[given]}"]
    rng.shuffle(choices)
    return {
        "input": f"paraphrase : {given} {place} .",
        "choices": choices,
        "label": choices.index(f"{place} {other}"),
    }


# Story -> (setting, good sign, bad sign, filler, good ending, bad ending); {p} a person, {s} he or she.
_STORIES: tuple[tuple[list[str], ...], ...] = (
    (
        ["{p} was to run a race .", "there was a race in the town and {p} ran ."],
        ["{s} had trained every day .", "{s} was very fast that year ."],
        ["{s} had never trained .", "{s} had hurt a foot ."],
        ["many people came to watch .", "it was a sunny day .", "the race began at noon ."],
        ["{p} won the race .", "{p} came in first ."],
        ["{p} lost the race .", "{p} came in last ."],
    ),
    (
        ["{p} baked a cake .", "{p} made a cake for a friend ."],
        ["{s} took fresh eggs and sugar .", "{s} read the recipe with care ."],
        ["{s} took salt and no sugar .", "{s} forgot the cake in the oven ."],
        ["the friend came to tea .", "they sat down at the table .", "the kitchen was warm ."],
        ["the cake was sweet and good .", "the friend ate all of the cake ."],
        ["the cake was bad .", "nobody ate the cake ."],
    ),
    (
        ["{p} planted a rose .", "{p} put a flower in the garden ."],
        ["{s} gave it water every day .", "there was much rain and sun ."],
        ["{s} never gave it water .", "a goat was in the garden at night ."],
        ["summer came .", "two weeks went by .", "{s} went out to see it ."],
        ["the flower was tall and red .", "the plant was in full bloom ."],
        ["the flower was dead .", "the plant was gone ."],
    ),
    (
        ["{p} had a test at school .", "the teacher gave {p} a test ."],
        ["{s} had read all the books .", "{s} knew every word by heart ."],
        ["{s} had played all week .", "{s} had lost the books ."],
        ["the class was quiet .", "the test took an hour .", "{s} sat by the window ."],
        ["{p} got the best mark .", "the teacher was proud of {p} ."],
        ["{p} failed the test .", "the teacher was angry with {p} ."],
    ),
    (
        ["{p} took a boat out to sea .", "{p} sailed to the island ."],
        ["the wind was soft .", "the sky was clear and blue ."],
        ["a storm came up .", "there was a hole in the boat ."],
        ["{s} sang a song .", "the island was far away .", "a bird flew over the mast ."],
        ["{p} came home safe .", "{p} reached the island ."],
        ["{p} had to swim home .", "the boat sank ."],
    ),
    (
        ["{p} lost a dog .", "the dog of {p} ran away ."],
        ["a boy had seen it in the park .", "it had a name on its collar ."],
        ["it had no collar .", "nobody had seen it ."],
        ["{s} looked in every street .", "it was cold and dark .", "{s} called its name ."],
        ["{p} found the dog .", "the dog was home again ."],
        ["{p} never found the dog .", "the dog was gone for good ."],
    ),
    (
        ["{p} climbed a mountain .", "{p} walked up to the summit ."],
        ["{s} had a map and good boots .", "{s} knew the path well ."],
        ["{s} had no map and thin shoes .", "there was fog on the path ."],
        ["{s} started before dawn .", "an eagle cried above .", "{s} drank from a spring ."],
        ["{p} saw the valley from the summit .", "{p} stood on top at last ."],
        ["{p} got lost and turned back .", "{p} never reached the top ."],
    ),
    (
        ["{p} played the piano for guests .", "{p} gave a concert ."],
        ["{s} had practised for months .", "{s} had a gift for music ."],
        ["{s} had not practised at all .", "the piano was out of tune ."],
        ["the hall was full .", "{s} wore a new coat .", "the lights went down ."],
        ["the guests cheered loudly .", "everybody praised the music ."],
        ["the guests left early .", "nobody liked the music ."],
    ),
)


def endings(rng: random.Random) -> Row:
    """After Story Cloze: four sentences, then the right one of two endings. Chance 50 %."""
    setting, good_sign, bad_sign, filler, good, bad = rng.choice(_STORIES)
    man = rng.random() < 0.5
    person, pronoun = rng.choice(MEN if man else WOMEN), "he" if man else "she"
    happy = rng.random() < 0.5
    sign = rng.choice(good_sign if happy else bad_sign)
    rest = rng.sample(filler, 2)
    lines = [rng.choice(setting), *rng.sample([sign, rest[0]], 2), rest[1]]
    choices = [rng.choice(good), rng.choice(bad)]
    order = rng.sample([0, 1], 2)
    fill = {"p": person, "s": pronoun}
    return {
        "input": "story : " + " ".join(line.format(**fill) for line in lines) + " ending :",
        "choices": [choices[i].format(**fill) for i in order],
        "label": order.index(int(not happy)),
    }


# (sentence with {a}, {b} and {w}; the word that points at a; the word that points at b)
_FITS = (
    ("the {a} does not fit into the {b} because the _ is too {w} .", "big", "small"),
    ("the {a} does not stand on the {b} because the _ is too {w} .", "wide", "narrow"),
    ("the {a} breaks the {b} because the _ is too {w} .", "heavy", "weak"),
    ("the {a} does not reach the {b} because the _ is too {w} .", "short", "high"),
    ("the {a} hides the {b} because the _ is so {w} .", "large", "tiny"),
    ("the {a} scratches the {b} because the _ is so {w} .", "sharp", "soft"),
    ("the {a} sinks the {b} because the _ is so {w} .", "massive", "flimsy"),
    ("the {a} rolls off the {b} because the _ is too {w} .", "round", "steep"),
    ("the {a} melts the {b} because the _ is too {w} .", "hot", "frozen"),
)


def fitting(rng: random.Random) -> Row:
    """After Winogrande: which of two things fills the gap? Chance 50 %."""
    text, points_at_a, points_at_b = rng.choice(_FITS)
    a, b = _two(rng, THINGS)
    first = rng.random() < 0.5
    choices = [a, b]
    rng.shuffle(choices)
    return {
        "input": "fill : " + text.format(a=a, b=b, w=points_at_a if first else points_at_b),
        "choices": choices,
        "label": choices.index(a if first else b),
    }


# (deed, reason that is about the first person, reason that is about the second)
_REASONS = (
    ("thanked", "felt grateful", "had been kind"),
    ("feared", "was shy", "was cruel"),
    ("envied", "had little", "had won"),
    ("paid", "owed money", "had worked"),
    ("scolded", "was angry", "had lied"),
    ("visited", "felt lonely", "was ill"),
    ("praised", "was impressed", "had done well"),
    ("fed", "had much bread", "was hungry"),
    ("woke", "was up early", "had slept long"),
    ("asked", "did not know", "knew it all"),
    ("trusted", "was naive", "was honest"),
    ("carried", "was strong", "was tired"),
    ("copied", "had no idea", "had many ideas"),
    ("hired", "needed help", "was skilled"),
)


def pronouns(rng: random.Random) -> Row:
    """After WSC: whom does the pronoun mean? Chance 50 %."""
    man = rng.random() < 0.5
    a, b = _two(rng, MEN if man else WOMEN)
    pronoun = "he" if man else "she"
    deed, about_a, about_b = rng.choice(_REASONS)
    first = rng.random() < 0.5
    reason = about_a if first else about_b
    choices = [a, b]
    rng.shuffle(choices)
    return {
        "input": f"text : {rng.choice(TIMES)}{a} {deed} {b} because {pronoun} {reason} . {pronoun} means",
        "choices": choices,
        "label": choices.index(a if first else b),
    }


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "colours": colours,
    "answers": answers,
    "antonyms": antonyms,
    "swaps": swaps,
    "endings": endings,
    "fitting": fitting,
    "pronouns": pronouns,
}


def split_of(text: str) -> str:
    """The split that an input belongs to, from its own text: 60 % train, 20 % reward, 20 % test."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.6 else "reward" if share < 0.8 else "test"


def rows(task: str, split: str, n: int) -> list[Row]:
    """n rows of a split of a task, always the same, each input once.

    ValueError where the grammar cannot say so many things.
    """
    rng = random.Random(f"{task} {split}")
    seen: dict[str, Row] = {}
    for _ in range(100 * n):
        row = TASKS[task](rng)
        if split_of(row["input"]) == split:
            seen.setdefault(row["input"], row)
            if len(seen) == n:
                return list(seen.values())
    raise ValueError(f"{task}: expected {n} inputs of the {split} split, found {len(seen)} only")


# ------------------------------------------------------------------------------- pretraining text


def story(rng: random.Random) -> str:
    """A few sentences of the world that the tasks ask about, for span corruption."""
    kind = rng.randrange(7)
    if kind == 0:
        people, things, hues, facts = _holdings(rng, 2)
        i = rng.randrange(2)
        return f"{' '.join(facts)} so the {things[i]} of {people[i]} is {hues[i]} ."
    if kind == 1:
        animal = rng.choice(ANIMALS)
        told = rng.sample(list(_ASK), 2)
        lines = [
            _ASK[k][1].format(a=animal, v=rng.choice([v for v in _ASK[k][2] if v != animal]))
            for k in told
        ]
        return f"{' '.join(lines)} {lines[0]}"
    if kind == 2:
        more, less = rng.choice(OPPOSITES)
        a, b = _two(rng, STUFF)
        return f"if the {a} is {more} than the {b} , then the {b} is {less} than the {a} ."
    if kind == 3:
        (a, b), deed = _two(rng, NAMES), rng.choice(DEEDS)
        return f"{a} {deed} {b} , that is , {b} was {deed} by {a} ."
    if kind == 4:
        setting, good_sign, bad_sign, filler, good, bad = rng.choice(_STORIES)
        man = rng.random() < 0.5
        fill = {"p": rng.choice(MEN if man else WOMEN), "s": "he" if man else "she"}
        sign, end = rng.choice([(good_sign, good), (bad_sign, bad)])
        lines = [rng.choice(part) for part in (setting, sign, filler, end)]
        return " ".join(lines).format(**fill)
    if kind == 5:
        text, points_at_a, points_at_b = rng.choice(_FITS)
        a, b = _two(rng, THINGS)
        word, gap = rng.choice([(points_at_a, a), (points_at_b, b)])
        return text.replace("_", gap).format(a=a, b=b, w=word)
    man = rng.random() < 0.5
    a, b = _two(rng, MEN if man else WOMEN)
    deed, about_a, about_b = rng.choice(_REASONS)
    reason = rng.choice([f"{a} {about_a}", f"{b} {about_b}"])
    return f"{a} {deed} {b} because {reason} ."


def retell(rng: random.Random, least: int = 1) -> tuple[str, str]:
    """A longer exercise, (input, target): what ``least`` to 3 people have and what colour it is."""
    n = rng.randrange(least, 4)
    people, things, hues, facts = _holdings(rng, n)
    order = rng.sample(range(n), n)
    asked = " , ".join(people[i] for i in order)
    told = " , ".join(f"{things[i]} {hues[i]}" for i in order)
    return f"{' '.join(facts)} tell of {asked} .", told


def recall(rng: random.Random, least: int = 1) -> tuple[str, str]:
    """``least`` to 3 pairs of a person and a thing; whose thing is asked: (input, target)."""
    n = rng.randrange(least, 4)
    people, things = rng.sample(NAMES, n), rng.sample(THINGS, n)
    i = rng.randrange(n)
    pairs = " , ".join(f"{p} {t}" for p, t in zip(people, things, strict=True))
    return f"pairs : {pairs} . now {people[i]} .", things[i]


def drill(rng: random.Random) -> tuple[str, str]:
    """One short exercise, (input, target): find, recall, opposites, who did what, who felt so."""
    kind = rng.choice(("find", "find", "recall", "recall", "recall", "opposite", "deed", "reason"))
    if kind == "find":
        words = rng.choice([NAMES, THINGS, COLOURS])
        listed = rng.sample(words, rng.randrange(1, 5))
        there = rng.random() < 0.5
        word = rng.choice(listed if there else [w for w in words if w not in listed])
        return f"list : {' '.join(listed)} . is there {word} ?", "there" if there else "none"
    if kind == "recall":
        return recall(rng)
    if kind == "opposite":
        word = rng.choice(list(OPPOSITE))
        return f"opposite of {word} ?", OPPOSITE[word]
    if kind == "deed":
        (a, b), deed = _two(rng, NAMES), rng.choice(DEEDS)
        text = _deed(rng, a, deed, b)
        return (f"{text} . who {deed} ?", a) if rng.random() < 0.5 else (f"{text} . whom ?", b)
    man = rng.random() < 0.5
    a, b = _two(rng, MEN if man else WOMEN)
    deed, about_a, about_b = rng.choice(_REASONS)
    who, reason = rng.choice([(a, about_a), (b, about_b)])
    return f"{a} {deed} {b} . one of them {reason} . who ?", who
