"""The explorers' functions against numbers computed by hand; what their views draw and say."""

from __future__ import annotations

import itertools
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import Dropdown, FloatSlider
from matplotlib.text import Text
from peft.utils import merge_utils
from safetensors.torch import load_file

from rmm_lab.course import views
from rmm_lab.course.explorers import (
    ClipExplorer,
    DarExplorer,
    DistanceMap,
    TiesExplorer,
    clip_curve,
    dar_weights,
    distances,
    ties_stages,
)
from rmm_lab.course.views import status
from rmm_lab.env import dar
from rmm_lab.errors import InputError
from rmm_lab.search.problem import load_problem

NAN = float("nan")


@pytest.fixture
def only_text(monkeypatch):
    """Skip the PNG, which takes most of a view's time and adds nothing to its sentence."""
    monkeypatch.setattr(views, "img", lambda figure, alt, **_: alt)


# ------------------------------------------------------------------------------ TIES

TWO = torch.tensor([[4.0, -3.0, 1.0, 2.0], [-5.0, -1.0, 2.0, 2.0]])


def test_ties_stages_by_hand():
    s = ties_stages(TWO, density=0.5, scale=0.5)
    assert s.trimmed.tolist() == [[4, -3, 0, 0], [-5, 0, 2, 0]]  # of equal ones the first is kept
    assert s.sign.tolist() == [-1, -1, 1, 0]
    assert s.agreeing.tolist() == [[False, True, False, False], [True, False, True, False]]
    assert s.merged.tolist() == [-5, -3, 2, 0]
    assert s.scaled.tolist() == [-2.5, -1.5, 1, 0]


def test_without_trimming_all_entries_vote():
    s = ties_stages(TWO, density=1.0, scale=2.0)
    assert s.sign.tolist() == [-1, -1, 1, 1]
    assert s.merged.tolist() == [-5, -2, 1.5, 2]
    assert s.scaled.tolist() == [-10, -4, 3, 4]


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_the_merged_stage_is_that_of_peft(density):
    deltas = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    expected = merge_utils.ties(list(deltas), torch.ones(3), density)
    torch.testing.assert_close(ties_stages(deltas, density, 1.0).merged, expected)


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(InputError, match="density"):
        ties_stages(TWO, density, 1.0)


@pytest.mark.usefixtures("only_text")
def test_ties_explorer_counts_what_is_kept_and_what_disagrees():
    view = TiesExplorer()
    # Kept: places 1 2 3 4 6 10 of expert 1, and 1 2 3 4 7 11 of expert 2; conflicts at 2 and 4.
    # |mean| sums to 3.145, mean | | to 5.895; place 6: (0.45 - 0.49) / 2.
    for numbers in ("keeps 12 of 24", "at 2 of 12 places", "at 1 of them neither sign wins",
                    "9 entries", "47%", "at place 6 it gives -0.02, the disjoint mean 0.45"):  # fmt: skip
        assert numbers in view.status.value
    view.density.value = 0.25  # places 1 2 4, and 1 7 11
    for numbers in ("keeps 6 of 24", "at 0 of 12 places. 6 entries", "gives 0.00", "mean 0.80"):
        assert numbers in view.status.value
    view.density.value = 1  # the larger value at place 6 is there again, and wins
    for numbers in ("keeps 24 of 24", "at 8 of 12 places, and at 1 of them", "mean -0.49"):
        assert numbers in view.status.value
    view.density.value, view.experts.value = 0.5, 3  # keeps its 1 2 3 4 7 11: it breaks the tie
    for numbers in ("keeps 18 of 36", "at 4 of 12 places. "):
        assert numbers in view.status.value


@pytest.mark.usefixtures("only_text")
def test_ties_bars_are_the_stages():
    view = TiesExplorer()
    view.scale.value = 2
    raw, kept, sign, merged, scaled = view.still()[0].axes
    heights = [p.get_height() for p in merged.patches]
    expected = [0.95, 0.7, -0.7, 0, 0, 0.45, -0.9, 0, 0, 0.6, 1.1, 0]
    assert heights == pytest.approx(expected)
    assert [p.get_height() for p in scaled.patches] == pytest.approx([2 * e for e in expected])
    assert "".join(t.get_text() for t in sign.texts) == "++−00+−00++0"
    assert len(raw.patches) == 24
    assert sum(p.get_height() != 0 for p in kept.patches if p.get_fill()) == 12
    assert sum(p.get_height() != 0 for p in kept.patches if not p.get_fill()) == 12
    crosses = np.concatenate([line.get_xdata() for line in kept.lines if line.get_marker() == "X"])
    assert sorted(np.round(crosses).astype(int)) == [2, 4, 4]


