"""The small language tasks: every label found again from the text alone, splits apart, words whole."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from data import pretraining, stories
from rmm_lab.tasks import small_texts as grammar
from rmm_lab.tasks import text_task as texts
from rmm_lab.tasks.small_texts import TASKS
from rmm_lab.tasks.text_rows import check

N = 400
ROWS = {name: grammar.rows(name, "reward", N) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_valid_distinct_and_always_the_same(name):
    for i, row in enumerate(ROWS[name]):
        assert check(row, f"row {i}") == row
    assert len({row["input"] for row in ROWS[name]}) == N
    assert grammar.rows(name, "reward", 5) == ROWS[name][:5]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("colours", 8),
        ("answers", 2),
        ("antonyms", 2),
        ("swaps", 2),
        ("endings", 2),
        ("fitting", 2),
        ("pronouns", 2),
    ],
)
def test_the_right_choice_stands_in_no_preferred_place(name, choices):
    places = Counter(row["label"] for row in ROWS[name])
    assert {len(row["choices"]) for row in ROWS[name]} == {choices}
    if name == "answers":  # skewed on purpose, as WikiQA is
        assert 0.7 < places[0] / N < 0.85
    else:  # within four standard deviations of even
        assert all(
            abs(places[i] - N / choices) < 4 * (N / choices * (1 - 1 / choices)) ** 0.5
            for i in range(choices)
        )


def test_a_grammar_that_cannot_say_so_much_is_refused(monkeypatch):
    row = {"input": "one thing", "choices": ["a", "b"], "label": 0}
    monkeypatch.setitem(grammar.TASKS, "poor", lambda rng: dict(row))
    with pytest.raises(ValueError, match="poor: expected 3 inputs"):
        grammar.rows("poor", grammar.split_of("one thing"), 3)


# ------------------------------------------------- each label, from the text, by rules written here


def test_colours_joins_two_facts():
    for row in ROWS["colours"]:
        person = re.search(r"what has (\w+) \?", row["input"])[1]
        thing = re.search(rf"\b{person} has the (\w+) \.", row["input"])[1]
        colour = re.search(rf"the {thing} is (\w+) \.", row["input"])[1]
        assert row["choices"][row["label"]] == f"a {thing} painted {colour}"


def test_answers_needs_the_animal_and_the_matter():
    said = {"lives": "where", "eats": "what", "fears": "whom", "was": "when"}
    for row in ROWS["answers"]:
        question, sentence = row["input"].removeprefix("question : ").split(" sentence : ")
        asked = re.search(r"(?:does|was) the (\w+)", question)[1]
        told = re.search(r"the (\w+) (\w+)", sentence)
        assert row["choices"] == ["no", "yes"]
        right = told[1] == asked and said[told[2]] == question.split()[0]
        assert row["label"] == int(right)


def test_antonyms_applies_the_rule():
    opposite = {}
    for more, less in grammar.OPPOSITES:
        opposite |= {more: less, less: more}
    for row in ROWS["antonyms"]:
        words = row["input"].split()
        cause, effect, case = words[3], words[7], words[words.index("is") + 1]
        assert set(row["choices"]) == {effect, opposite[effect]}
        expected = effect if case == cause else opposite[effect]
        assert case in (cause, opposite[cause])
        assert row["choices"][row["label"]] == expected


def roles(sentence):
    """(doer, deed, other) of a sentence in either voice."""
    words = [w for w in sentence.split() if w in grammar.NAMES or w in grammar.DEEDS]
    a, deed, b = words
    return (b, deed, a) if " was " in sentence else (a, deed, b)


def test_swaps_keeps_the_roles():
    for row in ROWS["swaps"]:
        given = roles(row["input"])
        right = row["choices"][row["label"]]
        wrong = row["choices"][1 - row["label"]]
        assert roles(right) == given
        assert roles(wrong) == given[::-1]
        assert Counter(right.split()) == Counter(wrong.split())  # the same words


def test_endings_follow_the_sign():
    signs = {}
    for _, good_sign, bad_sign, _, good, bad in grammar.STORIES:
        signs |= dict.fromkeys(good_sign, good) | dict.fromkeys(bad_sign, bad)
    for row in ROWS["endings"]:
        story = row["input"]
        (name,) = {w for w in story.split() if w in grammar.NAMES}
        pronoun = "he" if name in grammar.MEN else "she"
        (ends,) = [
            end for sign, end in signs.items() if sign.format(s=pronoun) in story
        ]  # one sign and no more
        assert row["choices"][row["label"]] in [e.format(p=name) for e in ends]
        assert row["choices"][1 - row["label"]] not in [e.format(p=name) for e in ends]
        assert story.count(" .") == 4  # four sentences, as in Story Cloze


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("fill : the cup does not fit into the bag because the _ is too big .", "cup"),
        ("fill : the cup does not fit into the bag because the _ is too small .", "bag"),
        ("fill : the kite breaks the lamp because the _ is too weak .", "lamp"),
        ("fill : the rope does not reach the bell because the _ is too high .", "bell"),
        ("fill : the key scratches the drum because the _ is so sharp .", "key"),
    ],
)
def test_fitting_by_hand(text, right):
    rng = random.Random(0)
    wanted = text.split()
    for _ in range(200_000):  # until the grammar says just this
        row = grammar.fitting(rng)
        if row["input"].split() == wanted:
            assert row["choices"][row["label"]] == right
            return
    pytest.fail(f"the grammar never says {text!r}")


def test_pronouns_means_the_one_whom_the_reason_fits():
    by_hand = {"felt grateful": 0, "had been kind": 1, "owed money": 0, "was ill": 1}
    seen = set()
    for row in grammar.rows("pronouns", "train", 2000):
        names = [w for w in row["input"].split() if w in grammar.NAMES]
        for reason, place in by_hand.items():
            if f" {reason} ." in row["input"]:
                assert row["choices"][row["label"]] == names[place]
                seen.add(reason)
    assert seen == set(by_hand)


# ------------------------------------------------------------------------------ what ships, pretraining


@pytest.mark.parametrize("name", TASKS)
def test_the_files_are_what_the_grammar_says_and_share_no_input(name):
    inputs = {}
    for split in ("reward", "test"):
        lines = texts.rows_file(name, split).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == grammar.rows(name, split, texts.SIZES[split])
        inputs[split] = {row["input"] for row in rows}
    inputs["train"] = {r["input"] for r in grammar.rows(name, "train", texts.train_size(name))}
    assert not inputs["train"] & inputs["reward"]
    assert not inputs["train"] & inputs["test"]
    assert not inputs["reward"] & inputs["test"]


def test_no_pretraining_text_asks_what_a_task_asks():
    rng = random.Random(1)
    said = set()
    for _ in range(20_000):
        said.add(stories.story(rng))
        said |= {stories.drill(rng)[0], stories.retell(rng)[0]}
    asked = [row["input"] for rows in ROWS.values() for row in rows]
    bare = {text.partition(" : ")[2] for text in asked}  # without "question :", "fill :", ...
    assert not said & (set(asked) | bare)


def test_span_corruption_puts_every_word_into_one_of_both():
    rng = random.Random(2)
    for _ in range(300):
        text = stories.story(rng)
        source, target = pretraining.corrupt(text, rng)
        gaps: dict[str, list[str]] = {}
        for word in target.split():
            if word in pretraining.SENTINELS:
                gaps[word] = []
                mark = word
            else:
                gaps[mark].append(word)
        back = [w for word in source.split() for w in gaps.get(word, [word])]
        assert " ".join(back) == text
        assert sum(map(len, gaps.values())) == max(1, round(0.2 * len(text.split())))
        assert list(gaps) == list(pretraining.SENTINELS[: len(gaps)])
