"""Searches for fronts: their budgets and subsets, what they find where the front is known, their parts."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from rmm_lab.errors import InputError
from rmm_lab.fronts import conditioned, models, searches
from rmm_lab.fronts.conditioned import Conditioned
from rmm_lab.fronts.searches import A_FIFTH, CLOSED, FRONT_SEARCHES, SEPARATE
from rmm_lab.fronts.space import Box, Trials
from rmm_lab.reward import Step, parse_path, path_text
from rmm_lab.search.front_measures import hypervolume, lattice_of, non_dominated
from rmm_lab.search.layer_scales import BOUNDS
from rmm_lab.search.preferences import Ends
from rmm_lab.search.problem import load_problem

UNIT = Ends(np.zeros(2), np.ones(2))
OPEN = [name for name in FRONT_SEARCHES if name not in CLOSED]


class Valley:
    """A scorer by formula: two tasks that want other scales in every place; models between are a front.

    Task i's score is 1 - |x - target_i|^2 / 2, the mean over places: its front is between the targets,
    where the scores are (1 - t^2 d^2 / 2, 1 - (1 - t)^2 d^2 / 2), d the targets' distance.
    """

    sources, members, n_models, n_layers = ("a", "b", "ties"), ("a", "b"), 2, 8
    n_subsets, task_names, chooses_stem = 3, ["x", "y"], True
    stacks = (range(8),)
    targets = np.array([[1.2, 0.3], [0.3, 1.2]])
    apart = float(np.linalg.norm(targets[0] - targets[1]))

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def score(self, path, subset=None):
        self.calls.append((path_text(path), subset))
        scales = {"a": (1, 0), "b": (0, 1), "base": (0, 0)}
        rows = np.array([step.scales or scales.get(step.source, (0.5, 0.5)) for step in path])
        off = ((rows[None] - self.targets[:, None]) ** 2).sum(-1)  # (2, P)
        return (1 - off.mean(1) / 2).clip(0, 1)


def ideal() -> float:
    """The hypervolume of the valley's true front."""
    t, d = np.linspace(0, 1, 2001), Valley.apart
    return hypervolume(np.c_[1 - (t * d) ** 2 / 2, 1 - ((1 - t) * d) ** 2 / 2])


def searched(name, evaluations=80, seed=1):
    scorer = Valley()
    return scorer, FRONT_SEARCHES[name](scorer, evaluations, seed, UNIT)


WEIGHTS = ("MM-MO", "HM3")  # beginnings of the names of those that look at weights
FORMULA = [name for name in OPEN if not name.startswith(WEIGHTS)]


@pytest.mark.parametrize("budget", [0, 2, 9, 24])
@pytest.mark.parametrize("name", OPEN)
def test_a_search_spends_its_budget_on_subsets(problem, name, budget):
    scorer = problem.scorer(fraction=0.25, stem="agent")
    ends = Ends(np.zeros(2), np.ones(2))
    out = FRONT_SEARCHES[name](scorer, budget, 1, ends)
    spent = budget // 5 if name == A_FIFTH else budget
    assert len(out) == len(out.by_task) == scorer.evaluations == spent
    uniform = [" ".join(f"{s}@{k}" for k in (-1, 0, 1, 2)) for s in scorer.sources]
    if not name.startswith("HM3"):  # whose paper has no other operators to begin with
        assert [text for text, _ in out][:4] == uniform[:spent]
    for text, _ in out:
        parse_path(text)


@pytest.mark.parametrize("name", FORMULA)
def test_the_same_seed_gives_the_same_search(name):
    budget = {"GP, log-EHVI": 14, A_FIFTH: 200}.get(name, 40)
    (one, first), (two, second) = searched(name, budget), searched(name, budget)
    assert one.calls == two.calls
    assert first.answers == second.answers
    assert len({subset for _, subset in one.calls}) > 1
    assert searched(name, budget, seed=2)[0].calls != one.calls


# How many evaluations they need to be sure: evolution is slow, a Gaussian process takes seconds.
ENOUGH = {"GP, log-EHVI": 30, "NSGA-II, several objectives": 400, "NSGA-III": 400}


AGENTS = [name for name in FORMULA if name.startswith("RMM")]  # small steps from the members
NO_RACE = {"random scales", "natural niches", *AGENTS}  # niches keep specialists: see test_rivals


