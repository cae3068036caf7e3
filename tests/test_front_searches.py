"""Searches for fronts: their budgets and subsets, what they find where the front is known, their parts."""

from __future__ import annotations

import contextlib
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from rmm_lab.errors import InputError
from rmm_lab.fronts import conditioned, models, searches
from rmm_lab.fronts.conditioned import Conditioned
from rmm_lab.fronts.searches import A_FIFTH, CLOSED, FRONT_SEARCHES, SEPARATE
from rmm_lab.fronts.space import Box, Trials
from rmm_lab.operators import OperatorSpec
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


@pytest.mark.parametrize(("n_tasks", "trainings"), [(2, 11), (3, 10), (4, 11)])
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


class Asked:
    """In place of CMA-ES: asks for its first numbers and for less of the first expert, and notes all."""

    made: list[Asked]

    def __init__(self, mean, bounds, seed):
        self.mean, self.seed, self.told, self.runs = mean, seed, [], [[]]
        self.less = np.resize([0.02, 0], len(mean))
        self.made.append(self)

    @property
    def latest(self):
        return self.mean - len(self.told) * self.less

    def ask(self, most):
        return [self.mean - (i + len(self.told)) * self.less for i in range(min(3, most))]

    def tell(self, asked, rewards):
        self.told.append((asked, rewards))


def test_filling_in_raises_one_task_after_the_other_from_the_least_crowded(monkeypatch):
    """Its subset, the start and what CMA-ES is told; half of the budget is left for it."""
    sweeps = []
    monkeypatch.setattr(Asked, "made", [], raising=False)
    monkeypatch.setattr(searches, "Evolution", Asked)

    def sweep(out, box, known, seed, keep):
        sweeps.append((len(out), out.left, keep))
        out.ask([box.path(box.everywhere((0.7, 0.7)))] * (out.left - keep))
        known.append((box.everywhere((0.7, 0.7)), out.points()[-1]))

    monkeypatch.setattr(searches, "_sweep", sweep)
    scorer = Valley()
    out = FRONT_SEARCHES["fill-in by constraints"](scorer, 81, 1, UNIT)
    assert sweeps == [(11, 70, 35)]
    box, first = Box(scorer), 46
    # Seven evaluations each: the start, then two generations of three on the same subset.
    calls, points = scorer.calls[first:], out.points(first)
    starts = [evolution.mean for evolution in Asked.made]
    assert len(starts) == 5
    tasks = []
    for i, evolution in enumerate(Asked.made):
        own, found = calls[7 * i : 7 * i + 7], points[7 * i : 7 * i + 7]
        assert len({subset for _, subset in own}) == 1
        assert i == 0 or own[0][1] != calls[7 * i - 1][1]
        assert own[0][0] == path_text(box.path(evolution.mean))
        told = [value for _, values in evolution.told for value in values]
        wanted = [searches.constrained(found[1:], k, found[0])[: len(told)] for k in (0, 1)]
        [task] = [k for k in (0, 1) if told == pytest.approx(wanted[k].tolist())]
        tasks.append(task)
    # Both tasks from both ends of the front, on one side of which nothing is; then from a point between.
    ends = [box.everywhere(scales).tolist() for scales in ((1, 0), (0, 1))]
    assert tasks[:4] == [0, 1, 0, 1]
    assert [start.tolist() for start in starts[:4]] == [ends[0], ends[0], ends[1], ends[1]]
    assert starts[4].tolist() not in ends
    assert (
        starts[4].min() >= 0
    )  # less than nothing of the first is worse for both: no point of the front
    # What it arrived at comes before what the lattice did, the last first.
    latest = [box.path(evolution.latest) for evolution in Asked.made]
    assert out.answers == latest[::-1]
    assert len({evolution.seed for evolution in Asked.made}) == len(Asked.made)


def test_filling_in_goes_on_from_what_it_found(monkeypatch):
    """A new end of the front is the least crowded point of the next move."""
    monkeypatch.setattr(Asked, "made", [], raising=False)
    monkeypatch.setattr(searches, "Evolution", Asked)
    monkeypatch.setattr(searches, "_sweep", lambda out, *_: out.ask([]))
    scorer = Valley()
    out = FRONT_SEARCHES["fill-in by constraints"](scorer, 200, 1, UNIT)
    assert len(out) == 200
    moves = [(evolution.mean.tobytes(), i % 2) for i, evolution in enumerate(Asked.made)]
    assert len({start for start, _ in moves}) > 5
    found = {evolution.latest.tobytes() for evolution in Asked.made}
    assert found & {start for start, _ in moves}


# --------------------------------------------------------------------------------- Optuna's samplers

