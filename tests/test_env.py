"""The environment against hand-walked episodes, and DAR against hand-computed numbers."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from rmm_lab.env import DynamicAverageReward, MergingEnv, dar
from rmm_lab.errors import InputError
from rmm_lab.reward import parse_path


class Scores:
    """A scorer whose scores are given: N models, M operators, L layers in stacks; no model at all."""

    def __init__(
        self, n=2, m=2, layers=3, stacks=None, n_subsets=2, score=None, chooses_stem=False
    ):
        self.sources = tuple(f"m{i}" for i in range(n)) + tuple(f"op{i}" for i in range(m))
        self.n_models, self.n_layers, self.n_subsets = n, layers, n_subsets
        self.stacks = stacks or (range(layers),)
        self.task_names = [f"t{i}" for i in range(n)]
        self.chooses_stem = chooses_stem
        self.calls = []
        self._score = score or (lambda path, subset: np.full(n, 0.5))

    def score(self, path, subset=None):
        self.calls.append((path, subset))
        return np.asarray(self._score(path, subset))


SKIP, BACK = 4, 5  # with two models and two operators


def walk(env, actions, **options):
    env.reset(**options)
    for action in actions:
        step = env.step(action)
    return step


def test_actions_in_the_order_models_operators_skip_back():
    env = MergingEnv(Scores())
    assert env.action_names == ("m0", "m1", "op0", "op1", "skip", "back")
    assert env.action_space.n == 6


def test_a_walk_by_hand():
    """m1 at 0, back, op0 at 0, skip 1, m0 at 2: the second choice at layer 0 stacks on the first."""
    scorer = Scores(score=lambda path, subset: [0.2, 0.8])
    env = MergingEnv(scorer, observation="map")
    obs, info = env.reset()
    assert obs.shape == (4, 3)
    assert not obs.any()
    assert info["layer"] == 0
    layers, rewards = [], []
    for action in (1, BACK, 2, SKIP, 0):
        obs, reward, terminated, truncated, info = env.step(action)
        layers.append(info["layer"])
        rewards.append(reward)
        assert not truncated
    assert layers == [1, 0, 1, 2, 3]
    assert rewards == [0, 0, 0, 0, 0.5]  # (0.2 + 0.8) / 2, Eq. 7, at the end only
    assert terminated
    path = parse_path("m1@0 op0@0 m0@2")
    assert info["path"] == path
    expected = np.zeros((4, 3))
    expected[1, 0] = expected[2, 0] = expected[0, 2] = 1  # Eq. 5
    assert np.array_equal(obs, expected)
    assert info["scores"] == {"t0": 0.2, "t1": 0.8}
    assert info["raw_reward"] == pytest.approx(0.5)
    assert scorer.calls == [(path, 0)]


def test_the_cursor_row_shows_what_the_map_does_not():
    env, blind = MergingEnv(Scores()), MergingEnv(Scores(), observation="map")
    before, _ = env.reset()
    after, *_ = env.step(SKIP)
    assert before[-1].tolist() == [1, 0, 0]
    assert after[-1].tolist() == [0, 1, 0]
    blind_before, _ = blind.reset()
    assert np.array_equal(blind_before, blind.step(SKIP)[0])
    end, *_ = walk(env, [0, 0, 0])
    assert end[-1].tolist() == [0, 0, 0]


def test_back_at_layer_zero_ends_with_the_penalty():
    scorer = Scores()
    env = MergingEnv(scorer, penalty=-0.3)
    _, reward, terminated, truncated, info = walk(env, [BACK])
    assert (reward, terminated, truncated) == (-0.3, True, False)
    assert info["penalised"]
    assert "scores" not in info
    assert scorer.calls == []


def test_back_over_the_border_of_two_stacks_is_as_illegal_as_at_layer_zero():
    env = MergingEnv(Scores(layers=4, stacks=(range(2), range(2, 4))))
    *_, info = walk(env, [0, 0])
    assert info["action_mask"][BACK] == 0
    _, reward, terminated, _, info = env.step(BACK)
    assert (reward, terminated, info["penalised"]) == (-0.1, True, True)
    *_, info = walk(env, [0, 0, 0])
    assert info["action_mask"][BACK] == 1  # inside the second stack it is legal


@pytest.mark.parametrize(
    ("bounds", "actions", "reward", "truncated"),
    [
        ({"max_steps": 4}, [SKIP, BACK, SKIP, BACK], -0.1, True),
        ({"max_steps": 3}, [0, 0, 0], 0.5, False),  # the last allowed step may end the walk
        ({"max_depth": 2}, [0, 1, 0], -0.1, True),
        ({}, [SKIP] * 3, 0.5, False),  # an empty path is scored
    ],
)
def test_an_episode_ends_after_the_last_layer_or_at_a_bound(bounds, actions, reward, truncated):
    scorer = Scores()
    _, found, terminated, cut, info = walk(MergingEnv(scorer, **bounds), actions)
    assert (found, terminated, cut) == (reward, not truncated, truncated)
    assert (info["penalised"], info["raw_reward"]) == (truncated, reward)
    assert scorer.calls == ([] if truncated else [(info["path"], 0)])


def test_an_ended_episode_and_a_wrong_action_are_refused():
    env = MergingEnv(Scores())
    walk(env, [0, 0, 0])
    with pytest.raises(InputError, match="call reset"):
        env.step(0)
    env.reset()
    with pytest.raises(InputError, match="0 to 5, found 6"):
        env.step(6)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("observation", "all"), ("render_mode", "human"), ("max_steps", 2), ("max_depth", 0)],
)
def test_arguments_out_of_range_are_refused(argument, value):
    with pytest.raises(InputError, match="expected"):
        MergingEnv(Scores(), **{argument: value})


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(1, 8),
    st.booleans(),
)
def test_who_obeys_the_mask_always_reaches_the_end(data, layers, slack, max_depth, two_stacks):
    """Whatever the bounds, a random legal walk ends in time, unpunished, inside its stacks."""
    cut = layers // 2
    stacks = (range(cut), range(cut, layers)) if two_stacks and cut else (range(layers),)
    scorer = Scores(layers=layers, stacks=stacks)
    env = MergingEnv(scorer, max_steps=layers + slack, max_depth=max_depth)
    _, info = env.reset()
    done, steps = False, 0
    while not done:
        legal = np.flatnonzero(info["action_mask"]).tolist()
        assert legal
        _, _, terminated, truncated, info = env.step(data.draw(st.sampled_from(legal)))
        steps += 1
        done = terminated or truncated
    assert terminated
    assert not truncated
    assert not info["penalised"]
    assert steps <= layers + slack
    assert len(info["path"]) <= max_depth
    stack_of = [next(i for i, s in enumerate(stacks) if step.layer in s) for step in info["path"]]
    assert stack_of == sorted(stack_of)  # once in the second stack, never back in the first


def test_every_forbidden_action_would_have_been_punished():
    """The mask forbids nothing that it need not: an action it hides leads to the penalty for sure."""
    env = MergingEnv(Scores(), max_steps=4, max_depth=2)
    rng = np.random.default_rng(0)
    hidden = 0
    for _ in range(300):
        _, info = env.reset()
        taken, done = [], False
        while not done:
            forbidden = np.flatnonzero(info["action_mask"] == 0)
            legal = np.flatnonzero(info["action_mask"])
            if len(forbidden) and rng.random() < 0.5:
                taken.append(int(rng.choice(forbidden)))
                assert not _can_end(taken)
                hidden += 1
                break
            taken.append(int(rng.choice(legal)))
            *_, terminated, truncated, info = env.step(taken[-1])
            done = terminated or truncated
    assert hidden > 50


def _can_end(prefix) -> bool:
    """Brute force: is there any way on from these actions that is not punished?"""
    env = MergingEnv(Scores(), max_steps=4, max_depth=2)
    *_, terminated, truncated, info = walk(env, prefix)
    if terminated or truncated:
        return not info["penalised"]
    return any(_can_end([*prefix, a]) for a in (0, SKIP, BACK))


def test_subsets_come_in_turn_and_a_window_ends_when_all_were_used():
    env = MergingEnv(Scores(n_subsets=3), episodes_per_subset=2)
    seen = []
    for _ in range(8):
        _, info = env.reset()
        seen.append((info["subset"], info["new_window"]))
    assert [s for s, _ in seen] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert [w for _, w in seen] == [True, False, False, False, False, False, True, False]


def test_a_chosen_subset_leaves_the_turn_as_it_was():
    scorer = Scores(n_subsets=3)
    env = MergingEnv(scorer)
    env.reset()
    walk(env, [0, 0, 0], options={"subset": None})
    assert scorer.calls[-1][1] is None
    _, info = env.reset(options={"subset": 2})
    assert info["subset"] == 2
    _, info = env.reset()
    assert info["subset"] == 1
    _, info = env.reset(options={"episode": 5})
    assert info["subset"] == 2
    with pytest.raises(InputError, match="0 to 2 or None, found 3"):
        env.reset(options={"subset": 3})


@pytest.mark.parametrize("chooses_stem", [False, True])
@pytest.mark.parametrize("observation", ["map", "map+cursor"])
def test_gymnasium_finds_nothing_to_warn_of(observation, chooses_stem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("ansi", "rgb_array"):
            env = gym.make(
                "rmm_lab/Merging-v0",
                scorer=Scores(chooses_stem=chooses_stem),
                observation=observation,
                render_mode=mode,
            )
            check_env(env.unwrapped)


def test_gymnasium_accepts_the_environment_of_real_models(problem):
    """With its ``spec``, from which the check makes the environment again, scorer and all."""
    scorer = problem.scorer(fraction=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("rmm_lab/Merging-v0", scorer=scorer, render_mode="ansi")
        check_env(env.unwrapped)
    assert env.spec is not None
    assert env.spec.id == "rmm_lab/Merging-v0"


def test_the_registered_environment_is_the_demos_pair():
    env = gym.make("rmm_lab/Merging-v0")
    assert env.unwrapped.action_names[:2] == ("digits", "textures")
    assert env.unwrapped.action_names[-2:] == ("skip", "back")
    assert env.unwrapped.n_layers == 6
    env.reset(seed=0)
    for _ in range(7):  # the stem and six layers
        *_, terminated, _, info = env.step(0)
    assert terminated
    assert info["scores"]["digits"] > 0.5 > info["scores"]["textures"]


def test_render_shows_map_cursor_and_path():
    env = MergingEnv(Scores(), render_mode="ansi")
    walk(env, [1, BACK, 1, SKIP])
    text = env.render()
    assert text.splitlines()[2].split() == ["m1", "2", ".", "."]
    assert text.splitlines()[-2].index("^") == text.splitlines()[0].index("2")
    assert text.splitlines()[-1] == "path: m1@0 m1@0"
    picture = MergingEnv(Scores(), render_mode="rgb_array")
    walk(picture, [1])
    pixels = picture.render()
    assert pixels.shape == (4 * 24, 3 * 24, 3)
    assert pixels.dtype == np.uint8
    assert not np.array_equal(pixels[36, 12], pixels[12, 12])  # taken once, against never


# ----------------------------------------------------------------------------------- DAR, Eq. 10


def test_dar_by_hand():
    assert dar(0.6, None, 5, 10, 0.8) == 0.6
    # weight 0.8 * 5/10 = 0.4: 0.4 * 0.2 + 0.6 * 0.6
    assert dar(0.6, 0.2, 5, 10, 0.8) == pytest.approx(0.44)
    assert dar(0.6, 0.2, 0, 10, 0.8) == 0.6  # t = 0: the current reward alone
    assert dar(0.6, 0.2, 10, 10, 1.0) == 0.2  # lambda t/T = 1: the previous one alone


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6), st.floats(0, 1))
def test_dar_stays_between_the_two_rewards_even_after_t_max(reward, previous, t, dar_lambda):
    blended = dar(reward, previous, t, 10, dar_lambda)
    assert min(reward, previous) - 1e-12 <= blended <= max(reward, previous) + 1e-12
    if t >= 10:
        assert blended == dar(reward, previous, 10, 10, dar_lambda)


def paid(rewards, n_subsets=10, **options):
    """The environment under DAR, paying these rewards in turn."""
    rewards = iter(rewards)
    scorer = Scores(n_subsets=n_subsets, score=lambda path, subset: np.full(2, next(rewards)))
    return DynamicAverageReward(MergingEnv(scorer), **options)


def episode(env, actions=(0, 0, 0), **options):
    _, reward, *_, info = walk(env, actions, **options)
    return reward, info


def test_dar_runs_on_within_a_window_and_starts_over_with_the_next():
    env = paid([0.5, 0.7, 0.1, 0.9, 0.3], n_subsets=3, dar_lambda=0.8, max_episodes=8)
    seen = [episode(env) for _ in range(5)]
    # t = 1: weight 0.1; t = 2: weight 0.2 on the blended one before; t = 3: a new window, weight 0;
    # t = 4: weight 0.4
    first = 0.1 * 0.5 + 0.9 * 0.7
    second = 0.2 * first + 0.8 * 0.1
    assert [r for r, _ in seen] == pytest.approx([0.5, first, second, 0.9, 0.4 * 0.9 + 0.6 * 0.3])
    assert [i["raw_reward"] for _, i in seen] == pytest.approx([0.5, 0.7, 0.1, 0.9, 0.3])
    assert [i["dar_reward"] for _, i in seen] == pytest.approx([r for r, _ in seen])


def test_a_penalty_is_not_blended_and_never_a_previous_reward():
    env = paid([0.8, 0.4], dar_lambda=0.8, max_episodes=4)
    assert episode(env)[0] == pytest.approx(0.8)
    assert episode(env, [BACK])[0] == -0.1
    assert episode(env)[0] == pytest.approx(0.4 * 0.8 + 0.6 * 0.4)  # t = 2 of 4


@pytest.mark.parametrize("subset", [3, None])
def test_an_episode_out_of_turn_is_neither_blended_nor_counted(subset):
    env = paid([0.8, 0.2, 0.4], dar_lambda=0.8, max_episodes=4)
    assert episode(env)[0] == pytest.approx(0.8)
    assert episode(env, options={"subset": subset})[0] == pytest.approx(0.2)
    assert episode(env)[0] == pytest.approx(0.2 * 0.8 + 0.8 * 0.4)  # t = 1 of 4


class Drifting(Scores):
    """A scorer whose drift from two models is given by the last source, and 0 at the start."""

    def drift(self, path):
        at = self.sources.index(path[-1].source) if path else 0
        return np.array([at, 3.0 * at])


def test_the_drift_stands_at_the_cursor():
    """Behind op0, number 2: drifts 2 and 6, so 2/3 and 6/7; after that op1: 3 and 9."""
    env = MergingEnv(Drifting(), observation="map+cursor+drift")
    obs, _ = env.reset()
    assert obs.shape == env.observation_space.shape == (4 + 1 + 2, 3)
    assert not obs[5:].any()
    expected = {2: [[0, 2 / 3, 0], [0, 6 / 7, 0]], 3: [[0, 0, 3 / 4], [0, 0, 9 / 10]]}
    for action, rows in expected.items():
        obs, *_ = env.step(action)
        np.testing.assert_allclose(obs[5:], rows, rtol=1e-6)
        plain = MergingEnv(Scores())
        plain.reset()
        for a in range(2, action + 1):
            seen, *_ = plain.step(a)
        np.testing.assert_array_equal(obs[:5], seen)
    obs, *_ = env.step(0)
    assert not obs[4:].any()  # the end has no cursor
    assert env.observation_space.contains(obs)


def test_infinite_drift_is_a_number_to_the_agent():
    scorer = Drifting()
    scorer.drift = lambda path: np.array([np.inf, 0.0])
    obs, _ = MergingEnv(scorer, observation="map+cursor+drift").reset()
    assert obs[5:, 0].tolist() == [1, 0]


def test_a_scorer_without_drift_is_told():
    with pytest.raises(InputError, match=r"drift\(path\), found none"):
        MergingEnv(Scores(), observation="map+cursor+drift")


def test_a_seed_forgets_the_previous_reward_and_t():
    env = paid([0.8, 0.3, 0.6, 0.4], dar_lambda=0.8, max_episodes=4)
    for _ in range(2):
        episode(env)
    assert episode(env, seed=0)[0] == pytest.approx(0.6)
    assert episode(env)[0] == pytest.approx(0.2 * 0.6 + 0.8 * 0.4)  # t = 1 of 4


def test_an_episode_number_sets_t():
    env = paid([0.8, 0.4], dar_lambda=0.8, max_episodes=4)
    episode(env)
    assert episode(env, options={"episode": 3})[0] == pytest.approx(0.6 * 0.8 + 0.4 * 0.4)


@pytest.mark.parametrize(
    ("options", "found"),
    [({"dar_lambda": 1.2}, r"1\.2"), ({"max_episodes": 0}, "at least 1, .* 0")],
)
def test_dar_refuses_arguments_out_of_range(options, found):
    with pytest.raises(InputError, match=f"{next(iter(options))}: .*{found}"):
        DynamicAverageReward(MergingEnv(Scores()), **{"dar_lambda": 1, "max_episodes": 3} | options)


@pytest.mark.parametrize("fraction", [0.3, 0.15, 0.1, 0.01, 1.0])
def test_the_window_is_a_whole_number_of_subsets(fraction, problem):
    """A float modulo resets once in 700 episodes for fractions such as 0.3 ."""
    scorer = problem.scorer(fraction=fraction)
    env = MergingEnv(scorer)
    new = [env.reset()[1]["new_window"] for _ in range(300)]
    starts = [i for i, w in enumerate(new) if w]
    expected = {0.3: 3, 0.15: 7, 0.1: 10, 0.01: 100, 1.0: 1}[fraction]
    assert set(np.diff(starts)) == {expected}


# --------------------------------------------------------------------- the agent chooses the stem


def test_the_stem_is_chosen_first_by_a_source_or_left_the_bases_by_skip():
    scorer = Scores(chooses_stem=True)
    env = MergingEnv(scorer, observation="map")
    obs, info = env.reset()
    assert obs.shape == (4, 4)  # a column for the stem in front
    assert info["layer"] == -1
    assert info["action_mask"].tolist() == [1, 1, 1, 1, 1, 0]  # no way back from here
    obs, *_, info = walk(env, [2, 0, SKIP, 1])
    assert info["path"] == parse_path("op0@-1 m0@0 m1@2")
    assert obs[2, 0] == obs[0, 1] == obs[1, 3] == 1
    assert obs.sum() == 3
    *_, info = walk(env, [SKIP, 0, 0, 0])
    assert info["path"] == parse_path("m0@0 m0@1 m0@2")


def test_there_is_no_way_back_to_the_stem_and_it_is_no_layer():
    env = MergingEnv(Scores(chooses_stem=True), max_depth=3)
    *_, info = walk(env, [2])
    assert info["action_mask"][BACK] == 0
    _, reward, terminated, _, _ = env.step(BACK)
    assert (reward, terminated) == (-0.1, True)
    _, reward, terminated, truncated, info = walk(env, [2, 0, 1, 0])
    assert (reward, terminated, truncated) == (0.5, True, False)  # three layers, as allowed
    assert len(info["path"]) == 4
