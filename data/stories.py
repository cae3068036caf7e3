"""What the small T5 is pretrained on: stories of the world that the tasks ask about, and exercises.

They describe the same world as ``rmm_lab.tasks.small_texts`` in other words than the tasks use.
"""

from __future__ import annotations

import random

from rmm_lab.tasks.small_texts import (
    ANIMALS,
    ASK,
    COLOURS,
    DEEDS,
    FITS,
    MEN,
    NAMES,
    OPPOSITE,
    OPPOSITES,
    REASONS,
    STORIES,
    STUFF,
    THINGS,
    WOMEN,
    holdings,
)


def story(rng: random.Random) -> str:
    """A few sentences of the world that the tasks ask about, for span corruption."""
    kind = rng.randrange(7)
    if kind == 0:
        people, things, hues, facts = holdings(rng, 2)
        i = rng.randrange(2)
        return f"{' '.join(facts)} so the {things[i]} of {people[i]} is {hues[i]} ."
    if kind == 1:
        animal = rng.choice(ANIMALS)
        told = rng.sample(list(ASK), 2)
        lines = [
            ASK[k][1].format(a=animal, v=rng.choice([v for v in ASK[k][2] if v != animal]))
            for k in told
        ]
        return f"{' '.join(lines)} {lines[0]}"
    if kind == 2:
        more, less = rng.choice(OPPOSITES)
        a, b = rng.sample(STUFF, 2)
        return f"if the {a} is {more} than the {b} , then the {b} is {less} than the {a} ."
    if kind == 3:
        (a, b), deed = rng.sample(NAMES, 2), rng.choice(DEEDS)
        return f"{a} {deed} {b} , that is , {b} was {deed} by {a} ."
    if kind == 4:
        setting, good_sign, bad_sign, filler, good, bad = rng.choice(STORIES)
        man = rng.random() < 0.5
        fill = {"p": rng.choice(MEN if man else WOMEN), "s": "he" if man else "she"}
        sign, end = rng.choice([(good_sign, good), (bad_sign, bad)])
        lines = [rng.choice(part) for part in (setting, sign, filler, end)]
        return " ".join(lines).format(**fill)
    if kind == 5:
        text, points_at_a, points_at_b = rng.choice(FITS)
        a, b = rng.sample(THINGS, 2)
        word, gap = rng.choice([(points_at_a, a), (points_at_b, b)])
        return text.replace("_", gap).format(a=a, b=b, w=word)
    man = rng.random() < 0.5
    a, b = rng.sample(MEN if man else WOMEN, 2)
    deed, about_a, about_b = rng.choice(REASONS)
    reason = rng.choice([f"{a} {about_a}", f"{b} {about_b}"])
    return f"{a} {deed} {b} because {reason} ."


def retell(rng: random.Random, least: int = 1) -> tuple[str, str]:
    """A longer exercise, (input, target): what ``least`` to 3 people have and what colour it is."""
    n = rng.randrange(least, 4)
    people, things, hues, facts = holdings(rng, n)
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


def _deed(rng: random.Random, doer: str, deed: str, other: str) -> str:
    """The deed in the active or in the passive voice."""
    return rng.choice([f"{doer} {deed} {other}", f"{other} was {deed} by {doer}"])


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
        (a, b), deed = rng.sample(NAMES, 2), rng.choice(DEEDS)
        text = _deed(rng, a, deed, b)
        return (f"{text} . who {deed} ?", a) if rng.random() < 0.5 else (f"{text} . whom ?", b)
    man = rng.random() < 0.5
    a, b = rng.sample(MEN if man else WOMEN, 2)
    deed, about_a, about_b = rng.choice(REASONS)
    who, reason = rng.choice([(a, about_a), (b, about_b)])
    return f"{a} {deed} {b} . one of them {reason} . who ?", who