@pytest.mark.parametrize("name", [name for name in FORMULA if name not in NO_RACE])
def test_a_search_finds_more_of_the_front_than_chance(name):
    """Of what was scored and what it answers with; the valley has no noise."""

    def found(which) -> float:
        scorer, out = searched(which, ENOUGH.get(name, 80))
        answers = [scorer.score(path) for path in out.answers]
        return hypervolume(np.array([*out.by_task, *answers]))

    assert found("random scales") < found(name) < ideal() + 1e-9


@pytest.mark.parametrize("name", AGENTS)
def test_agents_have_more_of_the_front_than_the_members_they_begin_with(name):
    scorer, out = searched(name, 200)
    answers = np.array([scorer.score(path) for path in out.answers])
    assert hypervolume(answers) > 2 * hypervolume(np.array(out.by_task[:2]))
    assert len(answers) > 2


def test_a_fifth_is_the_search_with_a_fifth_of_its_evaluations():
    one, other = Valley(), Valley()
    found = FRONT_SEARCHES[A_FIFTH](one, 203, 1, UNIT)
    whole = FRONT_SEARCHES["RMM (conditioned)"](other, 40, 1, UNIT)
    assert len(found) == 40
    assert one.calls == other.calls
    assert found.answers == whole.answers


@pytest.mark.parametrize(("n_tasks", "trainings"), [(2, 11), (3, 10), (4, 10)])
def test_how_many_trainings_there_are_and_how_long(monkeypatch, n_tasks, trainings):
    """As many as preferences that are answered, with equal shares of what the uniform paths leave."""
    learned = []

    class Agent(Conditioned):
        def __init__(self, out, seed, *, fixed, turn):
            self.out, self.seed, self.fixed = out, seed, fixed

        def learn(self, episodes):
            learned.append((self.seed, episodes, tuple(self.fixed)))
            self.out.left -= episodes
            return iter(())

        def path(self, weights):
            return (Step("a", self.seed),)

    monkeypatch.setattr(conditioned, "Conditioned", Agent)
    ends = Ends(np.zeros(n_tasks), np.ones(n_tasks))
    monkeypatch.setattr(Valley, "score", lambda *_: np.zeros(n_tasks))
    out = FRONT_SEARCHES[SEPARATE](Valley(), 700, 5, ends)
    seeds, shares, preferences = zip(*learned, strict=True)
    assert seeds == tuple(range(5, 5 + trainings))
    assert sum(shares) == 700 - out.begun
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 60
    assert preferences == tuple(map(tuple, lattice_of(n_tasks, 11)))
    assert len(out.answers) == trainings


def test_separate_agents_share_all_subsets():
    """Few episodes each: together they see all of the data, as one agent would."""

    class Eleven(Valley):
        n_subsets = 11

    scorer = Eleven()
    out = FRONT_SEARCHES[SEPARATE](scorer, 14, 1, UNIT)
    assert [subset for _, subset in scorer.calls[out.begun :]] == list(range(11))
    scorer = Eleven()  # 33 for the uniform paths; then two updates each, of 20 and 13 episodes
    out = FRONT_SEARCHES[SEPARATE](scorer, 33 + 33 * 11, 1, UNIT)
    seen = [subset for _, subset in scorer.calls[out.begun :]]
    assert [seen.count(subset) for subset in range(11)] == [33] * 11


def test_a_lattice_of_runs_comes_near_the_whole_front():
    scorer, out = searched("CMA-ES along a lattice", 700)
    points = np.array([scorer.score(path) for path in out.answers])
    assert hypervolume(points) > 0.93 * ideal()
    assert non_dominated(points).sum() >= 5
    # Ordered by preference, from the second task's best to the first's.
    assert points[0, 1] > points[-1, 1]
    assert points[0, 0] < points[-1, 0]


def test_closed_forms_score_nothing(tiny):
    problem = load_problem(**tiny, operators=("ties",), stem="base", calibration=20)
    scorer = problem.scorer(fraction=0.25, stem="agent")
    for name in CLOSED:
        out = FRONT_SEARCHES[name](scorer, 50, 1, UNIT)
        assert len(out) == scorer.evaluations == 0
        assert len(out.answers) == len(set(out.answers)) == searches.POINTS


# ------------------------------------------------------------------------------------------ the box


def test_a_box_gives_neighbours_the_same_scales():
    scorer = Valley()
    box = Box(scorer)  # nine places in four blocks
    assert (box.size, box.shape) == (8, (4, 2))
    path = box.path(np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9]))
    assert [step.layer for step in path] == list(range(-1, 8))
    assert [step.scales for step in path] == [
        *[(0.0, 0.1)] * 3,
        *[(0.2, 0.3)] * 2,
        *[(0.4, 0.5)] * 2,
        *[(0.6, BOUNDS[1])] * 2,
    ]


