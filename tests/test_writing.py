"""The small writing tasks: their grammars say what they claim, checked by other means."""

import random
import re

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import drills
from rmm_lab.families.shipped import model_folder
from rmm_lab.reward import predict
from rmm_lab.search import uniform
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks import small_writing
from rmm_lab.tasks.small_texts import split_of


def row_of(task, n=300):
    return small_writing.rows(task, "test", n)


@pytest.mark.parametrize("task", small_writing.TASKS)
def test_rows_are_always_the_same_and_in_one_split(task):
    rows = row_of(task)
    assert rows == row_of(task)
    inputs = [row["input"] for row in rows]
    assert len(set(inputs)) == len(inputs)
    assert {split_of(text) for text in inputs} == {"test"}


@pytest.mark.parametrize("task", small_writing.TASKS)
def test_every_word_is_in_the_vocabulary(task):
    words = set(small_writing.vocabulary())
    for row in row_of(task):
        assert set(row["input"].split()) <= words
        assert set(row["target"].split()) <= words


def test_programs_leave_what_python_makes_of_the_expression():
    for row in row_of("code"):
        expression = row["input"].removeprefix("program : ").removesuffix(" =")
        assert small_writing.run(row["target"]) == eval(expression)


@pytest.mark.parametrize(
    ("program", "left"),
    [("push 7", 7), ("push 7 push 2 sub", 5), ("push 2 push 3 push 4 mul add", 14)],
)
def test_the_stack_machine_by_hand(program, left):
    assert small_writing.run(program) == left


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "one number on the stack at the end, found 0"),
        ("push 1 push 2", "one number on the stack at the end, found 2"),
        ("push 1 add", "add: expected two numbers on the stack, found 1"),
        ("push", "push: expected a digit, found ''"),
        ("push 12", "found '12'"),
        ("jump 1", "found 'jump'"),
    ],
)
def test_a_program_that_does_not_run_says_why(program, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_writing.run(program)


def test_the_steps_of_a_sum_are_right():
    for row in row_of("arithmetic"):
        text = row["input"].removeprefix("sum : ").removesuffix(" =").replace(" ", "")
        *steps, result = row["target"].replace(" ", "").split(",")
        assert int(result) == eval(text)
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)


def test_a_translation_by_hand():
    class Fixed(random.Random):
        """Draws what the sentence needs."""

        def __init__(self, *draws):
            super().__init__(0)
            self.draws = list(draws)

        def choice(self, seq):
            return self.draws.pop(0)

        def sample(self, population, k):
            return self.draws.pop(0)

        def randrange(self, *args):
            return 0

    rng = Fixed("sees", "today", ["fox", "owl"], ["big", "red"], [])
    row = small_writing.translation(rng)
    assert row["input"] == "translate : the big red fox sees the owl today ="
    assert row["target"] == "hodi ruvo rak gran sile videt"


def test_a_word_of_one_language_has_one_in_the_other():
    tables = (
        small_writing.NOUNS,
        small_writing.ADJECTIVES,
        small_writing.VERBS,
        small_writing.TIMES,
    )
    words = [word for table in tables for pair in table.items() for word in pair]
    assert len(set(words)) == len(words)


def test_no_drill_is_a_row_of_a_task():
    exercises = drills.rows(4000)
    words = set(small_writing.vocabulary())
    for row in exercises:
        assert set(f"{row['input']} {row['target']}".split()) <= words
    verbs = set(small_writing.VERBS)
    for row in exercises:  # a sentence has a verb, a sum three numbers, a program two operations
        head, *rest = row["input"].split()
        if head == "translate":
            assert not verbs & set(rest)
        if head == "sum":
            assert rest.count("+") == 1
        if head == "program":
            assert rest.count("(") == 1


# ------------------------------------------------------------------------------ the models that ship


@pytest.fixture(scope="module")
def problem():
    return load_problem(("llm",), calibration=100)


def test_experts_write_their_own_task_and_averages_write_none(problem):
    own = [uniform.uniform(problem, e, "test") for e in problem.pool.names]
    assert min(own[i][i] for i in range(3)) >= 0.85
    assert problem.multi_task is not None
    for source in ("weight_average", "task_arithmetic:scale=0.2"):
        found = uniform.uniform(problem, source, "test")
        assert (found < np.diag(own) - 0.15).all()


def test_least_squares_on_what_experts_write_is_far_above_the_average(problem):
    average, fitted = (
        uniform.uniform(problem, source, "reward").mean()
        for source in ("weight_average", "least_squares:ridge=0.001")
    )
    assert average < 0.1
    assert fitted > 0.4


@pytest.mark.parametrize("task", small_writing.TASKS)
def test_an_expert_generates_by_transformers_what_its_score_says(problem, task):
    """The first rows of the test split, one at a time; programs are run."""
    folder = model_folder(task)
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    rows, i = small_writing.rows(task, "test", 1200)[:25], list(small_writing.TASKS).index(task)
    right = []
    for row in rows:
        ids = tokenizer(row["input"], return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(found, skip_special_tokens=True)
        right.append(text == row["target"])
        if task == "code" and right[-1]:
            expression = row["input"].removeprefix("program : ").removesuffix(" =")
            assert small_writing.run(text) == eval(expression)
    pool, scored = problem.pool, problem.tasks[i]
    assert [row["input"] for row in scored.rows("test")[:25]] == [row["input"] for row in rows]
    layers = [pool.layer(task, k) for k in range(pool.n_layers)]
    found = predict(pool.architecture, pool.stem(task), layers, {}, scored, "test")
    assert found[:25].tolist() == right
