"""The explorer of fronts: which point a preference shows, what it says, and what it exports."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from ipywidgets import Button, FloatSlider

from rmm_lab.course import views
from rmm_lab.course.pareto import ParetoExplorer
from rmm_lab.errors import InputError
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step
from rmm_lab.search.front import Front, Point
from rmm_lab.search.preferences import Ends


@pytest.fixture(autouse=True)
def only_text(monkeypatch):
    monkeypatch.setattr(views, "img", lambda figure, alt, **_: alt)


def front_of(problem, scores, tasks=("x", "y"), counts=None, test=None):
    """Point i takes the i-th source everywhere; scores are normalised already."""
    points = []
    for i, own in enumerate(scores):
        steps = tuple(Step(problem.pool.sources[i], k) for k in range(problem.pool.n_layers))
        path = LayerPath.of(problem.pool, steps, "base")
        seen = tuple(test[i]) if test else None
        points.append(Point(path, tuple(own), None, seen, len(steps), 1.0, 1))
    n = len(tasks)
    expert = np.ones(n) if counts is None else np.array(counts, float)
    ends = {"reward": Ends(np.zeros(n), expert)} | (
        {"test": Ends(np.zeros(n), expert)} if test else {}
    )
    return Front(tuple(tasks), tuple(tasks), ends, tuple(points), 3, 1, 3, 0.5)


TWO = [[0.9, 0.1], [0.6, 0.6], [0.1, 0.9]]
THREE = [[0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.1, 0.1, 0.9]]


def controls(widget, kind):
    found = [widget] if isinstance(widget, kind) else []
    return found + [c for child in getattr(widget, "children", ()) for c in controls(child, kind)]


def test_two_tasks_have_one_slider_between_them(problem):
    view = ParetoExplorer(front_of(problem, TWO))
    [slider] = controls(view, FloatSlider)
    seen = {}
    for value in (0, 0.5, 1):
        slider.value = value
        seen[value] = view.point
    assert seen == {0: 0, 0.5: 1, 1: 2}
    # The last: all for y.
    for words in (
        "x 0%, y 100%",
        "point 2 of 3",
        "reward split: x 10.0 %, y 90.0 %",
        "scale=0.5@0",
    ):
        assert words in view.status.value


def test_where_the_point_changes_by_hand(problem):
    """(1 - w) 0.9 + 0.05 (...) against the balanced point: the regrets cross between 0.2 and 0.35."""
    view = ParetoExplorer(front_of(problem, TWO))
    # At w: point 0 has max(0.1 (1 - w), 0.9 w) + 0.05 (0.1 (1 - w) + 0.9 w), point 1
    # max(0.4 (1 - w), 0.4 w) + 0.05 * 0.4. At 0.3: 0.27 + 0.017 against 0.28 + 0.02; at 0.35: 0.315 + 0.019
    # against 0.26 + 0.02.
    view.prefer([0.7, 0.3])
    assert view.point == 0
    view.prefer([0.65, 0.35])
    assert view.point == 1


def test_three_tasks_have_a_triangle_of_buttons(problem):
    view = ParetoExplorer(front_of(problem, THREE, ("x", "y", "z")))
    assert not controls(view, FloatSlider)
    buttons = [b for b in controls(view, Button) if b is not view.export_button]
    assert len(buttons) == 21
    assert [b.description for b in buttons if b.description != "·"] == ["x", "y", "z"]
    by_name = {b.description: b for b in buttons}
    for name, point in (("x", 0), ("z", 2)):
        by_name[name].click()
        assert view.point == point
        assert by_name[name].button_style == "primary"
        assert sum(b.button_style == "primary" for b in buttons) == 1
        assert f"{name} 100%" in view.status.value
    assert [b.tooltip for b in buttons][1] == "x 80%, y 20%, z 0%"


def test_more_tasks_have_a_slider_each_of_which_ratios_count(problem):
    scores = [[0.9, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.9]]
    view = ParetoExplorer(front_of(problem, scores, "xyzw"))
    sliders = controls(view, FloatSlider)
    assert len(sliders) == 4
    for slider in sliders:
        slider.value = 0  # nothing said: all alike
    np.testing.assert_allclose(view.weights, 0.25)
    sliders[3].value = 0.4
    np.testing.assert_allclose(view.weights, [0, 0, 0, 1])
    assert view.point == 2
    view.prefer([2, 2, 0, 0])
    np.testing.assert_allclose(view.weights, [0.5, 0.5, 0, 0])


def test_a_task_without_a_scale_is_shown_and_not_asked_for(problem):
    scores = [[0.9, 0.3, 0.1], [0.1, 0.3, 0.9]]
    view = ParetoExplorer(front_of(problem, scores, ("x", "dull", "y"), counts=[1, 0, 1]))
    assert len(controls(view, FloatSlider)) == 1
    view.prefer([1, 0])
    assert view.point == 0
    assert "dull 30.0 %" in view.status.value


def test_scores_of_the_test_split_are_shown_where_they_are_known(problem):
    """The point is still chosen by the reward split."""
    view = ParetoExplorer(front_of(problem, TWO, test=[[0.2, 0.2], [0.3, 0.3], [0.4, 0.4]]))
    view.prefer([1, 0])
    assert view.point == 0
    assert "test split: x 20.0 %, y 20.0 %" in view.status.value


def test_the_model_that_is_shown_is_exported(problem, tmp_path, monkeypatch):
    front = front_of(problem, TWO)
    monkeypatch.setattr("rmm_lab.search.problem.pool_of", lambda path: problem.pool)
    view = ParetoExplorer(front, tmp_path)
    view.prefer([0.5, 0.5])
    view.export_button.click()
    assert f"written: {tmp_path / 'point-1'}" in view.status.value
    assert timm.create_model(f"local-dir:{tmp_path / 'point-1'}", pretrained=True) is not None
    card = (tmp_path / "point-1/README.md").read_text("utf-8")
    assert "Point 1 of a front of 3, its knee, chosen for the preference x 50%, y 50%." in card
    assert LayerPath.from_json((tmp_path / "point-1/path.json").read_text("utf-8")) == (
        front.points[1].path
    )
    view.export_button.click()  # a model is never overwritten
    assert "expected a new folder" in view.status.value


def test_a_task_without_a_scale_has_no_share_of_the_preference(problem, tmp_path, monkeypatch):
    scores = [[0.9, 0.3, 0.1], [0.1, 0.3, 0.9]]
    front = front_of(problem, scores, ("x", "dull", "y"), counts=[1, 0, 1])
    monkeypatch.setattr("rmm_lab.search.problem.pool_of", lambda path: problem.pool)
    view = ParetoExplorer(front, tmp_path)
    view.prefer([0.25, 0.75])
    card = (view.export() / "README.md").read_text("utf-8")
    assert "chosen for the preference x 25%, dull 0%, y 75%." in card


def test_a_front_of_one_point(problem):
    view = ParetoExplorer(front_of(problem, TWO[:1]))
    view.prefer([0, 1])
    assert view.point == 0
    figure, sentence = view.still()
    assert "point 0 of 1" in sentence
    assert len(figure.axes) == 2


def test_what_is_no_front_is_refused(problem):
    for scores, counts in (([], None), (TWO, [1, 0])):
        with pytest.raises(InputError, match="front: expected a point or more and two tasks"):
            ParetoExplorer(front_of(problem, scores, counts=counts))


def test_without_a_kernel_there_is_a_picture_and_the_sentence(problem):
    bundle = ParetoExplorer(front_of(problem, TWO))._repr_mimebundle_()
    assert "image/png" in bundle
    assert "point 1 of 3" in bundle["text/plain"]
