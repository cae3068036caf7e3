"""Typical answers of students, from each notebook's tests: WRONG ones meet their hint, RIGHT ones pass."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
from answers import function_of

from rmm_lab.course import checks, exercises

LESSONS = [module.name for module in pkgutil.iter_modules(exercises.__path__)]
WRONG = [answer for lesson in LESSONS for answer in import_module(f"test_{lesson}").WRONG]
RIGHT = [answer for lesson in LESSONS for answer in import_module(f"test_{lesson}").RIGHT]
TASKS = {
    name: task
    for lesson in LESSONS
    for name, task in import_module(f"rmm_lab.course.exercises.{lesson}").EXERCISES.items()
}
QUIZZES = [name for name, task in TASKS.items() if isinstance(task, checks.Quiz)]


@pytest.mark.parametrize(("name", "code", "phrase"), WRONG, ids=[f"{n}-{p}" for n, _, p in WRONG])
def test_a_wrong_answer_meets_the_hint_that_is_meant(name, code, phrase):
    verdict = checks.check(name, function_of(code))
    assert verdict.status == "wrong"
    assert phrase in verdict.message


@pytest.mark.parametrize(("name", "code"), RIGHT, ids=[n for n, _ in RIGHT])
def test_another_right_answer_passes(name, code):
    verdict = checks.check(name, function_of(code))
    assert verdict.status == "correct", verdict.message


@pytest.mark.parametrize("name", QUIZZES)
def test_each_option_of_a_quiz_says_why(name):
    quiz = TASKS[name]
    told = {option: checks.check(name, lambda o=option: o) for option in quiz.explained}
    assert [option for option, v in told.items() if v.status == "correct"] == [quiz.right]
    for option, verdict in told.items():
        assert verdict.message.startswith(f"({option}) {quiz.explained[option]}")


def test_every_function_to_write_is_answered_wrongly_and_rightly():
    functions = {name for name, task in TASKS.items() if isinstance(task, checks.Exercise)}
    assert functions <= {name for name, *_ in WRONG} & {name for name, _ in RIGHT}
