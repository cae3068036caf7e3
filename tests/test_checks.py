"""The engine of the exercises' checks: verdicts, messages, and a working function in any case."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rmm_lab.course import checks
from rmm_lab.course.checks import Essay, Exercise, Mistake, Quiz
from rmm_lab.errors import InputError

EXERCISES = {
    "99.mean": Exercise(
        reference=lambda x: x.mean(0),
        cases=lambda: [(torch.tensor([[1.0, 2.0], [3.0, 6.0]]),), (torch.arange(6.0).view(3, 2),)],
        mistakes=(
            Mistake("That is the sum.", lambda x: x.sum(0)),
            Mistake("The other axis.", lambda x: x.mean(1)),
        ),
        right="The mean over experts.",
    ),
    "99.quiz": Quiz(right="b", explained={"a": "Too low.", "b": "Just so.", "c": "Too <high>."}),
    "99.essay": Essay(
        rubric=("names a number", "says <what> it does not show"),
        model="It gains 3 points & no more.",
        needs={r"\d": "Name a number.", "not|no": "Say what it does not show."},
        words=(3, 9),
    ),
}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    known = EXERCISES

    def exercise(name):
        return known[name]

    monkeypatch.setattr(checks, "exercise", exercise)


def raises(x):
    raise KeyError("expert")


def in_place(x):
    x += 1
    return x.mean(0) - 1


@pytest.mark.parametrize(
    ("function", "status", "words"),
    [
        (lambda x: torch.stack(list(x)).mean(0), "correct", "The mean over experts."),
        (lambda x: x.double().numpy().mean(0), "correct", "The mean over experts."),
        (lambda x: x.mean(0) + 1e-8, "correct", "The mean over experts."),
        (lambda x: x[0] * 0 + sum(x), "wrong", "That is the sum."),
        (lambda x: x.sum(1) / 2, "wrong", "The other axis."),
        (lambda x: None, "wrong", "returns None"),
        (raises, "wrong", "KeyError: 'expert', for raises(x=[[1.0, 2.0], [3.0, 6.0]]), in line"),
        (raises, "wrong", ': raise KeyError("expert").'),
        (lambda: 0, "wrong", "TypeError"),
        (
            in_place,
            "wrong",
            "changes its arguments in place. Work on a copy: new = x.copy() (NumPy)",
        ),
        (lambda x: x.mean(), "wrong", "expected shape (2,), found ()"),
        (lambda x: x.mean(0) / 0, "wrong", "NaN or infinity"),
        (lambda x: x.mean(0) + 1, "wrong", "expected [2.0, 4.0], found [3.0, 5.0]"),
        (lambda x: "three", "wrong", "found 'three'"),
        (lambda x: [2.0, 4.0], "wrong", "expected a tensor, found a list: [2.0, 4.0]"),
        (torch.ones(2), "wrong", "Expected a function, found [1.0, 1.0]"),
    ],
)
def test_a_verdict_says_what_is_wrong(function, status, words):
    verdict = checks.check("99.mean", function)
    assert verdict.status == status, verdict
    assert words in verdict.message


def test_an_array_is_no_list(monkeypatch):
    task = Exercise(lambda x: [x, 2 * x], lambda: [(1.0,)], (), "")
    monkeypatch.setattr(checks, "exercise", lambda name: task)
    verdict = checks.check("99.list", lambda x: np.array([x, 2 * x]))
    assert verdict.status == "wrong"
    assert "expected a list, found a NumPy array: [1.0, 2.0]" in verdict.message
    assert checks.check("99.list", lambda x: (x, 2 * x)).status == "correct"


BIG = np.arange(12.0).reshape(3, 4)


def but_one(value, place=(1, 2)):
    changed = value.copy()
    changed[place] += 1
    return changed


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ((BIG, 3), (BIG, 2), ", second value: expected 3, found 2."),
        ((BIG, 3), (but_one(BIG), 3), ", first value, differs at [1, 2]: expected 6, found 7."),
        ((BIG, 3), (BIG[0], 3), ", first value: expected shape (3, 4), found (4,)."),
        ((BIG, 3), (BIG, None), ", second value: expected 3, found None."),
        ((BIG, 3), BIG, "expected a tuple, found a NumPy array"),
        (BIG, but_one(BIG), ", differs at [1, 2]: expected 6, found 7."),
        (BIG, BIG + 1, "expected [[0.0, 1.0, 2.0, 3.0]"),
        (np.zeros(20), np.ones(20), "[0] (the first of 20 entries): expected 0, found 1."),
        (np.zeros(20), np.full(20, np.nan), "NaN or infinity"),
        ([1, 2, 3], [1, 5, 3], ", second value: expected 2, found 5."),
        ([1, 2, 3], [1, 5, 4], "expected [1, 2, 3], found [1, 5, 4]"),
        ([1, 2, 3], [1, 2], "expected [1, 2, 3], found [1, 2]"),
        ({"a": 1, "b": {"c": [2, 3]}}, {"a": 1, "b": {"c": [2, 4]}}, "key 'b', key 'c', second value:"),
        ({"a": 1, "b": 2}, {"b": 3, "a": 4}, ", key 'a': expected 1, found 4."),
        ({"a": 1}, {"b": 1}, "expected {'a': 1}, found {'b': 1}"),
        (torch.eye(2), torch.eye(2) + torch.tensor([[0, 1], [0, 0]]), "differs at [0, 1]: expected 0"),
    ],
)  # fmt: skip
def test_the_part_that_is_wrong_is_named(monkeypatch, right, wrong, words):
    task = Exercise(lambda x: right, lambda: [(1,)], (), "")
    monkeypatch.setattr(checks, "exercise", lambda name: task)
    verdict = checks.check("99.part", lambda x: wrong)
    assert verdict.status == "wrong"
    assert words in verdict.message
    assert verdict.message.startswith("For <lambda>(x=1)")


def test_a_mistake_must_match_every_case():
    """Right by accident on the first case, the sum on the second: no hint about the sum."""

    def mixed(x):
        return x.mean(0) if len(x) == 2 else x.sum(0)

    verdict = checks.check("99.mean", mixed)
    assert verdict.status == "wrong"
    assert "sum" not in verdict.message
    assert "expected [2.0, 3.0], found [6.0, 9.0]" in verdict.message


def not_done(*_):
    raise NotImplementedError


def test_use_returns_a_working_function_in_any_case(capsys):
    x = torch.tensor([[1.0], [4.0]])
    own = lambda x: sum(x) / len(x)  # noqa: E731
    assert checks.use("99.mean", own).mine is own
    for bad in (not_done, raises, lambda x: x.sum(0)):
        torch.testing.assert_close(checks.use("99.mean", bad)(x), torch.tensor([2.5]))
    verdict = checks.check("99.mean", not_done)
    assert (verdict.status, "Replace the line" in verdict.message) == ("not attempted", True)
    assert checks.use("99.quiz", not_done)() == "b"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ("b", "correct", "(b) Just so.\n(a) Too low.\n(c) Too <high>."),
        (" B ", "correct", "Just so."),
        ("a", "wrong", "Too low."),
        ("c", "wrong", "Too <high>."),
        ("d", "wrong", "Expected one of 'a', 'b', 'c', found 'd'"),
        (2, "wrong", "found 2"),
        (None, "wrong", "found None"),
        (["b"], "wrong", "found ['b']"),
    ],
)
def test_a_quiz_explains_the_option_and_then_all(answer, status, words):
    verdict = checks.check("99.quiz", lambda: answer)
    assert verdict.status == status
    assert words in verdict.message


def test_a_quiz_not_attempted_or_broken_or_no_function():
    assert checks.check("99.quiz", not_done).status == "not attempted"
    assert "the letter, or a function that returns it" in checks.check("99.quiz", 2).message
    assert checks.check("99.quiz", "b").status == "correct"
    verdict = checks.check("99.quiz", lambda: 1 / 0)
    assert (verdict.status, "ZeroDivisionError" in verdict.message) == ("wrong", True)


def test_the_students_own_function_is_kept_and_tried_again():
    def own(x):
        return x.sum(0)

    kits = checks.use("99.mean", own)
    assert kits.mine is own
    assert "The sum" not in checks.box("99.mean", checks.check("99.mean", own))
    again = checks.use(
        "99.mean", kits
    )  # the cell below is run twice: the kit's answer is not the student's
    assert again.mine is own
    assert checks.VERDICTS["99.mean"]["status"] == "wrong"


def test_a_failing_case_can_be_had():
    verdict = checks.check("99.mean", lambda x: x.mean(0) if len(x) == 2 else x.sum(0))
    assert verdict.case == 1
    assert 'checks.case("99.mean", 1)' in checks.box("99.mean", verdict)
    (x,), expected = checks.case("99.mean", 1)
    torch.testing.assert_close(x.mean(0), expected)
    x += 1  # the next one is fresh
    torch.testing.assert_close(checks.case("99.mean", 1).arguments[0], x - 1)
    for name, i in (("99.mean", 2), ("99.mean", -1), ("99.quiz", 0)):
        with pytest.raises(InputError, match=f"exercise '{name}': expected"):
            checks.case(name, i)


def test_the_line_of_an_exception_is_the_students_own(monkeypatch):
    def also(function):
        function(torch.ones(1, 1))

    def own(x):
        if x.numel() == 1:
            raise ValueError("one")
        return x.mean(0)

    mean = EXERCISES["99.mean"]
    task = Exercise(mean.reference, mean.cases, (), "", also=also)
    monkeypatch.setattr(checks, "exercise", lambda name: task)
    assert ': raise ValueError("one").' in checks.check("99.mean", own).message


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("It gains 2 points, not more.", "written", "2. says <what> it"),
        ("two words", "wrong", "Expected 3 to 9 words, found 2."),
        ("word " * 10, "wrong", "found 10"),
        ("It gains nothing here.", "wrong", "Name a number."),
        ("It gains 2 points here.", "wrong", "Say what it does not show."),
        (7, "wrong", "Expected a text, found 7."),
    ],
)
def test_an_essay_has_a_rubric_once_it_has_what_it_needs(text, status, words):
    verdict = checks.check("99.essay", lambda: text)
    assert (verdict.status, words in verdict.message) == (status, True), verdict
    html = checks.box("99.essay", verdict)
    assert ("3 points &amp; no more" in html) == (status == "written")


def test_a_report_holds_every_exercise_of_a_notebook_that_was_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "VERDICTS", {})
    monkeypatch.setattr(checks, "_exercises", lambda number: EXERCISES)
    checks.use("99.mean", lambda x: x.sum(0))
    checks.use("99.mean", lambda x: x.mean(0))
    checks.use("99.essay", "It gains 2 points, not more.")
    file = checks.report(tmp_path / "own.json")
    found = json.loads(file.read_text("utf-8"))["exercises"]
    assert {name: (v["status"], v["tries"]) for name, v in found.items()} == {
        "99.mean": ("correct", 2),
        "99.quiz": ("not attempted", 0),
        "99.essay": ("written", 1),
    }
    assert found["99.essay"]["text"] == "It gains 2 points, not more."


def test_the_box_tells_the_status_in_words_and_escapes_the_rest():
    html = checks.box("99.quiz", checks.check("99.quiz", lambda: "c"))
    assert "99.quiz: wrong." in html
    assert "Too &lt;high&gt;." in html
    assert "kit's answer" in html
    html = checks.box("99.quiz", checks.check("99.quiz", lambda: "b"))
    assert "99.quiz: correct." in html
    assert "kit's answer" not in html


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([1, (2.0, "x")], [1, (2.0, "x")], True),
        ([1, 2], (1, 2), True),
        ([1, 2], [1, 2, 3], False),
        ({"a": np.ones(2)}, {"a": torch.ones(2)}, True),
        ({"a": 1}, {"b": 1}, False),
        (float("nan"), float("nan"), True),
        (1.0, 1.0 + 1e-3, False),
        ("a", 1, False),
        (None, 0, False),
        (np.array(["a"], dtype=object), 1.0, False),
        (True, 1, True),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, [1, 2], False),
    ],
)
def test_equality_of_answers(monkeypatch, a, b, same):
    assert equal(monkeypatch, a, b) is same
    assert equal(monkeypatch, b, a) is same


def test_objects_are_equal_if_their_attributes_are(monkeypatch):
    class Thing:
        def __init__(self, x):
            self.x = x

    assert equal(monkeypatch, Thing(1), Thing(1))
    assert not equal(monkeypatch, Thing(1), Thing(2))


def equal(monkeypatch, expected, answer) -> bool:
    """Whether a check takes the answer for the expected one."""
    task = Exercise(lambda x: expected, lambda: [(1,)], (), "")
    monkeypatch.setattr(checks, "exercise", lambda name: task)
    return checks.check("99.equal", lambda x: answer).status == "correct"


def test_an_unknown_exercise_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"exercise '98\.x': expected one of notebooks 00 to 12"):
        checks.exercise("98.x")
