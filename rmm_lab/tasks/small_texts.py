"""How the small language tasks are made: a seeded grammar, one task modelled on each of the paper's.

Every example is a row ``{"input": text, "choices": [texts], "label": number of the right choice}``.
Its text decides its split, so that no input is in two splits.
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
_MORE = _words(
    "hotter bigger heavier faster older stronger higher longer louder wetter thicker brighter"
)
_LESS = _words(
    "colder smaller lighter slower younger weaker lower shorter quieter drier thinner darker"
)
OPPOSITES = tuple(zip(_MORE, _LESS, strict=True))
OPPOSITE = dict(OPPOSITES) | {less: more for more, less in OPPOSITES}
STUFF = _words(
    "fire stone river wheel tree engine star cloud road wall tower bridge tunnel motor drill wave cable "
    "blade mast beam pipe sail flag gate"
)
TIMES = ("", "yesterday ", "on monday ", "last week ", "one night ")
PLACES = ("in the park", "at home", "at noon", "by the lake", "at school", "on the hill")
DEEDS = _words("chased helped pushed called hugged followed painted pulled kissed warned")


def holdings(rng: random.Random, n: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """n people, their things and the things' colours, and two facts on each, person by person."""
    people, things, colours = (rng.sample(w, n) for w in (NAMES, THINGS, COLOURS))
    facts = [
        f"{p} has the {t} . the {t} is {c} ."
        for p, t, c in zip(people, things, colours, strict=True)
    ]
    rng.shuffle(facts)
    return people, things, colours, facts


def _shuffled(rng: random.Random, text: str, choices: list[str], right: str) -> Row:
    rng.shuffle(choices)
    return {"input": text, "choices": choices, "label": choices.index(right)}


# ------------------------------------------------------------------------------- the seven tasks


def colours(rng: random.Random) -> Row:
    """After QASC: two facts must be joined, one of eight choices. Chance 12.5 %."""
    people, things, hues, facts = holdings(rng, 3)
    choices = [f"a {thing} painted {colour}" for thing in things for colour in hues]
    right = choices[0]
    choices.remove(rng.choice(choices[1:]))  # nine pairs, eight choices
    text = f"question : what has {people[0]} ? facts : {' '.join(facts)}"
    return _shuffled(rng, text, choices, right)


ASK = {
    "home": ("where does the {a} live ?", "the {a} lives in the {v} .", HOMES),
    "food": ("what does the {a} eat ?", "the {a} eats {v} .", FOODS),
    "fear": ("whom does the {a} fear ?", "the {a} fears the {v} .", ANIMALS),
    "birth": ("when was the {a} born ?", "the {a} was born in {v} .", MONTHS),
}


def answers(rng: random.Random) -> Row:
    """After WikiQA: does the sentence answer the question? 78 % do not. Chance 50 %, balanced."""
    kind, other = rng.sample(list(ASK), 2)
    animal, second = rng.sample(ANIMALS, 2)
    told, about = kind, animal
    right = rng.random() < 0.25
    if not right:  # the wrong animal, the wrong matter, or both
        told, about = ((kind, second), (other, animal), (other, second))[rng.randrange(3)]
    value = rng.choice([v for v in ASK[told][2] if v not in (animal, second)])
    return {
        "input": f"question : {ASK[kind][0].format(a=animal)} "
        f"sentence : {rng.choice(SEASONS)}{ASK[told][1].format(a=about, v=value)}",
        "choices": ["no", "yes"],
        "label": int(right),
    }


def antonyms(rng: random.Random) -> Row:
    """After QuaRTz: a rule of proportion, applied to the case at hand. Chance 50 %."""
    cause, effect = (rng.choice(pair) for pair in rng.sample(OPPOSITES, 2))
    thing = rng.choice(STUFF)
    same = rng.random() < 0.5
    case, right = (cause, effect) if same else (OPPOSITE[cause], OPPOSITE[effect])
    text = f"rule : the {cause} the {thing} the {effect} it gets . now : the {thing} is {case} , so it gets"
    return _shuffled(rng, text, [effect, OPPOSITE[effect]], right)


def swaps(rng: random.Random) -> Row:
    """After PAWS: two sentences of the same words, one of which says the same. Chance 50 %."""
    (a, b), deed, place = rng.sample(NAMES, 2), rng.choice(DEEDS), rng.choice(PLACES)
    active, passive = f"{a} {deed} {b}", f"{b} was {deed} by {a}"
    swapped = {active: f"{a} was {deed} by {b}", passive: f"{b} {deed} {a}"}
    given = rng.choice([active, passive])
    right, wrong = f"{place} {passive if given == active else active}", f"{place} {swapped[given]}"
    return _shuffled(rng, f"paraphrase : {given} {place} .", [right, wrong], right)


# Story -> (setting, good sign, bad sign, filler, good ending, bad ending); {p} a person, {s} he or she.
STORIES: tuple[tuple[list[str], ...], ...] = (
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
    setting, good_sign, bad_sign, filler, good, bad = rng.choice(STORIES)
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
        "input": f"story : {' '.join(lines)} ending :".format(**fill),
        "choices": [choices[i].format(**fill) for i in order],
        "label": order.index(int(not happy)),
    }


# (sentence with {a}, {b} and {w}; the word that points at a; the word that points at b)
FITS = (
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
    text, points_at_a, points_at_b = rng.choice(FITS)
    a, b = rng.sample(THINGS, 2)
    right, word = (a, points_at_a) if rng.random() < 0.5 else (b, points_at_b)
    return _shuffled(rng, "fill : " + text.format(a=a, b=b, w=word), [a, b], right)


# (deed, reason that is about the first person, reason that is about the second)
REASONS = (
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
    a, b = rng.sample(MEN if man else WOMEN, 2)
    pronoun = "he" if man else "she"
    deed, about_a, about_b = rng.choice(REASONS)
    right, reason = (a, about_a) if rng.random() < 0.5 else (b, about_b)
    row = _shuffled(
        rng, f"{a} {deed} {b} because {pronoun} {reason} . {pronoun} means", [a, b], right
    )
    return row | {"input": f"text : {rng.choice(TIMES)}{row['input']}"}


TASKS: dict[str, Callable[[random.Random], Row]] = {
    task.__name__: task for task in (colours, answers, antonyms, swaps, endings, fitting, pronouns)
}


def split_of(text: str) -> str:
    """The split that an input belongs to, from its own text: 60 % train, 20 % reward, 20 % test."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.6 else "reward" if share < 0.8 else "test"


def rows_of(make: Callable[[random.Random], Any], task: str, split: str, n: int) -> list[Any]:
    """n rows of a split of the task that ``make`` draws rows of, always the same, each input once.

    ValueError where the grammar cannot say so many things.
    """
    rng = random.Random(f"{task} {split}")
    seen: dict[str, Any] = {}
    for _ in range(100 * n):
        row = make(rng)
        if split_of(row["input"]) == split:
            seen.setdefault(row["input"], row)
            if len(seen) == n:
                return list(seen.values())
    raise ValueError(f"{task}: expected {n} inputs of the {split} split, found {len(seen)} only")


def rows(task: str, split: str, n: int) -> list[Row]:
    """n rows of a split of a task, always the same, each input once.

    ValueError where the grammar cannot say so many things.
    """
    return rows_of(TASKS[task], task, split, n)
