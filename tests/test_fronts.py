"""The front of a run: preferences, what is promised and kept, its points as models, its files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from rmm_lab.__main__ import main
from rmm_lab.course.pareto import ParetoExplorer
from rmm_lab.errors import InputError
from rmm_lab.fronts.simplexes import averages, least_squares
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, path_text
from rmm_lab.search import front as fronts
from rmm_lab.search import front_files
from rmm_lab.search.config import configure
from rmm_lab.search.front_measures import achievement, non_dominated
from rmm_lab.search.pipeline import check_same_config, train
from rmm_lab.search.preferences import Ends, Preference, ends_of, parse_preference
from rmm_lab.search.problem import load_problem
from rmm_lab.search.run_folder import RunFolder

UNIT = Ends(np.zeros(2), np.ones(2))

# ------------------------------------------------------------------------------------- preferences


def test_preferences_are_ratios_in_the_order_of_the_tasks():
    tasks = ("digits", "textures")
    assert parse_preference("digits=2,textures=1", tasks).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert parse_preference(" textures = 30 , digits=60", tasks).tolist() == pytest.approx(
        [2 / 3, 1 / 3]
    )
    assert parse_preference("digits=0,textures=5e-1", tasks).tolist() == [0, 1]
    assert parse_preference("a=1,b=3", tasks, ("a", "b")).tolist() == [0.25, 0.75]


BAD = {
    "digits=-1,textures=2": ("'digits'", "0 or more", "'-1'"),
    "digits=0,textures=0": ("above 0", "digits=0,textures=0"),
    "digits=two,textures=1": ("'digits'", "'two'"),
    "digits=nan,textures=1": ("'digits'", "'nan'"),
    "digits=inf,textures=1": ("'digits'", "'inf'"),
    "digits=1e308,textures=1e308": ("finite sum",),
    "letters=1,textures=2": ("digits, textures", "'letters=1'"),
    "digits=2": ("each task", "'textures'", "textures=0"),
    "digits=2,digits=1,textures=1": ("'digits'", "twice"),
    "2,1": ("digits=2,textures=1", "'2'"),
    "digits": ("digits=2,textures=1", "'digits'"),
    "digits=1,": ("digits=2,textures=1", "''"),
}


@pytest.mark.parametrize("text", BAD)
def test_a_preference_that_is_none_is_refused(text):
    with pytest.raises(InputError) as told:
        parse_preference(text, ("digits", "textures"))
    assert str(told.value).startswith("--prefer: expected")
    for words in BAD[text]:
        assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["digits=-1,textures=2", "3", "letters=1"])
def test_the_command_line_refuses_it_before_it_writes(text, capsys, tmp_path):
    folder = tmp_path / "run"
    assert main(["--prefer", text, "--run-dir", str(folder), "--quiet"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: --prefer: expected")
    assert "\n" not in said
    assert not folder.exists()


# ------------------------------------------------------------------------------------ the two ends


def test_scores_between_the_base_and_the_expert():
    ends = Ends(np.array([0.2, 0.5, 0.4]), np.array([0.6, 0.5, 0.3]))
    # The second and the third expert are no better than the base: nothing to measure there.
    assert ends.counts.tolist() == [True, False, False]
    assert ends.normalised(np.array([[0.4, 0.9, 0.9], [0.1, 0, 0]])).ravel() == pytest.approx(
        [0.5, -0.25]
    )


def test_what_scores_are_worth_by_hand():
    """The third task does not count: the other two share its weight."""
    ends = Ends(np.zeros(3), np.array([1.0, 1.0, 0.0]))
    worth = Preference(np.array([0.25, 0.25, 0.5]), ends).worth(np.array([0.8, 0.6, 0.1]))
    assert worth == pytest.approx(-(0.5 * 0.4 + 0.05 * (0.1 + 0.2)))


def test_the_ends_are_those_of_whole_models(trained):
    scorer = trained.scorer(fraction=0.25, stem="agent")
    ends = ends_of(scorer)
    for i, name in enumerate(trained.pool.names):
        for model, found in (("base", ends.base), (name, ends.expert)):
            path = tuple(Step(model, k) for k in range(-1, 3))
            plain = evaluate(trained.pool, trained.tasks, path, "reward")
            assert found[i] == pytest.approx(plain[i])


@pytest.mark.parametrize("option", ["--front", "--prefer"])
def test_one_task_alone_is_nothing_to_trade(trained, option, tmp_path):
    """The second expert is the base itself: no better there."""
    pool = trained.pool
    base = dataclasses.replace(pool.experts[1], weights=dict(pool.experts[1].weights))
    weights = pool.base.weights | {k: v for k, v in base.weights.items() if "head" in k}
    lazy = dataclasses.replace(base, weights=weights)
    pool = type(pool)(pool.base, [pool.experts[0], lazy], pool.names, tuple(pool.operators))
    problem = dataclasses.replace(trained, pool=pool)
    options = {"front": True} if option == "--front" else {"prefer": "quadrant=1,stripes=1"}
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=f"{option}: expected at least two tasks") as told:
        train(configure("agent", episodes=4, quiet=True, run_dir=folder, **options), problem)
    assert "stripes" in str(told.value)
    assert not folder.exists()


# -------------------------------------------------------------------------- from subsets to a front


def test_the_archive_is_what_no_mean_dominates():
    scored = [
        ("a@0", np.array([1.0, 0.0])),
        ("a@0", np.array([0.0, 0.2])),  # mean 0.5, 0.1
        ("b@0", np.array([0.4, 0.6])),
        ("b@0 b@1", np.array([0.4, 0.6])),  # the same with one more layer
        ("c@0", np.array([0.3, 0.6])),
    ]
    found = fronts.archive(scored, UNIT)
    assert {text: own.tolist() for text, own in found.items()} == {
        "a@0": [0.5, 0.1],
        "b@0": [0.4, 0.6],
    }
    # Two more evaluations at the mean of all: (0.42, 0.4).
    every = np.mean([own for _, own in scored], axis=0)
    shrunk = fronts.means(scored, prior=2)
    assert shrunk["a@0"] == pytest.approx((np.array([1, 0.2]) + 2 * every) / 4)
    assert shrunk["b@0"] == pytest.approx((np.array([0.4, 0.6]) + 2 * every) / 3)
    assert fronts.archive([], UNIT) == {}


def test_finalists_are_spread_over_the_preferences():
    """A crowd in the middle does not push out the best for each task."""
    promised = {f"m{i}@0": np.array([0.6 + i / 1000, 0.6 - i / 1000]) for i in range(50)}
    promised |= {"left@0": np.array([0.9, 0.0]), "right@0": np.array([0.0, 0.9])}
    found = fronts.promising(promised, UNIT, 5)
    assert len(found) == len(set(found)) == 5
    assert {"left@0", "right@0"} < set(found)
    assert len(fronts.promising(promised, UNIT, 1000)) == 52
    assert fronts.promising({}, UNIT, 5) == []


# ------------------------------------------------------------------------------------- a whole front


@pytest.fixture(scope="module")
def found(trained, request):
    """A front of all paths of one source per layer, on the reward split and the test split."""
    scorer = trained.scorer(fraction=0.25, stem="agent")
    sources = trained.pool.sources
    rng = np.random.default_rng(0)
    paths = [tuple(Step(s, k) for k in range(-1, 3)) for s in sources]
    paths += [
        tuple(Step(sources[rng.integers(len(sources))], k) for k in range(-1, 3)) for _ in range(20)
    ]
    scored = [(path_text(p), scorer.score(p, i % 4)) for i, p in enumerate(paths)]
    front = fronts.find_front(scorer, scored, ends_of(scorer), n=12)
    return scored, front, front.on_test(trained)


def test_a_front_is_scored_on_whole_splits(found, trained):
    scored, front, tested = found
    assert front.finalists == 12
    assert 1 <= len(front.points) <= 12
    for before, point in zip(front.points, tested.points, strict=True):
        path = point.path.path
        assert before.test is None
        for split in ("reward", "test"):
            plain = evaluate(trained.pool, trained.tasks, path, split)
            assert getattr(point, split) == pytest.approx(tuple(plain))
        own = [found for text, found in scored if parse_path(text) == path]
        assert point.promised == pytest.approx(tuple(np.mean(own, axis=0)))
    assert non_dominated(front.scores()).all()
    assert (np.diff(front.scores()[:, 0]) <= 0).all()  # from the first task's best on
    assert set(front.measures()) == {"promised", "reward"}
    assert set(tested.measures()) == {"promised", "reward", "test"}


def test_costs_of_a_point(found, trained):
    pool = trained.pool
    expert = tuple(Step(pool.names[0], k) for k in range(-1, 3))
    shared = {n for n in pool.base.weights if "head" not in n}
    delta = [(pool.experts[0].weights[n] - pool.base.weights[n]).double().flatten() for n in shared]
    assert fronts.distance(pool, expert) == pytest.approx(float(torch.cat(delta).norm()))
    base = tuple(Step("base", k) for k in range(-1, 3))
    assert fronts.distance(pool, base) == 0
    twice = (*expert, expert[-1])
    assert fronts.distance(pool, twice) > fronts.distance(pool, expert)
    assert fronts.modules(pool, [expert]) == fronts.modules(pool, [twice]) == 4
    other = (*expert[:3], Step("ties", 2))
    assert fronts.modules(pool, [expert, other]) == 5  # they share the stem and two layers
    for point in found[1].points:
        assert point.layers == 3
        assert point.distance == pytest.approx(fronts.distance(pool, point.path.path))


def test_a_front_as_json_and_back(found):
    for front in found[1:]:
        text = front.to_json()
        again = fronts.Front.from_json(text)
        assert again.to_json() == text
        assert again.points == front.points
        assert json.loads(text)["knee"] == front.knee
    broken = [
        "",
        "[]",
        "{}",
        text.replace("front/1", "front/2"),
        text.replace('"distance"', '"far"'),
        text.replace('"ends"', '"end"'),
    ]
    for other in broken:
        with pytest.raises(InputError, match="expected JSON of schema"):
            fronts.Front.from_json(other)


def test_a_preference_picks_a_point(found):
    _, front, _ = found
    points = front.normalised()
    first, second = front.prefer("quadrant=1,stripes=0"), front.prefer("quadrant=0,stripes=1")
    assert points[first, 0] == points[:, 0].max()
    assert points[second, 1] == points[:, 1].max()
    regret = np.array([2 / 3, 1 / 3]) * (1 - points)
    least = (regret.max(1) + 0.05 * regret.sum(1)).argmin()
    assert front.prefer("quadrant=2,stripes=1") == front.prefer((2, 1)) == least
    with pytest.raises(InputError, match="each of 2 tasks, found 1"):
        front.prefer([1.0])
    with pytest.raises(InputError, match="0 or more for task 'stripes'"):
        front.prefer([1.0, -1.0])
    with pytest.raises(InputError, match="--prefer"):
        front.prefer("quadrant=1")


def test_a_front_of_one_point(found):
    _, front, _ = found
    one = dataclasses.replace(front, points=front.points[:1])
    assert one.knee == 0
    assert one.prefer("quadrant=1,stripes=9") == 0
    assert "1 of 12 finalists" in front_files.markdown(one)
    with pytest.raises(InputError, match="a point from 0 to 0, found 1"):
        one.export(1, "nowhere")


def test_a_points_card_has_its_preference_and_its_scores(found, trained, tmp_path, monkeypatch):
    _, front, tested = found
    monkeypatch.setattr("rmm_lab.search.problem.pool_of", lambda path: trained.pool)
    i = tested.prefer("quadrant=3,stripes=1")
    folder = tested.export(i, tmp_path / "model", "quadrant=3,stripes=1")
    text, point = (folder / "README.md").read_text("utf-8"), tested.points[i]
    said = f"Point {i} of a front of {len(front.points)}"
    said += ", its knee" if i == front.knee else ""
    assert f"{said}, chosen for the preference quadrant 75%, stripes 25%. In %; the front" in text
    assert "The test split was scored once, after the choice." in text
    assert ModelCard(text).data.to_dict()["tags"] == ["merge", "rmm_lab"]
    assert path_text(point.path.path) in " ".join(text.split())
    rows = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if words[0] in ("task", *front.tasks):
            rows[words[0]] = words[1:]
    assert rows["task"] == [
        f"{m}, {s}" for s in ("reward", "test") for m in ("base", "this", "expert")
    ]
    for k, task in enumerate(front.tasks):
        wanted = [
            value
            for split in ("reward", "test")
            for ends in [tested.ends[split]]
            for value in (ends.base[k], getattr(point, split)[k], ends.expert[k])
        ]
        assert rows[task] == [f"{100 * value:.1f}" for value in wanted]
    assert LayerPath.from_json((folder / "path.json").read_text("utf-8")) == point.path
    # Where the test split was not scored, nothing is said of it.
    text = (front.export(i, tmp_path / "other") / "README.md").read_text("utf-8")
    assert "test split" not in text
    assert ", the answer to preferences such as quadrant " in text


def test_a_card_names_a_preference_that_the_point_answers(found):
    _, front, _ = found
    named = 0
    for i in range(len(front.points)):
        said = front._said(i, None)
        if "such as" in said:
            words = said.split("such as ")[1].split(". In")[0].split(", ")
            wanted = [float(word.split(" ")[1].rstrip("%")) for word in words]
            assert front.prefer(wanted) == i
            named += 1
    assert named >= 2


def test_a_preference_that_is_none_writes_no_model(found, tmp_path):
    with pytest.raises(InputError, match="--prefer"):
        found[1].export(0, tmp_path / "model", "quadrant=1")
    assert not (tmp_path / "model").exists()


def test_equal_points_are_one(trained):
    """The same model by two paths: once as an expert, once as its scale."""
    scorer = trained.scorer(fraction=0.25, stem="agent")
    expert = tuple(Step(trained.pool.names[0], k) for k in range(-1, 3))
    again = averages(scorer, np.array([[1.0, 0.0]]))
    scored = [(path_text(p), scorer.score(p, 0)) for p in (expert, *again)]
    front = fronts.find_front(scorer, scored, ends_of(scorer))
    assert (front.finalists, len(front.points)) == (2, 1)


def test_a_layer_that_follows_others_is_stored_and_measured_as_it_is_built(tiny):
    """Least squares along the path makes another layer after another stem."""
    problem = load_problem(**tiny, operators=("least_squares",), stem="base", calibration=20)
    pool = problem.pool
    one, two = (tuple(parse_path(f"{name}@-1 least_squares@0 e1@1 e1@2")) for name in pool.names)
    assert fronts.modules(pool, [one, two]) == 6
    built = LayerPath.of(pool, one, "base").build(pool).state_dict()
    base = tuple(Step("base", k) for k in range(-1, 3))
    first = LayerPath.of(pool, base, "base").build(pool).state_dict()
    gaps = [(built[n] - first[n]).double().flatten() for n in first if "head" not in n]
    assert fronts.distance(pool, one) == pytest.approx(float(torch.cat(gaps).norm()), rel=1e-4)


def test_answers_leave_places_to_what_was_scored(trained):
    scorer, names = trained.scorer(fraction=0.25, stem="agent"), trained.pool.names
    bad = [tuple(Step("base", k) for k in (-1, *own)) for own in ((0, 1), (0, 2), (1, 2), (0,))]
    good = [tuple(Step(name, k) for k in range(-1, 3)) for name in names]
    scored = [(path_text(path), scorer.score(path, 0)) for path in good]
    front = fronts.find_front(scorer, scored, ends_of(scorer), bad, n=4)
    assert front.finalists == 4
    assert any(point.path.path in good for point in front.points)


def test_one_lucky_subset_makes_no_finalist(trained):
    scorer = trained.scorer(fraction=0.25, stem="agent")
    lucky, steady, poor = (
        path_text(tuple(Step(s, k) for k in range(-1, 3))) for s in trained.pool.sources[:3]
    )
    found = {lucky: [0.9], steady: [0.85] * 8, poor: [0.1] * 8}
    scored = [(text, np.full(2, v)) for text, own in found.items() for v in own]
    front = fronts.find_front(scorer, scored, UNIT, n=1)
    assert [path_text(point.path.path) for point in front.points] == [steady]
    # What was promised is the plain mean, on the scale of the ends.
    assert front.points[0].promised == pytest.approx((0.85, 0.85))
    assert (front.archive, front.promise) == (1, pytest.approx(0.81))
    half = fronts.find_front(scorer, scored, Ends(np.full(2, 0.5), np.ones(2)), n=1)
    assert half.promise == pytest.approx(0.64)


def test_of_equal_points_that_with_fewest_layers_stays(trained, monkeypatch):
    monkeypatch.setattr(fronts, "scores", lambda scorer, wanted: [np.ones(2) for _ in wanted])
    scorer, name = trained.scorer(fraction=0.25, stem="agent"), trained.pool.names[0]
    paths = [tuple(Step(name, k) for k in (-1, *own)) for own in ((0, 1, 1, 2), (0, 2), (0, 1, 2))]
    front = fronts.find_front(scorer, [], UNIT, paths)
    assert [point.path.path for point in front.points] == [paths[1]]


def test_nothing_that_was_scored_has_no_front(trained):
    scorer = trained.scorer(fraction=0.25, stem="agent")
    with pytest.raises(InputError, match="--episodes"):
        fronts.find_front(scorer, [], ends_of(scorer))


# ----------------------------------------------------------------------------------- in a run folder

FILES = ("front.json", "front.md", "front.png")


def options(**more):
    return {"episodes": 30, "data_fraction": 0.25, "quiet": True, "finalists": 6} | more


@pytest.mark.slow
def test_a_run_resumes_for_its_front_whose_points_are_exported(tmp_path):
    folder = tmp_path / "run"
    own = options(episodes=16, experts=("tiny-digits-first", "tiny-digits-second"))
    plain = train(configure("weights", run_dir=folder, **own), table=False)
    assert plain.front is None
    assert not any((folder / name).exists() for name in FILES)
    result = train(configure("weights", resume=folder, front=True, **own), table=False)
    assert result.path == plain.path
    assert all((folder / name).is_file() for name in FILES)
    front = fronts.read_front(folder)
    assert front.to_json() == fronts.read_front(folder / "front.json").to_json()
    assert front.to_json() == result.front.to_json()
    assert "test" not in front.ends  # nobody asked for the table
    place = front.export(front.knee, tmp_path / "model")
    model = timm.create_model(f"local-dir:{place}", pretrained=True)
    built = front.build(front.knee)
    pixels = torch.rand(2, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.allclose(model.eval()(pixels), built.eval()(pixels), atol=1e-5)


def test_a_run_folder_holds_the_front_with_its_test_scores(trained, tmp_path, capsys):
    more = options(front=True, compare="paper", run_dir=tmp_path / "run") | {"quiet": False}
    front = train(configure("weights", **more), trained).front
    said = capsys.readouterr().out
    assert (
        f"front: {len(front.points)} of {front.finalists} finalists; the knee is {front.knee}"
        in said
    )
    for line in (tmp_path / "run/table.md").read_text("utf-8").splitlines():
        assert " nan " not in line  # what was not measured is left empty
    assert np.isfinite(front.scores("test")).all()
    assert front.to_json() == fronts.read_front(tmp_path / "run").to_json()
    text = (tmp_path / "run/front.md").read_text("utf-8")
    assert f"test split {front.measures()['test']['hypervolume']:.3f}" in text
    assert f"The knee is point {front.knee}." in text
    with pytest.raises(InputError, match=r"merge --resume .* --front"):
        fronts.read_front(tmp_path)


@pytest.mark.parametrize("on", [[True, False], [False, False]])
def test_a_front_whose_experts_are_no_better_on_the_test_split(trained, tmp_path, on):
    """There is no scale there: what is compared is the reward split, and scores are shown all the same."""
    front = train(configure("weights", **options(front=True, compare="paper")), trained).front
    ends = front.ends["test"]
    ends = dataclasses.replace(ends, expert=np.where(on, ends.expert, ends.base))
    front = dataclasses.replace(front, ends=front.ends | {"test": ends})
    assert front.scaled == ("promised", "reward")
    assert set(front.measures()) == {"promised", "reward"}
    front_files.write_front(front, RunFolder(tmp_path))
    assert fronts.read_front(tmp_path).to_json() == front.to_json()
    text = (tmp_path / "front.md").read_text("utf-8")
    assert "quadrant, test" in text
    assert "no scale" in text
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    figure, said = ParetoExplorer(front).still()
    assert figure.axes
    assert "reward split" in said


def test_a_preference_chooses_the_path(trained, tmp_path):
    results = {
        prefer: train(configure("weights", prefer=prefer, **options()), trained, table=False)
        for prefer in (None, "quadrant=1,stripes=0", "quadrant=0,stripes=1", "quadrant=1,stripes=1")
    }
    plain, *preferred = results.values()
    ends, stem = ends_of(trained.scorer()), Step(trained.stem, -1)
    for (prefer, result), weights in zip(
        list(results.items())[1:], ([1, 0], [0, 1], [0.5, 0.5]), strict=True
    ):
        assert [e["path"] for e in result.episodes] == [e["path"] for e in plain.episodes], prefer
        rows = [
            evaluate(trained.pool, trained.tasks, (stem, *parse_path(row["path"])), "reward")
            for row in result.finalists
        ]
        worth = achievement(ends.normalised(np.array(rows)), np.array(weights))[0]
        assert [row["worth"] for row in result.finalists] == pytest.approx(worth.tolist())
        assert worth.argmax() == 0
        assert path_text(result.path.steps) == result.finalists[0]["path"]
    first, second = preferred[0].path.path, preferred[1].path.path
    own = [evaluate(trained.pool, trained.tasks, path, "reward") for path in (first, second)]
    assert own[0][0] > own[1][0]
    assert own[0][1] < own[1][1]


@pytest.mark.parametrize(
    ("before", "now"), [("a=2,b=1", "a=1,b=1"), ("a=2,b=1", None), (None, "a=2,b=1")]
)
def test_a_run_is_not_resumed_with_another_preference(tmp_path, before, now):
    stored = configure("weights", prefer=before).stored()
    config = configure("weights", prefer=now, resume=tmp_path)
    with pytest.raises(InputError, match=f"--resume: expected --prefer {before or 'none'} as in"):
        check_same_config(config, stored)
    check_same_config(configure("weights", prefer=before, front=True, resume=tmp_path), stored)


# ------------------------------------------------------------------------------------- the simplexes


def test_weighted_averages_are_averages_of_weights(problem):
    scorer = problem.scorer(fraction=0.25, stem="agent")
    [path] = averages(scorer, np.array([[0.3, 0.7]]))
    for step in path:
        own = problem.pool.weights(*step)
        one, two = (problem.pool.weights(name, step.layer) for name in problem.pool.names)
        for name, tensor in own.items():
            assert torch.allclose(tensor, 0.3 * one[name] + 0.7 * two[name], atol=1e-5)


def test_weighted_least_squares_has_the_experts_at_its_corners(tiny):
    problem = load_problem(**tiny, operators=("ties",), stem="base", calibration=20)
    scorer = problem.scorer(fraction=0.25, stem="agent")
    weights = np.array([[1, 0], [0.5, 0.5], [0.75, 0.25], [0, 1.0]])
    paths = least_squares(scorer, weights)
    assert [{step.source for step in path} for path in paths] == [
        {"e1"},
        {"least_squares"},
        {"least_squares:weights=1.5/0.5"},
        {"e2"},
    ]
    assert all(np.isfinite(scorer.score(path, 0)).all() for path in paths)