STUDIES = {
    "NSGA-II, several objectives": "NSGAIISampler",
    "NSGA-III": "NSGAIIISampler",
    "TPE, several objectives": "TPESampler",
    "GP, log-EHVI": "GPSampler",
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_knows_the_starts_and_every_score(monkeypatch, name):
    studies = []
    real = models.optuna_study

    @contextlib.contextmanager
    def watched(sampler, seed, n_objectives, **options):
        assert sampler == STUDIES[name]
        with real(sampler, seed, n_objectives, **options) as study:
            studies.append(study)
            yield study

    monkeypatch.setattr(models, "optuna_study", watched)
    budget = 16 if name.startswith("GP") else 75
    scorer, out = searched(name, budget)
    box = Box(scorer)
    begun = out.begun + 5
    [study] = studies
    assert [direction.name for direction in study.directions] == ["MAXIMIZE"] * 2
    told = [(np.array(list(t.params.values())), t.values) for t in study.trials]
    assert len(told) == 2 + budget - out.begun  # the members, which were scored before
    limits = {(d.low, d.high) for t in study.trials for d in t.distributions.values()}
    assert limits == {BOUNDS}
    again = Box(Valley()).starts(Trials(Valley(), budget, UNIT))
    for (numbers, values), (known, point) in zip(told, again, strict=False):
        assert numbers == pytest.approx(known)
        assert values == pytest.approx(point.tolist())
    for (numbers, values), (text, _), point in zip(
        told[7:], out[begun:], out.points(begun), strict=True
    ):
        assert path_text(box.path(numbers)) == text
        assert values == pytest.approx(point.tolist())
    # Twenty evaluations share a subset, whatever is asked for at once.
    subsets = [subset for _, subset in scorer.calls[begun:]]
    assert subsets == [(1 + i // 20) % 3 for i in range(budget - begun)]
    if "NSGA" in name:
        assert study.sampler._population_size == 20
        generations = {t.system_attrs.get(f"{STUDIES[name]}:generation") for t in study.trials}
        assert generations | {None} > {None, 0}


# ------------------------------------------------------------------------------------------- MM-MO


def test_a_mutant_of_the_elite_gives_half_of_the_numbers():
    rng = np.random.default_rng(0)
    x = np.full(4000, 0.5)
    found = models._cross(x, np.array([np.full(4000, 0.2)] * 5), rng)
    assert set(found) == {0.2, 0.5}
    assert np.mean(found == 0.2) == pytest.approx(0.5, abs=0.05)
    # a + (b - c) / 2 of 0.2 and 0.9, which stays within 0 and 1.
    elite = np.array([[0.2], [0.9]])
    seen = {round(float(models._cross(np.array([-1.0]), elite, rng)[0]), 6) for _ in range(400)}
    assert seen == {-1.0, 0.2, 0.9, 0.55, 0.0, 1.0}


class Study:
    """In place of Optuna's: notes what it is told, and proposes the middle and a corner."""

    def __init__(self):
        self.told, self.asked, self.states = [], 0, []

    def add_trial(self, trial):
        self.told.append((np.array(list(trial.params.values())), trial.values))

    def ask(self, space):
        self.asked += 1
        value = 0.5 if self.asked % 2 else 0.9
        return SimpleNamespace(params=dict.fromkeys(space, value))

    def tell(self, trial, state):
        self.states.append(state.name)


def test_mm_mo_scores_what_is_known_least_of_the_elites_mutants(problem, monkeypatch):
    study, options = Study(), []

    @contextlib.contextmanager
    def made(*args, **more):
        options.append((args, more))
        yield study

    crossed = []

    def cross(x, elite, rng):
        """The first five of ten lie where something is known already."""
        crossed.append((x, elite))
        new = rng.uniform(0, 1, len(x))
        return study.told[0][0] if len(crossed) % 10 < 6 and len(crossed) % 10 else new

    monkeypatch.setattr(models, "optuna_study", made)
    monkeypatch.setattr(models, "_cross", cross)
    scorer = problem.scorer(fraction=0.25, stem="agent")
    out = FRONT_SEARCHES["MM-MO"](scorer, 30, 4, UNIT)
    assert options == [(("GPSampler", 4, 3), {"n_startup_trials": 0})]
    first = len(out) - len(study.told)  # the uniform paths are no recipes
    assert first == out.begun
    drawn = np.random.default_rng(4).uniform(0, 1, (10, 4))
    assert np.array([x for x, _ in study.told[:10]]) == pytest.approx(drawn)
    # A weight and a density for each expert, and the 1-norm as the last objective, less being better.
    pool = problem.pool
    for (x, values), (text, _), point in zip(
        study.told, out[first:], out.points(first), strict=True
    ):
        path = parse_path(text)
        scale, density = x[:2].round(3), (0.05 + 0.95 * x[2:]).round(3)
        assert {step.source for step in path} == {
            OperatorSpec.of(
                "ties", {"merge": "sum", "scale": tuple(scale), "density": tuple(density)}
            ).name
        }
        assert values == pytest.approx([*point, -models._one_norm(scorer, path)])
        assert values[-1] < 0
    assert pool is scorer.pool
    # Proposals: two for ten, and each goes into five.
    assert study.states == ["FAIL"] * study.asked
    assert [x[0] for x, _ in crossed[:10]] == [0.5] * 5 + [0.9] * 5
    # The elite: the five best by the sum of the scores.
    sums = [sum(values[:-1]) for _, values in study.told[:10]]
    best = [study.told[i][0] for i in np.argsort(-np.array(sums), kind="stable")[:5]]
    assert crossed[0][1] == pytest.approx(np.array(best))
    # Of ten the five that are new are scored, on one subset.
    for x, _ in study.told[10:15]:
        assert min(np.abs(x - old).max() for old, _ in study.told[:10]) > 0.01


def test_mm_mo_of_many_tasks_has_two_objectives(problem, monkeypatch):
    """The mean and the 1-norm: five objectives took all memory."""
    study, options = Study(), []

    @contextlib.contextmanager
    def made(*args, **more):
        options.append(args)
        yield study

    monkeypatch.setattr(models, "optuna_study", made)
    monkeypatch.setattr(models, "MOST_TASKS", 1)
    scorer = problem.scorer(fraction=0.25, stem="agent")
    out = FRONT_SEARCHES["MM-MO"](scorer, 20, 4, UNIT)
    assert options == [("GPSampler", 4, 2)]
    for (_, values), (text, _), point in zip(
        study.told, out[out.begun :], out.points(out.begun), strict=True
    ):
        norm = models._one_norm(scorer, parse_path(text))
        assert values == pytest.approx([np.mean(point), -norm])


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
