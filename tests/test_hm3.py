"""HM3: its decision process and its selection by hand, a small problem against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import lm_models
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from t5_models import problem_of
from transformers import AutoModelForCausalLM

from rmm_lab import ppo
from rmm_lab.errors import InputError
from rmm_lab.fronts import hm3
from rmm_lab.fronts.any_order import BETA, LayersEnv, spread
from rmm_lab.fronts.hm3 import Training, TrajectoryAgent, Wolpertinger, nearest, places
from rmm_lab.fronts.simplexes import dare_ties
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, path_text, predict_all
from rmm_lab.search.front import find_front
from rmm_lab.search.preferences import Ends
from rmm_lab.search.problem import load_problem

UNIT = Ends(np.zeros(2), np.ones(2))
ONE = (range(2),)  # a stack of two layers
T5 = (range(2), range(2, 4))


def walked(env, *actions):
    """The last step of an episode of these pairs."""
    env.reset()
    for action in actions[:-1]:
        _, value, done, *_ = env.step(action)
        assert (value, done) == (0, False)
    return env.step(actions[-1])


# ---------------------------------------------------------------------------- the decision process


def test_the_reward_and_its_spread_by_hand():
    scored = []

    def score(path):
        scored.append(path_text(path))
        return np.array([0.8, 0.4])

    env = LayersEnv(score, ("a", "b", "t"), ONE, [0.25, 0.75], beta=0.05)
    observation, value, done, _, info = walked(env, 4, 0, 2, 3)  # t@0 a@0 b@0 b@1
    assert scored == ["t@0 a@0 b@0 b@1"]
    assert done
    assert observation.tolist() == [4, 0, 2, 3]
    assert info["gains"].tolist() == [0.8, 0.4]
    # 0.25 x 0.8 + 0.75 x 0.4 - 0.05 x 4 layers
    assert value == pytest.approx(0.3)
    assert spread(value, 4) == pytest.approx([0.075] * 4)
    # A shorter path is worth more, by beta for each layer.
    assert walked(env, 5)[1] == pytest.approx(0.45)
    assert scored[-1] == "t@1"


def test_the_returns_that_are_learned_are_those_of_the_spread_reward(monkeypatch):
    """R = 0.9 - 0.03: over three steps 0.29 each, and G = 0.29 (1 + 0.5 + 0.25), ..."""
    env = LayersEnv(lambda path: np.array([0.9, 0.9]), ("a", "b", "t"), ONE, [0.5, 0.5])
    training = Training(env, np.zeros((6, 1)), 0, ppo.Args(gamma=0.5, update_epochs=1))
    choices = iter([0, 2, 1])
    monkeypatch.setattr(training.env, "choose", lambda proto: next(choices))
    seen = []
    collect = ppo.collect

    def watched(episodes, gamma):
        seen.append(collect(episodes, gamma))
        return seen[-1]

    monkeypatch.setattr(ppo, "collect", watched)
    training.learn(1)
    assert [(round(r, 9), path_text(p)) for r, p in training.played] == [(0.87, "a@0 b@0 a@1")]
    assert seen[0].returns.tolist() == pytest.approx([0.29 * 1.75, 0.29 * 1.5, 0.29])


def test_an_episode_ends_after_a_last_layer_or_the_most():
    env = LayersEnv(lambda path: np.zeros(2), ("a", "b", "t"), ONE, [0.5, 0.5], beta=0)
    for last in (1, 3, 5):
        assert walked(env, 0, last)[2]
    assert walked(env, 0, 2, 4, 0)[2]  # four layers
    with pytest.raises(InputError, match=r"action: expected a pair .*, found 0 after a@0 b@0 t@0"):
        env.step(0)
    env.reset()
    with pytest.raises(InputError, match="found 6 after nothing"):
        env.step(6)
    env.reset()
    assert env.ends_path().tolist() == [False, True] * 3


def test_stacks_stay_in_order():
    env = LayersEnv(lambda path: np.zeros(2), ("a", "b", "t"), T5, [0.5, 0.5])
    _, info = env.reset()
    assert info["action_mask"].tolist() == [1, 1, 0, 0] * 3
    with pytest.raises(InputError, match="action: expected a pair of the present stack, found 2"):
        env.step(2)
    *_, info = env.step(4)  # b@0, and any encoder layer may follow
    assert info["action_mask"].tolist() == [1, 1, 0, 0] * 3
    assert not env.ends_path().any()
    *_, done, _, info = env.step(9)  # t@1 ends the encoder
    assert not done
    assert info["action_mask"].tolist() == [0, 0, 1, 1] * 3
    assert env.ends_path().tolist() == [False, False, False, True] * 3
    assert env.step(3)[2]
    # Four layers are the most in each stack.
    assert walked(env, 0, 0, 0, 0, 2, 2, 2, 2)[2]


def test_the_stem_comes_first_where_there_is_one():
    env = LayersEnv(lambda path: np.zeros(2), ("a", "t"), ONE, [1, 0], stem=Step("t", -1))
    *_, info = walked(env, 0, 1)
    assert info["path"] == parse_path("t@-1 a@0 a@1")


def test_it_is_an_environment_of_gymnasium():
    env = LayersEnv(lambda path: np.zeros(2), ("a", "b", "t"), ONE, [0.5, 0.5])
    check_env(env, skip_render_check=True)


# ------------------------------------------------------------------------------ the proto-action


def test_the_nearest_pairs_by_hand():
    points = places(3, 3)
    # Neighbouring layers and different models are 1 apart.
    apart = np.linalg.norm(points - points[4], axis=1)  # b@1
    np.testing.assert_allclose(apart, np.sqrt([2, 1, 2, 1, 0, 1, 2, 1, 2]))
    every = np.ones(9, bool)
    assert nearest(points[4], points, every, 1).tolist() == [4]
    assert nearest(points[4], points, every, 5).tolist() == [4, 1, 3, 5, 7]
    # Nearer to layer 2, and a bit towards model t (number 2).
    proto = points[4] + [0, 0, 0.1, 0.3]
    assert nearest(proto, points, every, 3).tolist() == [4, 5, 7]
    legal = np.arange(9) % 3 == 0
    assert nearest(points[4], points, legal, 5).tolist() == [3, 0, 6]


class Critic(TrajectoryAgent):
    """Values by formula, for each pair that came last."""

    def __init__(self, values, rates):
        super().__init__(3, 2, np.zeros((6, 1)))
        self.by_hand = torch.tensor([values, rates]).T

    def critics(self, obs):
        return self.by_hand[obs[:, -1].long()]


def chooser(values, rates=(0.0,) * 6, **options):
    env = LayersEnv(lambda path: np.zeros(2), ("a", "b", "t"), ONE, [0.5, 0.5])
    env = Wolpertinger(env, Critic(values, rates), 0, **options)
    env.reset()
    return env


def test_of_the_nearest_pairs_the_best_is_taken():
    at = places(3, 2)[0]  # a@0; then a@1, b@0 and t@0, all 1 apart; the others further
    values = (0.1, 9.0, 0.3, 9.0, 0.2, 9.0)  # of states behind the last layer none counts
    assert chooser(values, epsilon=0, n=4).choose(at) == 2
    assert chooser(values, epsilon=0, n=1).choose(at) == 0
    # r + gamma V: 0.5 now is more than 0.5 x 0.3 + 0.2.
    rates = (0.2, 0.5, 0.2, 0.0, 0.2, 0.0)
    assert chooser(values, rates, epsilon=0, n=4, gamma=0.5).choose(at) == 1
    rates = (0.2, 0.4, 0.2, 0.0, 0.2, 0.0)
    assert chooser(values, rates, epsilon=0, n=4, gamma=1.0).choose(at) == 2


def test_chance_takes_any_of_the_nearest():
    env = chooser((1.0, 0, 0, 0, 0, 0), epsilon=1, n=4)
    drawn = [env.choose(places(3, 2)[0]) for _ in range(400)]
    share = np.bincount(drawn, minlength=6) / 400
    np.testing.assert_allclose(share, [0.25, 0.25, 0.25, 0, 0.25, 0], atol=0.07)
    env = chooser((1.0, 0, 0, 0, 0, 0), epsilon=0.2, n=4)
    drawn = [env.choose(places(3, 2)[0]) for _ in range(400)]
    assert np.mean(np.array(drawn) == 0) == pytest.approx(0.8 + 0.05, abs=0.06)


def test_the_state_is_the_trajectory_and_padding_is_none():
    torch.manual_seed(0)
    agent = TrajectoryAgent(3, 2, np.arange(12.0).reshape(6, 2))
    obs = torch.tensor([[-1, -1, -1, -1], [0, 2, -1, -1], [2, 0, -1, -1], [0, 2, 5, 1]]).float()
    states = agent.state(obs)
    assert (states[0] == 0).all()
    torch.testing.assert_close(states[1], agent.state(torch.tensor([0.0, 2.0])))
    for i in (2, 3):
        assert not torch.allclose(states[1], states[i])
    # Same model and layer numbers, other weights: another state.
    other = TrajectoryAgent(3, 2, np.zeros((6, 2)))
    other.load_state_dict(
        {n: t for n, t in agent.state_dict().items() if n != "features"}, strict=False
    )
    assert not torch.allclose(states[1], other.state(obs)[1])
    # The first policy covers all pairs.
    policy = agent.normal(obs[0])
    np.testing.assert_allclose(policy.mean.detach(), places(3, 2).mean(0), atol=0.05)
    assert policy.stddev[-1].item() == pytest.approx(0.5, abs=0.05)


# ---------------------------------------------------------------------------------- the merge


def test_the_merge_by_hand_and_at_a_corner(problem):
    pool = problem.pool
    theta = dare_ties(np.array([1.0, 0.0]))
    assert theta == "dare_ties:merge=sum,scale=1/0"
    base, own = (
        pool.weights("base", 1),
        pool.weights("e1" if "e1" in pool.names else pool.names[0], 1),
    )
    for name, found in pool.weights(theta, 1).items():
        # Each entry is dropped, or moves as far as the expert's divided by 1 - 0.34.
        moved, tau = found - base[name], own[name] - base[name]
        dropped = moved.abs() < 1e-6
        torch.testing.assert_close(moved[~dropped], tau[~dropped] / 0.66, atol=1e-5, rtol=1e-4)
    share = np.mean(
        [((f - base[n]).abs() < 1e-6).float().mean() for n, f in pool.weights(theta, 1).items()]
    )
    assert share == pytest.approx(0.34, abs=0.1)


def test_what_stands_for_the_weights(problem):
    pool = problem.pool
    models = (*pool.names, "task_arithmetic:scale=0.5")
    found = hm3.summary(pool, models).reshape(3, 3, 3)
    for k in range(3):
        flat = {
            m: torch.cat([t.flatten() for t in pool.weights(m, k).values()])
            for m in ("base", *models)
        }
        one, two, both = (flat[m] - flat["base"] for m in models)
        np.testing.assert_allclose(found[0, k, 0], one.norm() / flat["base"].norm(), rtol=1e-5)
        np.testing.assert_allclose(found[0, k, 1], 1, rtol=1e-5)
        np.testing.assert_allclose(found[1, k, 1], one @ two / one.norm() / two.norm(), rtol=1e-4)
        np.testing.assert_allclose(found[2, k, 2], both @ two / both.norm() / two.norm(), rtol=1e-4)


# ---------------------------------------------------------------------------------- the search


def test_any_layer_may_follow_any_other(problem, tmp_path):
    """A wild path has the scores of the plain evaluation, and its exported model those logits."""
    scorer, theta = problem.scorer(fraction=0.5, stem="agent"), dare_ties(np.array([0.3, 0.7]))
    models = (*problem.pool.names, theta)
    gains = []
    env = LayersEnv(
        lambda path: gains.append(scorer.score(path)) or gains[-1],
        *(models, scorer.stacks, [0.3, 0.7]),
        stem=Step(theta, -1),
    )
    a, b, t = 0, 3, 6
    *_, info = walked(env, b + 1, t + 0, a + 1, a + 1, t + 2)
    path = info["path"]
    assert [step.layer for step in path] == [-1, 1, 0, 1, 1, 2]
    np.testing.assert_allclose(gains[0], evaluate(problem.pool, problem.tasks, path, "reward"))
    layers = LayerPath.of(problem.pool, path)
    folder = layers.save_pretrained(tmp_path / "merged", problem.pool)
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wanted = predict_all(problem.pool, problem.tasks, path, "reward")
    start = 0
    for task, answers, name in zip(problem.tasks, wanted, problem.pool.names, strict=True):
        n = len(next(iter(problem.pool.heads[name].values())))
        images = task.batch("reward", slice(None))
        with torch.no_grad():
            logits = model(images)[:, start : start + n]
        assert torch.equal(logits.argmax(1), answers)
        start += n


def every_path(n_models, most):
    """All paths of two layers: any number of layers 0, then a layer 1, or the most."""
    starts = [()]
    for depth in range(1, most + 1):
        for before in starts:
            yield from ((*before, 2 * m + 1) for m in range(n_models))
        starts = [(*before, 2 * m) for before in starts for m in range(n_models)]
        if depth == most:
            yield from starts


def test_a_small_problem_is_solved_as_brute_force_does():
    """b@0 and then t@1: 1; each of them alone pays a half, and each layer costs."""

    def score(path):
        right = sum(str(a) == b for a, b in zip(path, ("b@0", "t@1"), strict=False))
        return np.array([right / 2, right / 2])

    env = LayersEnv(score, ("a", "b", "t"), ONE, [0.5, 0.5])
    values = {}
    for actions in every_path(3, 4):
        _, value, *_, info = walked(env, *actions)
        values[info["path"]] = value
    assert len(values) == 3 + 9 + 27 + 81 + 81
    best = max(values, key=values.get)
    assert values[best] == pytest.approx(1 - 2 * BETA)
    gains = []
    for seed in (0, 1):
        training = Training(env, np.zeros((6, 1)), seed)
        training.learn(250)
        assert len(training.played) == 250
        assert max(training.played)[1] == best
        worth = np.array([value for value, _ in training.played])
        gains.append(worth[-50:].mean() - worth[:50].mean())
    assert np.mean(gains) > 0.2  # it plays better, not only often enough


def test_the_search_spends_its_budget_and_can_be_repeated(problem):
    def found(seed):
        scorer = problem.scorer(fraction=0.25, stem="agent")
        return scorer, hm3.hm3()(scorer, 60, seed, UNIT)

    (scorer, out), (_, again) = found(1), found(1)
    assert len(out) == scorer.evaluations == 60
    assert out == again
    assert out.answers == again.answers
    assert found(2)[1] != out
    scored = dict(out)
    assert 2 <= len(out.answers) <= hm3.PREFERENCES
    for path in out.answers:
        assert path_text(path) in scored
        assert path[0].source.startswith("dare_ties:merge=sum,scale=")
    # Each preference's merge is scored whole, and no path mixes two merges.
    thetas = [{s.source for s in parse_path(text) if "dare_ties" in s.source} for text, _ in out]
    assert all(len(own) == 1 for own in thetas)
    assert len(set.union(*thetas)) == hm3.PREFERENCES
    whole = [text for text, _ in out if len({w.split("@")[0] for w in text.split()}) == 1]
    assert len({text.split("@")[0] for text in whole}) == hm3.PREFERENCES


def test_a_task_that_does_not_count_has_no_weight_in_the_merge(problem):
    scorer = problem.scorer(fraction=0.25, stem="agent")
    ends = Ends(np.array([0.5, 0.0]), np.array([0.5, 1.0]))
    out = hm3.hm3()(scorer, 20, 1, ends)
    thetas = {s.source for text, _ in out for s in parse_path(text) if "dare" in s.source}
    assert thetas == {"dare_ties:merge=sum,scale=0/1"}


def test_without_its_merge_it_has_the_experts_layers_alone(problem):
    scorer = problem.scorer(fraction=0.25, stem="agent")
    out = hm3.hm3(merge=False)(scorer, 40, 1, UNIT)
    assert len(out) == 40
    steps = [step for text, _ in out for step in parse_path(text)]
    assert {step.source for step in steps} == set(problem.pool.names)
    assert out.answers


def test_layers_are_whole_blocks_where_the_pool_has_their_parts(tiny):
    problem = load_problem(**tiny, operators=("ties",), stem="base", unit="sublayer")
    pool = problem.pool
    whole = hm3.summary(load_problem(**tiny, operators=("ties",), stem="base").pool, pool.names)
    np.testing.assert_allclose(hm3.summary(pool, pool.names), whole, rtol=1e-4)
    out = hm3.hm3()(problem.scorer(fraction=0.25, stem="agent"), 40, 1, UNIT)
    assert len(out) == 40
    wild = set()
    for text, _ in out:
        _, *steps = parse_path(text)
        for attention, mlp in zip(steps[::2], steps[1::2], strict=True):
            assert attention.source == mlp.source
            assert (attention.layer % 2, mlp.layer) == (0, attention.layer + 1)
        wild |= {tuple(step.layer for step in steps)}
    assert len(wild) > 3
    assert set(out.answers) <= {parse_path(text) for text, _ in out}


def test_a_t5s_encoder_comes_before_its_decoder(t5s):
    problem = problem_of(t5s)
    scorer = problem.scorer(fraction=0.25)
    encoder, decoder = scorer.stacks
    out = hm3.hm3()(scorer, 30, 1, UNIT)
    assert len(out) == 30
    orders = {tuple(step.layer for step in parse_path(text)) for text, _ in out}
    for order in orders:
        kinds = [k in decoder for k in order]
        assert kinds == sorted(kinds)
        assert order[-1] in decoder
        assert order[0] in encoder
    assert len(orders) > 3


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_language_model_in_any_order_is_exported_as_transformers_runs_it(variant, tmp_path):
    """Each row's answer and the scores, by the loaded model alone; and its card beside it."""
    model = lm_models.hf_model(variant)
    models = [model, *(lm_models.tuned(model, seed, 0.3) for seed in (1, 2))]
    folders = [lm_models.write_lm(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    texts = [lm_models.write_texts(tmp_path / f"d{i}", i, "choices", 30) for i in range(2)]
    base, *experts = map(str, folders)
    models = {"base": base, "experts": tuple(experts), "texts": tuple(map(str, texts))}
    problem = load_problem(**models, operators=("ties",), stem="agent")
    scorer = problem.scorer(fraction=0.5, stem="agent")
    theta = dare_ties(np.array([0.25, 0.75]))
    env = LayersEnv(
        lambda path: np.zeros(2), (*problem.pool.names, theta), scorer.stacks, [0.25, 0.75]
    )
    *_, info = walked(env, 4, 0, 7, 7, 2)  # two@1 one@0 theta@1 theta@1 one@2
    path = (Step(theta, -1), *info["path"])
    assert [step.layer for step in path] == [-1, 1, 0, 1, 1, 2]
    front = find_front(scorer, [], UNIT, [path])
    [point] = front.points
    folder = front.export(0, tmp_path / "point", [1, 3])
    merged = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert merged.config.num_hidden_layers == 5
    answers = predict_all(problem.pool, problem.tasks, path, "reward")
    for task, score, found in zip(problem.tasks, point.reward, answers, strict=True):
        rows = [json.loads(line) for line in (Path(task.source) / "reward.jsonl").open()]
        chosen = [choice(merged, row) for row in rows]
        assert chosen == found.tolist()
        assert score == pytest.approx(
            np.mean([c == r["label"] for c, r in zip(chosen, rows, strict=True)])
        )
    card = (folder / "README.md").read_text("utf-8")
    assert "pipeline_tag: text-generation" in card
    assert "25%" in card
    assert LayerPath.from_json((folder / "path.json").read_text("utf-8")) == point.path


def choice(model, row):
    """The number of a row's choice that a model finds the likeliest."""
    prompt = [1, *lm_models.numbers(row["input"])]
    found = [
        lm_models.log_probability(model, prompt, [*lm_models.numbers(text), 2])
        for text in row["choices"]
    ]
    return int(np.argmax(found))