def test_starts_are_the_members_and_one_scale_for_all():
    scorer = Valley()
    out = Trials(scorer, 60, UNIT)
    assert out.begun == 6  # two rounds of three sources: a tenth
    known = Box(scorer).starts(out)
    assert len(out) == 11
    for numbers, point in known:
        assert point == pytest.approx(scorer.score(Box(scorer).path(numbers)))
    assert [numbers[:2].tolist() for numbers, _ in known[:3]] == [[1, 0], [0, 1], [0.3, 0.3]]


def test_trials_take_subsets_in_turn():
    scorer = Valley()
    out, box = Trials(scorer, 20, UNIT), Box(scorer)
    before = len(out)
    path = box.path(np.zeros(box.size))
    for stay in (False, True, False):
        out.ask([path, path], stay=stay)
    assert [subset for _, subset in scorer.calls[before:]] == [0, 0, 0, 0, 1, 1]
    assert out.points(before) == pytest.approx(np.tile(scorer.score(path), (6, 1)))


# ------------------------------------------------------------------------------------------ its parts


def test_crowding_by_hand():
    points = np.array([[0.0, 1.0], [0.4, 0.8], [0.5, 0.2], [1.0, 0.0]])
    found = searches.crowding(points)
    assert found[[0, 3]].tolist() == [np.inf, np.inf]
    assert found[1:3] == pytest.approx([0.5 + 0.8, 0.6 + 0.8])


def test_a_constraint_costs_what_others_lose():
    now = np.array([0.5, 0.5])
    points = np.array([[0.6, 0.49], [0.9, 0.38], [0.6, 0.9]])
    worth = searches.constrained(points, 0, now)
    assert worth == pytest.approx([0.6, 0.9 - 10 * 0.1, 0.6])


def test_uncertainty_is_a_gaussian_processs():
    rng = np.random.default_rng(1)
    known, points = rng.uniform(size=(8, 3)), rng.uniform(size=(5, 3))
    apart = [np.linalg.norm(a - b) for i, a in enumerate(known) for b in known[:i]]
    # The median over pairs in both orders is that over pairs.
    process = GaussianProcessRegressor(RBF(np.median(apart)), alpha=1e-6, optimizer=None)
    _, deviation = process.fit(known, np.zeros(8)).predict(points, return_std=True)
    assert models.uncertainty(points, known) == pytest.approx(deviation**2, abs=1e-5)
    assert models.uncertainty(known, known) == pytest.approx(np.zeros(8), abs=1e-4)


def test_mm_mo_counts_the_one_norm_of_what_changed(problem):
    scorer = problem.scorer(fraction=0.25, stem="agent")
    pool = problem.pool
    path = parse_path(" ".join(f"{pool.names[0]}@{k}" for k in (-1, 0, 1, 2)))
    shared = [n for n in pool.base.weights if "head" not in n]
    gaps = [(pool.experts[0].weights[n] - pool.base.weights[n]).flatten().numpy() for n in shared]
    assert models._one_norm(scorer, path) == pytest.approx(
        abs(np.concatenate(gaps)).mean(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["NSGA-III", "GP, log-EHVI", "MM-MO"])
def test_a_missing_library_is_named(problem, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "optuna", None)
    scorer = problem.scorer(fraction=0.25, stem="agent")
    with pytest.raises(InputError, match=r"\[search\]"):
        FRONT_SEARCHES[name](scorer, 10, 1, UNIT)


def test_optunas_warnings_of_experiments_are_not_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searched("NSGA-III", 30)


def test_tasks_that_do_not_count_are_no_objectives():
    ends = Ends(np.array([0.0, 0.5, 0.0]), np.array([1.0, 0.5, 1.0]))

    class Three(Valley):
        task_names = ["x", "no scale", "y"]

        def score(self, path, subset=None):
            one, two = super().score(path, subset)
            return np.array([one, 0.9, two])

    for name in ("CMA-ES along a lattice", "NSGA-II, several objectives", "MAP"):
        three, two = Three(), Valley()
        found = FRONT_SEARCHES[name](three, 50, 1, ends)
        assert found.points().shape == (50, 2)
        FRONT_SEARCHES[name](two, 50, 1, UNIT)
        assert three.calls == two.calls