@pytest.mark.usefixtures("only_text")
def test_ties_explorer_takes_own_numbers_and_refuses_other_shapes():
    view = TiesExplorer(TWO)
    assert view.experts.value == 2
    assert "keeps 4 of 8" in view.status.value
    for deltas in (TWO[:1], TWO[0], torch.ones(2, 25), torch.ones(8, 3)):
        with pytest.raises(InputError, match="2 to 7 experts by 1 to 24 numbers"):
            TiesExplorer(deltas)
    none = TiesExplorer(torch.zeros(2, 4)).status.value
    assert "keeps 0 of 8" in none
    assert "cancels 0% of their magnitude" in none


# ------------------------------------------------------------------------------ PPO's clip


@pytest.mark.parametrize(
    ("advantage", "values", "gradients"),
    [
        (2.0, [1.0, 1.8, 2.2, 2.4], [2, 2, 2, 0]),
        (-2.0, [-1.6, -1.8, -2.2, -3.0], [0, -2, -2, -2]),
        (0.0, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_clip_curve_by_hand(advantage, values, gradients):
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    value, gradient = clip_curve(ratio, advantage, 0.2)
    assert value.tolist() == pytest.approx(values)
    assert gradient.tolist() == pytest.approx(gradients)
    assert not ratio.requires_grad


@pytest.mark.usefixtures("only_text")
@pytest.mark.parametrize(
    ("ratio", "advantage", "where", "gradient", "effect"),
    [
        (1.3, 1, "above", "0", "no longer moves"),
        (0.7, 1, "below", "1.00", "more probable. The clip does not stop it"),
        (1.3, -1.5, "above", "-1.50", "less probable. The clip does not stop it"),
        (0.7, -1.5, "below", "0", "no longer moves"),
        (1.1, -1.5, "between", "-1.50", "less probable."),
        (1.3, 0, "above", "0", "neither better nor worse"),
    ],
)
def test_clip_explorer_says_what_the_gradient_does(ratio, advantage, where, gradient, effect):
    view = ClipExplorer()
    view.ratio.value, view.advantage.value = ratio, advantage
    for part in (f"The ratio {ratio:.2f} is {where}", f"the gradient is {gradient},", effect):
        assert part in view.status.value
    assert ("The clip" in view.status.value) == ("The clip" in effect)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("advantage", [1, -1])
@pytest.mark.parametrize("hair", [0, 4e-16, -4e-16])
def test_the_border_itself_is_not_clipped_whatever_the_last_digit(
    side, advantage, hair, monkeypatch
):
    monkeypatch.setattr(ClipExplorer, "refresh", lambda self, change=None: None)  # only the text
    monkeypatch.setattr(ClipExplorer, "_figure", lambda self, *numbers: None)
    view = ClipExplorer()
    view.advantage.value = advantage
    for k in range(1, 11):
        view.epsilon.value = 0.05 * k
        view.ratio.value = round(1 + side * 0.05 * k, 2) + hair
        sentence = view.still()[1]
        assert "is between" in sentence
        assert f"the gradient is {advantage:.2f}," in sentence
        assert ("Beyond this border the gradient is 0." in sentence) == (side == advantage)
        view.ratio.value = round(1 + side * 0.05 * (k - 1), 2)
        assert "border" not in view.still()[1]


def test_at_the_kink_autograd_takes_a_value_between_both_sides():
    ratio = torch.tensor([0.8, 1.2], dtype=torch.float64)
    for advantage in (2.0, -2.0):
        value, gradient = clip_curve(ratio, advantage, 0.2)
        assert value.tolist() == pytest.approx([0.8 * advantage, 1.2 * advantage])
        assert all(0 <= g / advantage <= 1 for g in gradient.tolist())


@pytest.mark.usefixtures("only_text")
def test_the_gradients_picture_jumps_where_the_clip_begins():
    view = ClipExplorer()
    view.epsilon.value = 0.5
    left, right = view.still()[0].axes
    pieces = [line.get_xydata() for line in right.lines if len(line.get_xdata()) > 2]
    assert [np.unique(p[:, 1]).tolist() for p in pieces] == [[1.0], [0.0]]
    assert pieces[0][-1, 0] == pytest.approx(1.495)
    smaller, first, second = (line.get_ydata() for line in left.lines[:3])
    np.testing.assert_allclose(smaller, np.minimum(first, second))


# ------------------------------------------------------------------------------ DAR


def test_dar_weights_by_hand():
    assert dar_weights(2, 8, 0.8, 2) == pytest.approx([0.8, 0.2 * 0.9, 0.2 * 0.1])
    assert dar_weights(4, 8, 0.8, 1) == pytest.approx([0.6, 0.4])
    assert dar_weights(3, 8, 0.8, 0).tolist() == [1.0]
    assert dar_weights(5, 8, 0.0, 3).tolist() == [1.0, 0, 0, 0]
    assert dar_weights(8, 8, 1.0, 1).tolist() == [0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dar_weights_are_what_the_environment_makes_of_one_reward(data):
    t_max = data.draw(st.integers(1, 60))
    t = data.draw(st.integers(0, t_max))
    n_back = data.draw(st.integers(0, t))
    scale = data.draw(st.floats(0, 1))
    weights = dar_weights(t, t_max, scale, n_back)
    for back in range(n_back + 1):
        blended = None
        for episode in range(t - n_back, t + 1):
            blended = dar(float(episode == t - back), blended, episode, t_max, scale)
        assert weights[back] == pytest.approx(blended, abs=1e-12)
    assert weights.sum() == pytest.approx(1)
    assert weights.shape == (n_back + 1,)


@pytest.mark.usefixtures("only_text")
def test_dar_explorer_counts_the_episodes_averaged():
    view = DarExplorer(t_max=4)
    view.dar_lambda.value = 1
    # Weights 1/4, 3/8, 9/32, 3/32; their squares sum to 298/1024; 1024 / 298 = 3.44
    for numbers in ("Episode 4 of 4", "its window of 4", "25 %", "75 %", "averaged: 3.4", "54%"):
        assert numbers in view.status.value
    bars = [p.get_height() for p in view.still()[0].axes[0].patches]
    assert bars == pytest.approx([1 / 4, 3 / 8, 9 / 32, 3 / 32])
    view.dar_lambda.value = 0
    assert "its reward counts alone, because λ is 0." in view.status.value
    view.dar_lambda.value, view.window.value = 1, 1
    assert "Episode 3 of 4, the last of its window of 1: its reward counts alone" in (
        view.status.value
    )


@pytest.mark.usefixtures("only_text")
@pytest.mark.parametrize(
    ("time", "window", "episode"),
    [(0, 10, 10), (0.5, 10, 360), (1, 10, 700), (0.5, 100, 400), (0.5, 1, 351)],
)
def test_the_episode_shown_is_the_last_of_its_window(time, window, episode):
    view = DarExplorer()
    view.time.value, view.window.value = time, window
    start = f"Episode {episode} of 700, the last of its window of {window}:"
    assert view.still()[1].startswith(start)


# ------------------------------------------------------------------------------ distances


def fake(groups: dict, stacks=(range(1),), unit="block") -> SimpleNamespace:
    """A problem whose pool holds these weights: source -> [stem, layer 0, ...]."""
    names = tuple(name for name in groups if name != "base")
    pool = SimpleNamespace(
        names=names, n_models=len(names), n_layers=len(groups["base"]) - 1, stacks=stacks, unit=unit,
        weights=lambda source, k: groups[source][k + 1],
    )  # fmt: skip
    return SimpleNamespace(pool=pool)


def weights(**tensors) -> dict:
    return {name: torch.tensor(values) for name, values in tensors.items()}


@pytest.fixture
def by_hand() -> SimpleNamespace:
    """Deltas of the stem: (3, 4), 0, (-3, -4); of layer 0: (1, 0, 0, 1), (-1, 1, 0, 2), (-1, 0, 0, 0).

    The base's norms are 5 and 2. One expert holds its tensors in another order.
    """
    groups = {
        "base": [weights(w=[3.0, 4.0]), weights(x=[0.0, 0.0, 2.0], y=[[0.0]])],
        "a": [weights(w=[6.0, 8.0]), weights(x=[1.0, 0.0, 2.0], y=[[1.0]])],
        "b": [weights(w=[3.0, 4.0]), weights(y=[[2.0]], x=[-1.0, 1.0, 2.0])],
        "c": [weights(w=[0.0, 0.0]), weights(x=[-1.0, 0.0, 2.0], y=[[0.0]])],
    }
    return fake(groups)


def test_distances_by_hand(by_hand):
    found = distances(by_hand)
    assert list(found) == ["length", "cosine", "signs"]
    expected = [[1, 0, 1], [2**0.5 / 2, 6**0.5 / 2, 0.5]]
    np.testing.assert_allclose(found["length"], expected)
    expected = [[NAN, -1, NAN], [1 / 12**0.5, -1 / 2**0.5, 1 / 6**0.5]]  # a-b, a-c, b-c
    np.testing.assert_allclose(found["cosine"], expected)
    np.testing.assert_allclose(found["signs"], [[0, 1, 0], [0.25, 0.25, 0]])


def test_deltas_too_small_to_multiply_still_disagree_and_a_zero_base_has_no_length():
    groups = {"base": [weights(w=[0.0])], "a": [weights(w=[1e-30])], "b": [weights(w=[-1e-30])]}
    found = distances(fake(groups, stacks=()))
    assert found["signs"].tolist() == [[1.0]]
    assert np.isnan(found["length"]).all()
    np.testing.assert_allclose(found["cosine"], [[-1.0]])


def test_distances_of_a_pool_are_those_of_the_files(problem, tiny):
    base, *experts = (
        load_file(f"{folder}/model.safetensors") for folder in (tiny["base"], *tiny["experts"])
    )
    found = distances(problem)
    assert found["length"].shape == (4, 2)
    assert found["cosine"].shape == found["signs"].shape == (4, 1)
    for k, row in itertools.product(range(-1, 3), range(2)):
        names = [
            n for n in base
            if (n.startswith(f"blocks.{k}.") if k >= 0 else not n.startswith(("blocks.", "head.")))
        ]  # fmt: skip
        flat = [np.concatenate([w[n].numpy().ravel() for n in names]) for w in (base, *experts)]
        deltas = [f.astype(float) - flat[0] for f in flat[1:]]
        norms = [np.linalg.norm(d) for d in deltas]
        length = norms[row] / np.linalg.norm(flat[0])
        assert found["length"][k + 1, row] == pytest.approx(length, rel=1e-5)
        cosine = deltas[0] @ deltas[1] / (norms[0] * norms[1])
        assert found["cosine"][k + 1, 0] == pytest.approx(cosine, abs=1e-6)
        signs = np.mean(np.sign(deltas[0]) == -np.sign(deltas[1]))
        assert found["signs"][k + 1, 0] == pytest.approx(signs, abs=1e-3)


@pytest.mark.usefixtures("only_text")
def test_distance_map_names_the_highest_and_the_lowest(by_hand):
    view = DistanceMap(by_hand)
    for part in (
        "length",
        "0.74 on average",
        "highest: 1.22 in layer 0 (b)",
        "0.00 in the stem (b)",
    ):
        assert part in view.status.value
    view.quantity.value = "cosine"  # -1, 0.289, -0.707 and 0.408 are defined
    for part in ("-0.25 on average", "0.41 in layer 0 (b – c)", "-1.00 in the stem (a – c)"):
        assert part in view.status.value
    axes = view.still()[0].axes[0]
    cells = {t.get_position(): t.get_text() for t in axes.texts}
    assert cells == {
        (0, 0): "–", (0, 1): "-1.00", (0, 2): "–", (1, 0): "0.29", (1, 1): "-0.71", (1, 2): "0.41",
    }  # fmt: skip
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a – b", "a – c", "b – c"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["stem", "0"]
    view.quantity.value = "signs"
    assert "is 0.25 on average; highest: 1.00 in the stem (a – c)" in view.status.value


@pytest.mark.usefixtures("only_text")
def test_distance_map_of_two_stacks_tells_encoder_from_decoder():
    layers = {"base": 1.0, "a": 2.0, "b": 4.0}
    groups = {n: [weights(w=[v if k == 2 else 1.0]) for k in range(3)] for n, v in layers.items()}
    problem = fake(groups, stacks=(range(1), range(1, 2)))
    assert "highest: 3.00 in layer dec 0 (b)" in DistanceMap(problem).status.value


@pytest.mark.usefixtures("only_text")
def test_distance_map_of_sublayers_says_so(tiny):
    groups = {"base": [1.0, 1.0, 1.0], "a": [1.0, 1.0, 2.0], "b": [1.0, 1.5, 1.0]}
    stored = {name: [weights(w=[v]) for v in values] for name, values in groups.items()}
    view = DistanceMap(fake(stored, stacks=(range(2),), unit="sublayer"))
    assert "highest: 1.00 in sublayer 1 (a)" in view.status.value
    assert view.still()[0].axes[0].get_xlabel() == "sublayer"
    real = load_problem(**tiny, operators=("ties",), unit="sublayer")
    assert DistanceMap(real).places == ["stem", *"012345"]
    assert DistanceMap(load_problem(**tiny, operators=("ties",))).unit == "layer"


@pytest.mark.usefixtures("only_text")
def test_distance_map_without_any_move_says_so():
    same = fake({name: [weights(w=[1.0])] for name in ("base", "a", "b")}, stacks=(range(0),))
    view = DistanceMap(same)
    view.quantity.value = "cosine"
    assert "undefined in every layer" in view.still()[1]


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("make", [TiesExplorer, ClipExplorer, DarExplorer, DistanceMap])
def test_every_explorer_says_in_text_what_its_picture_shows(make, by_hand, monkeypatch):
    monkeypatch.setattr(views, "page_webp", lambda figure: b"")  # most of the time
    view = make(by_hand) if make is DistanceMap else make()
    controls = [c for c in view.children if isinstance(c, FloatSlider | Dropdown)]
    for control in controls:
        before, picture = view.still()[1], view.place.value
        if isinstance(control, FloatSlider):
            assert not control.continuous_update  # drawn once, when the slider is let go
            control.value = control.min + 6 * control.step
        else:
            control.index = (control.index + 1) % len(control.options)
        figure, sentence = view.still()
        assert sentence != before
        assert view.place.value != picture
        assert f'alt="{escape(sentence, quote=True)}"' in view.place.value
        assert view.status.value == status(sentence)
        assert control.description
        texts = [t for t in figure.findobj(Text) if t.get_text()]
        assert min(t.get_fontsize() for t in texts) >= 8
    assert len(controls) == {DistanceMap: 1}.get(make, 3)
    assert set(view._repr_mimebundle_()) >= {"image/png", "text/plain"}


@pytest.mark.parametrize("make", [TiesExplorer, ClipExplorer, DarExplorer, DistanceMap])
def test_a_redraw_is_at_most_20_kb_and_one_drawing(make, by_hand, monkeypatch):
    view, drawn = make(by_hand) if make is DistanceMap else make(), []
    assert len(view.place.value.encode()) + len(view.status.value.encode()) <= 20_000
    monkeypatch.setattr(views, "page_webp", lambda figure: drawn.append(figure) or b"")
    for n, control in enumerate(
        [c for c in view.children if hasattr(c, "index") or hasattr(c, "step")], 1
    ):
        if hasattr(control, "step"):
            low = control.value == control.min
            control.value += control.step if low else -control.step
        else:
            control.index = (control.index + 1) % len(control.options)
        assert len(drawn) == n


def test_the_frame_of_ties_is_that_of_its_experts():
    """Only what a slider changes is drawn anew; another number of experts is another frame."""
    view = TiesExplorer()
    view.density.value = 1.0
    kept = view.still()[0].axes[1]
    assert sum(p.get_height() != 0 for p in kept.patches) == 24
    view.experts.value = 3
    raw, kept, *_ = view.still()[0].axes
    assert len(raw.patches) == len(kept.patches) == 36
    for density in (0.25, 0.5):
        view.density.value = density
        assert len(view.still()[0].axes[1].patches) == 36  # none of before is left
        assert f"density {density:.2f}" in view.still()[0].axes[1].get_title(loc="left")
