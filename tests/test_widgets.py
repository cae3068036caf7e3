"""Widgets used as a user does: what the text, the controls and the pictures' data then say."""

from __future__ import annotations

import base64
import html
import re
import types

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from test_env import Scores
from test_walk import agent_for

from rmm_lab.course import views, widgets
from rmm_lab.course.episode_walk import Walk
from rmm_lab.course.run_record import Run
from rmm_lab.course.views import View
from rmm_lab.course.widgets import (
    ButtonTest,
    MapStepper,
    PathInspector,
    ResultsTable,
    TrainingReplay,
)
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.figures import paths as plots
from rmm_lab.reward import Step, parse_path, path_text

SOURCES = ("m0", "m1", "op0", "op1")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _fast(request, monkeypatch):
    """Skip the PNG, which takes most of a view's time, but where a test asks for it."""
    if "real_png" not in request.fixturenames:
        monkeypatch.setattr(views, "page_webp", lambda figure: b"")


@pytest.fixture
def real_png():
    """Asks for real pictures."""


def words(place: ipywidgets.HTML) -> str:
    """The text of an HTML place, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", place.value)).strip()


def alt(place: ipywidgets.HTML) -> str:
    """The alt sentence of the picture in a place."""
    return html.unescape(re.search(r'<img alt="([^"]*)"', place.value)[1])


def controls(view: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    out = [view]
    for child in getattr(view, "children", ()):
        out += controls(child)
    return out


def row(number, update, reward, path, phase="agent", penalised=0):
    return {
        "episode": number,
        "phase": phase,
        "update": update,
        "raw_reward": reward,
        "penalised": penalised,
        "path": path,
    }


def a_problem(n_layers=3, stacks=(range(3),), blocks=(), unit="block") -> types.SimpleNamespace:
    """What a run needs of a problem; a path's scores: a quarter per step, and per step of m1."""

    def score(path, subset):
        assert subset is None
        return [len(path) / 4, sum(step.source == "m1" for step in path) / 4]

    scorer = Scores(score=score, chooses_stem=True)
    return types.SimpleNamespace(
        pool=types.SimpleNamespace(
            sources=SOURCES, members=SOURCES[:2], n_layers=n_layers, stacks=stacks, blocks=blocks
        ),
        spec=types.SimpleNamespace(stem="agent", unit=unit),
        tasks=[types.SimpleNamespace(name=name) for name in scorer.task_names],
        scorer=lambda: scorer,
    )


def a_run() -> Run:
    """A search of six episodes in two updates, made by hand: three layers, and a stem to choose."""
    policies = torch.full((2, 4, 6), 0.1)
    policies[0, :, 2] = 0.5  # op0 everywhere
    policies[1, :, 1] = 0.5  # m1 everywhere
    policies[0, 3] = NAN  # no step at layer 2
    episodes = [
        row(0, 0, 0.25, "m0@-1 m0@0 m0@1 m0@2"),
        row(1, 0, -0.1, "op0@-1", penalised=1),
        row(2, 0, 0.5, "op1@0 op1@0 op1@2"),
        row(3, 1, 0.75, "m1@0 m1@1 m1@2"),
        row(4, 1, 0.75, "m1@0 m1@1 m1@2"),
        row(5, 1, 0.5, ""),
    ]
    finalists = [
        {"path": "m1@0 m1@1 m1@2", "found": "best", "reward": 0.75},
        {"path": "m1@0 op0@1 m1@2", "found": "greedy", "reward": 0.625},
        {"path": "op1@0 op1@0 op1@2", "found": "best", "reward": 0.5},
    ]
    updates = [{"update": 0, "episodes": 3}, {"update": 1, "episodes": 6}]
    return Run(a_problem(), episodes, updates, finalists, policies)


ROWS = [
    {"method": "base", "setting": "as it is", "scores": {"a": 0.25, "b": 0.5}},
    {
        "method": "R<M>M",
        "setting": "9 episodes",
        "scores": {"a": 0.875, "b": 0.625},
        "path": "op0@-1 m0@0 m1@2",
    },
]


def stepper(**options) -> MapStepper:
    scorer = Scores(score=lambda path, subset: [0.2, 0.8], **options)
    return MapStepper(Walk(scorer, agent=agent_for(MergingEnv(scorer), preferred=2, value=0.5)))


VIEWS = {
    "button": ButtonTest,
    "stepper": stepper,
    "paths": lambda: PathInspector(a_run()),
    "replay": lambda: TrainingReplay(a_run()),
    "replay of blocks": lambda: TrainingReplay(a_default_run()),
    "paths of sublayers": lambda: PathInspector(a_default_run()),
    "table": lambda: ResultsTable(ROWS),
}


@pytest.mark.usefixtures("real_png")
@pytest.mark.parametrize("name", VIEWS)
def test_every_view_has_a_picture_without_a_kernel_and_names_its_controls(name):
    view = VIEWS[name]()
    assert isinstance(view, View)
    bundle = view._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG\r\n")
    assert bundle["text/plain"] == view.still()[1]
    assert len(bundle["text/plain"].split()) > 4
    assert "application/vnd.jupyter.widget-view+json" in bundle
    found = controls(view)
    assert not any(isinstance(c, ipywidgets.Output) for c in found)
    for control in found:
        if not isinstance(control, (ipywidgets.Box, ipywidgets.HTML)):
            assert control.description, control


@pytest.mark.parametrize("name", VIEWS)
def test_all_text_of_every_picture_can_be_read(name):
    figure, _ = VIEWS[name]().still()
    texts = [t for t in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text()]
    assert texts
    assert min(t.get_fontsize() for t in texts) >= 8


@pytest.mark.usefixtures("real_png")
@pytest.mark.parametrize("name", VIEWS)
def test_a_redraw_is_at_most_20_kb(name):
    view = VIEWS[name]()
    view.refresh()
    assert len(view.place.value.encode()) + len(view.status.value.encode()) <= 20_000


# What a user does once -> how often the widget is drawn.
ONCE = {
    "a button": (stepper, lambda v: v.buttons["m0"].click()),
    "a path's name": (
        lambda: PathInspector(a_run()),
        lambda v: setattr(v.second, "value", "greedy"),
    ),
    "two paths": (lambda: PathInspector(a_run()), lambda v: v.select(2, 3)),
    "a slider": (lambda: TrainingReplay(a_run()), lambda v: setattr(v.slider, "value", 3)),
    "an episode": (lambda: TrainingReplay(a_run()), lambda v: v.go(2)),
    "a method": (lambda: ResultsTable(ROWS), lambda v: v.choose("R<M>M")),
}


@pytest.mark.parametrize("what", ONCE)
def test_one_change_is_one_drawing(what, monkeypatch):
    make, act = ONCE[what]
    view, drawn = make(), []
    monkeypatch.setattr(views, "page_webp", lambda figure: drawn.append(figure) or b"")
    act(view)
    assert len(drawn) == 1


def test_nothing_is_drawn_while_a_control_moves():
    for view in (TrainingReplay(a_run()), PathInspector(a_run())):
        moving = [c for c in controls(view) if hasattr(c, "continuous_update")]
        assert moving
        assert not any(c.continuous_update for c in moving)


def test_the_button_counts():
    view = ButtonTest()
    assert words(view.status) == "not pressed yet"
    view.button.click()
    assert words(view.status) == "widgets work: pressed 1 time"
    view.button.click()
    assert words(view.status) == "widgets work: pressed 2 times"
    assert 'role="status"' in view.status.value
    assert "pressed 2 times" in view.still()[1]


# ------------------------------------------------------------------------------------- MapStepper


def test_a_walk_by_buttons():
    view = stepper()
    assert list(view.buttons) == ["m0", "m1", "op0", "op1", "skip", "back"]
    assert view.buttons["back"].disabled
    assert view.undo_button.disabled
    assert view.buttons["m1"].tooltip == "append layer 0 of m1; go to layer 1"
    seen = {alt(view.place)}
    for name in ("m1", "back", "op0", "skip"):
        view.buttons[name].click()
        assert words(view.status) == view.walk.sentence()
        seen.add(alt(view.place))
    assert len(seen) == 5
    assert not view.buttons["back"].disabled
    assert "m1@0 op0@0" in alt(view.place)
    view.press("m0")
    assert words(view.status).endswith("0.500 (t0 20.0 %, t1 80.0 %, mean 50.0 %)")
    assert all(b.disabled for b in [*view.buttons.values(), view.agent_button])
    view.undo_button.click()
    assert words(view.status).startswith("layer 1: skipped")
    assert not view.buttons["m0"].disabled
    view.reset_button.click()
    assert words(view.status).startswith("nothing chosen yet")
    assert view.undo_button.disabled


def test_the_agents_button_does_its_most_probable_action():
    view = stepper()
    assert "most probable action is op0 (0.83)" in alt(view.place)  # e^3 / (e^3 + 4)
    assert "value is +0.50" in alt(view.place)
    for _ in range(3):
        view.agent_button.click()
    assert path_text(view.walk.env.path) == "op0@0 op0@1 op0@2"
    assert "most probable" not in alt(view.place)


def test_without_an_agent_there_is_no_button_for_it():
    view = MapStepper(Walk(Scores()))
    assert view.agent_button not in controls(view)
    assert "agent" not in alt(view.place)
    view = stepper()
    assert view.agent_button in controls(view)


def test_an_unmasked_walk_may_be_penalised():
    view = MapStepper(Walk(Scores(), masked=False))
    assert not view.buttons["back"].disabled
    view.buttons["back"].click()
    assert "a penalty of -0.1" in words(view.status)
    view.undo_button.click()
    assert not view.buttons["m0"].disabled


def test_an_error_is_told_and_raised():
    def fail(path, subset):
        raise ZeroDivisionError("no\nexamples")

    view = MapStepper(Walk(Scores(layers=2, score=fail)))
    view.press("m0")
    before = alt(view.place)
    with pytest.raises(ZeroDivisionError):
        view.press("m1")
    assert words(view.status) == "error: no examples"
    assert alt(view.place) == before
    view.status.value = ""
    view.buttons["m1"].click()  # ipywidgets logs what a button's callback raises
    assert words(view.status) == "error: no examples"
    view.undo_button.click()
    assert words(view.status).startswith("nothing chosen yet")


def test_the_picture_of_a_walk_holds_its_map_and_probabilities():
    view = stepper(chooses_stem=True, layers=4, stacks=(range(2), range(2, 4)))
    for name in ("m0", "op1", "back", "op1", "m1"):
        view.press(name)
    (left, right) = view.still()[0].axes
    shown = {(t.get_position(), t.get_text()) for t in left.texts if t.get_text().isdigit()}
    counts = view.walk.env.merging_map
    expected = {((x, a), f"{n:.0f}") for (a, x), n in np.ndenumerate(counts) if n}
    assert shown == expected
    assert counts.sum() == 4
    names = [t.get_text() for t in left.get_xticklabels()]
    assert names == ["stem", "enc 0", "enc 1", "dec 0", "dec 1"]
    weights = [t.get_fontweight() for t in left.get_xticklabels()]
    assert weights.index("bold") == view.walk.env.layer + 1  # the cursor, not by colour alone
    assert weights.count("bold") == 1
    assert [t.get_text() for t in left.get_yticklabels()] == [*SOURCES, "skip", "back"]
    widths = [bar.get_width() for bar in right.patches]
    assert widths == pytest.approx(view.walk.policy()[0])
    notes = [t.get_text() for t in right.texts]
    assert notes == [
        f"{p:.2f}" + ("" if ok else " illegal")
        for p, ok in zip(widths, view.walk.legal, strict=True)
    ]


def test_the_picture_at_the_end_holds_the_scores():
    view = stepper()
    for _ in range(3):
        view.press("m1")
    right = view.still()[0].axes[1]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([20, 80, 50])
    assert [t.get_text() for t in right.texts] == ["20.0", "80.0", "50.0"]
    assert [t.get_text() for t in right.get_yticklabels()] == ["t0", "t1", "mean"]
    assert all(bar.get_hatch() for bar in right.patches)


# ---------------------------------------------------------------------------------- PathInspector


def test_one_path_and_its_scores():
    view = PathInspector(a_run())
    assert [label for label, _ in view.first.options] == [
        "best (75.0 %)",
        "greedy (62.5 %)",
        "finalist 2 (62.5 %)",
        "finalist 3 (50.0 %)",
        "episode",
    ]
    assert view.second.value == "none"
    assert words(view.status) == "first: best: t0 75.0 %, t1 75.0 %, mean 75.0 %"
    assert view.first_episode.disabled
    assert "layer 0 of m1" in alt(view.place)


def test_two_paths_compared_in_words_and_bars():
    view = PathInspector(a_run())
    before = alt(view.place)
    view.second.value = "greedy"
    lines = view.sentences()
    assert lines[1:] == [
        "second: greedy: t0 75.0 %, t1 50.0 %, mean 62.5 %",
        "layer 1: m1 in the first, op0 in the second",
    ]
    for line in lines:
        assert line in words(view.status)
    assert alt(view.place) != before
    axes = view.still()[0].axes[-1]
    assert [b.get_width() for b in axes.patches] == pytest.approx([75, 75, 75, 75, 50, 62.5])
    assert len({b.get_hatch() for b in axes.patches}) == 2
    labels = [t.get_text() for t in axes.texts]
    assert labels == [
        *("first 75.0", "first 75.0", "first 75.0", "second 75.0", "second 50.0", "second 62.5")
    ]
    titles = [a.get_title(loc="left") for a in view.still()[0].axes]
    assert titles == ["first: best", "second: greedy", ""]


def test_episodes_by_number_and_a_penalised_one():
    view = PathInspector(a_run())
    view.first.value = "episode"
    assert not view.first_episode.disabled
    view.first_episode.value = 2
    assert "layer 0 of op1, layer 0 of op1, layer 2 of op1" in alt(view.place)
    view.first_episode.value = 1
    assert "first: episode 1: ended with the penalty, so there is no model" in words(view.status)
    view.select("best", 3)
    assert view.sentences()[-1] == "both are the same path"
    view.select(5)
    assert view.chosen() == [("first: episode 5", 5)]
    assert words(view.status) == "first: episode 5: t0 0.0 %, t1 0.0 %, mean 0.0 %"


@pytest.mark.parametrize("bad", ["worst", 6, -1])
def test_a_path_that_is_not_there_is_refused(bad):
    view = PathInspector(a_run())
    with pytest.raises(InputError):
        view.select("best", bad)
    assert view.second.value == "none"


def test_a_failing_score_is_told_and_raised():
    run = a_run()
    view = PathInspector(run)

    def fail(path, subset):
        raise RuntimeError("out of memory")

    run.problem.scorer().score = fail
    with pytest.raises(RuntimeError):
        view.second.value = "greedy"
    assert words(view.status) == "error: out of memory"


# --------------------------------------------------------------------------------- TrainingReplay


def test_sliding_through_a_search():
    view = TrainingReplay(a_run())
    assert (view.slider.min, view.slider.max, view.play.max) == (0, 5, 5)
    assert view.play.step == 3  # episodes per update
    for part in ("episode 0, policy after 0 updates", "0.250", "path: m0@-1 m0@0 m0@1 m0@2"):
        assert part in words(view.status)
    assert "stem op0, layer 0 op0, layer 1 op0, layer 2 never visited" in alt(view.place)
    view.slider.value = 1
    assert "the penalty; mean of the last 2 episodes 0.075" in words(view.status)
    view.slider.value = 3
    # (0.25 - 0.1 + 0.5 + 0.75) / 4
    for part in ("episode 3, policy after 1 updates", "reward of 0.750", "last 4 episodes 0.350"):
        assert part in words(view.status)
    assert "layer 2 m1." in alt(view.place)
    view.go(5)
    assert words(view.status).endswith("path: no layer")
    with pytest.raises(InputError, match="episode: expected 0 to 5"):
        view.go(6)


def test_a_frame_shows_the_episode_its_policy_and_its_map():
    view = TrainingReplay(a_run())
    view.go(2)
    figure, _ = view.still()
    top, left, right = figure.axes
    marker = next(line for line in top.lines if line.get_marker() == "D")
    assert [list(marker.get_xdata()), list(marker.get_ydata())] == [[2], [50]]
    assert [t.get_text() for t in left.texts].count("0.5") == 3
    assert all(t.get_position()[1] == 2 for t in left.texts if t.get_text() == "0.5")
    assert [t.get_position()[0] for t in left.texts if t.get_text() == "0.5"] == [0, 1, 2]
    (never,) = left.patches
    assert never.get_hatch()
    assert (never.get_x(), never.get_width()) == (2.5, 1)
    counts = [(t.get_position(), t.get_text()) for t in right.texts if t.get_text().isdigit()]
    assert counts == [((1, 3), "2"), ((3, 3), "1")]


def test_frames_have_one_layout():
    view = TrainingReplay(a_run())
    first = view.arranged(view.still()[0])
    view.slider.value = 5
    last = view.arranged(view.still()[0])
    assert not last.get_constrained_layout()  # the layout is the first frame's
    for a, b in zip(first.axes, last.axes, strict=True):
        assert a.get_position().bounds == b.get_position().bounds
    assert first.axes[1].get_position().x1 < first.axes[2].get_position().x0


def a_default_run(stacks=(range(6),)) -> Run:
    """A search over three blocks of two parts: the four uniform paths, one of a policy, two of scales."""
    policies = torch.full((1, 4, 6), 0.1)
    policies[0, :, 3] = 0.5  # op1 everywhere
    uniform = [path_text(tuple(Step(s, k) for k in range(-1, 6))) for s in SOURCES]
    rows = [row(i, 0, 0.25, path, "uniform") for i, path in enumerate(uniform)]
    rows += [row(4, 0, 0.5, "op1@-1 op1@0 op1@1 m1@2 m1@3 op1@4 op1@5")]
    scaled = [f"task_arithmetic:scale={0.3 + k / 10:g}/-0.05@{k}" for k in range(-1, 5)]
    rows += [row(5, 1, 0.75, " ".join([*scaled, "op0@5"]), "scales")]
    finalists = [{"path": rows[4]["path"], "found": "best", "reward": 0.75}]
    problem = a_problem(6, stacks, (range(2), range(2, 4), range(4, 6)), "both")
    return Run(problem, rows, [{"update": 0, "episodes": 5}], finalists, policies)


def test_a_replay_says_what_proposed_each_episode():
    view = TrainingReplay(a_default_run())
    assert view.play.step == 1  # one episode an update, after the four that were given
    assert words(view.status).startswith("episode 0, uniform phase: a reward of 0.250; ")
    assert alt(view.place).endswith("No policy acted.")
    _, left, right = view.still()[0].axes
    assert left.get_title() == "uniform phase: no policy"
    assert len(left.patches) == 4  # each place hatched
    view.go(4)
    assert words(view.status).startswith("episode 4, policy after 0 updates: a reward of 0.500; ")
    assert "stem op1, block 0 op1, block 1 op1, block 2 op1" in alt(view.place)
    _, left, right = view.still()[0].axes
    assert left.get_title() == "the policy that acted: mean probability"
    assert (left.get_xlabel(), right.get_xlabel()) == ("block", "sublayer")
    assert [t.get_text() for t in right.get_xticklabels()] == ["stem", *"012345"]
    counts = [t.get_position() for t in right.texts if t.get_text() == "1"]
    assert sorted(counts) == [(0, 3), (1, 3), (2, 3), (3, 1), (4, 1), (5, 3), (6, 3)]
    view.go(5)
    assert words(view.status).startswith("episode 5, scales phase: a reward of 0.750; ")
    _, left, right = view.still()[0].axes
    assert left.get_title() == "scales phase: the agent's last policy"
    assert [t.get_text() for t in left.texts].count("0.5") == 4
    shown = {t.get_position(): t.get_text() for t in right.texts}
    assert {at: text for at, text in shown.items() if at[1] < 2} == {
        **{(x, 0): f"0.{2 + x}0" for x in range(6)},  # 0.2, 0.3, ... of the first expert
        **{(x, 1): "−0.05" for x in range(6)},
    }
    assert shown[6, 2] == "1"


def test_scales_are_shown_at_the_members_of_the_problem():
    run = a_default_run()
    run.problem.pool.members = (SOURCES[0], SOURCES[2])
    replay, inspector = TrainingReplay(run), PathInspector(run)
    replay.go(5)
    inspector.select("best", 5)
    right = replay.still()[0].axes[2]
    assert {t.get_position()[1] for t in right.texts if t.get_text() == "−0.05"} == {2}
    second = inspector.still()[0].axes
    at = [
        axes.get_yticklabels()[int(t.get_position()[1])].get_text()
        for axes in second
        for t in axes.texts
        if t.get_text() == "−0.05"
    ]
    assert set(at) == {SOURCES[2]}


def test_a_replay_of_an_agent_of_scales_shows_no_list():
    run = a_default_run()
    run.policies = torch.full((1, 4, 2), 0.5)  # the mean scales of two members
    run.episodes[4] = run.episodes[5] | {"episode": 4, "phase": "agent", "update": 0}
    view = TrainingReplay(run)
    view.go(4)
    assert view.still()[0].axes[1].get_title() == "agent phase: it set scales"
    assert alt(view.place).endswith("The agent set scales.")


def test_a_replay_of_two_stacks_names_blocks_and_their_parts():
    run = a_default_run(stacks=(range(2), range(2, 6)))
    figure, _ = TrainingReplay(run).still()
    _, left, right = figure.axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["stem", "enc 0", "dec 0", "dec 1"]
    parts = ["stem", "enc 0", "enc 1", "dec 0", "dec 1", "dec 2", "dec 3"]
    assert [t.get_text() for t in right.get_xticklabels()] == parts
    borders = [line.get_xdata()[0] for axes in (left, right) for line in axes.lines]
    assert borders == [1.5, 2.5]


def test_a_replay_without_an_agent():
    run = a_default_run()
    run.policies, run.updates = torch.zeros(0, 0, 0), []
    run.episodes = [*run.episodes[:4], run.episodes[5] | {"episode": 4}]
    view = TrainingReplay(run)
    view.go(4)
    assert words(view.status).startswith("episode 4, scales phase: ")
    assert alt(view.place).endswith("No policy acted.")
    assert view.still()[0].axes[1].get_title() == "scales phase: no policy"


def test_the_inspector_says_what_layers_are_and_what_proposed_a_path():
    view = PathInspector(a_default_run())
    view.select("best", 3)
    assert [label for label, _ in view.chosen()] == [
        "first: best",
        "second: episode 3, uniform phase",
    ]
    lines = view.sentences()
    assert lines[2:] == [
        "layer 2: m1 in the first, op1 in the second",
        "layer 3: m1 in the first, op1 in the second",
        widgets.PARTS,
    ]
    view.select(5, 4)
    first, second = (label for label, _ in view.chosen())
    assert (first, second) == ("first: episode 5, scales phase", "second: episode 4")
    assert view.sentences()[2].startswith("stem: task_arithmetic:scale=0.2/-0.05 in the first")
    assert widgets.PARTS not in PathInspector(a_run()).sentences()


# ----------------------------------------------------------------------------------- ResultsTable


def test_the_table_names_its_parts_and_marks_the_selected_row_in_words():
    view = ResultsTable(ROWS, caption="Accuracy, %")
    assert "<caption>Accuracy, %</caption>" in view.status.value
    assert view.status.value.count('scope="col"') == 5  # method, a, b, mean, setting
    assert view.status.value.count('scope="row"') == 2
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", view.status.value)
    assert cells == ["25.0", "50.0", "37.5", "as it is", "87.5", "62.5", "75.0", "9 episodes"]
    assert view.status.value.index("base (selected)") < view.status.value.index("R&lt;M&gt;M")
    assert view.place.value == ""  # base has no path
    view.select.value = 1
    assert "R&lt;M&gt;M (selected)" in view.status.value
    assert "base (selected)" not in view.status.value
    assert "Its path: stem of op0, layer 0 of m0, layer 2 of m1" in alt(view.place)
    view.choose("base")
    assert view.place.value == ""
    assert view.still()[1] == "base (as it is): a 25.0 %, b 50.0 %, mean 37.5 %."
    with pytest.raises(InputError, match="one of base, R<M>M"):
        view.choose("RMM")


def test_the_table_takes_a_data_frame():
    view = ResultsTable(pd.DataFrame(ROWS))  # NaN where a row has no path
    assert (view.status.value, view.sources) == (
        ResultsTable(ROWS).status.value,
        ["op0", "m0", "m1"],
    )
    assert view.place.value == ""
    view.choose("R<M>M")
    assert "stem of op0" in alt(view.place)


def test_a_table_without_any_path_has_no_picture_of_one():
    rows = [{"method": m, "setting": "s", "scores": {"a": 0.25, "b": 0.5}} for m in ("one", "two")]
    view = ResultsTable(rows)
    assert view.paths == [None, None]
    assert view.place.value == ""
    assert "two" in view.status.value


def test_sources_and_layers_of_the_problem_can_be_given():
    view = ResultsTable(ROWS, sources=SOURCES, n_layers=4, stacks=(range(3), range(3, 4)))
    view.choose("R<M>M")
    figure, sentence = view.still()
    assert "stem of op0, enc 0 of m0, enc 2 of m1" in sentence
    top = figure.axes[0]
    assert [t.get_text() for t in top.get_yticklabels()] == list(SOURCES)
    places = ["stem", "enc 0", "enc 1", "enc 2", "dec 0"]
    assert [t.get_text() for t in top.get_xticklabels()] == places


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="rows: expected at least one method"):
        ResultsTable([])


# --------------------------------------------------------------------------------------- pictures


def test_place_names():
    stacks = (range(2), range(2, 4))
    assert [plots.place_name(k, stacks) for k in range(-1, 4)] == [
        "stem", "enc 0", "enc 1", "dec 0", "dec 1",
    ]  # fmt: skip
    assert [plots.place_name(k, (range(4),)) for k in (-1, 0, 3)] == ["stem", "layer 0", "layer 3"]


def texts_of(axes) -> dict[tuple[float, float], str]:
    """What stands in a map: (place, row) -> text."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def labels_of(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


FITTED = ("least_squares:fit=whole", "least_squares:fit=whole,weights=3/1")


def test_scales_stand_in_the_rows_of_their_members():
    sources = ("digits", "textures", "weight_average", "ties", *FITTED)
    members = ("digits", "textures", *FITTED)
    path = (
        Step("task_arithmetic", -1, (0.25, -0.5, 1.0, 0.125)),
        Step("task_arithmetic", 0, (0.0, 1.5, -0.01, 0.3)),
        Step("ties", 1),
    )
    figure = plots.path_picture(path, sources, 3, members=members)
    top, bar = figure.axes  # no boxes: the map shows all
    names = ["digits", "textures", "TIES", "least squares", "least squares 3:1"]
    assert labels_of(top) == names  # nothing took the average
    assert [t.get_text() for t in top.get_xticklabels()] == ["stem", "0", "1", "2"]
    assert texts_of(top) == {
        **{(0, 0): "0.25", (0, 1): "−0.50", (0, 3): "1", (0, 4): "0.12"},
        **{(1, 1): "1.50", (1, 3): "−0.01", (1, 4): "0.30"},
        **{(2, 2): "1", (3, 2): "skipped"},
    }
    bold = {t.get_text() for t in top.texts if t.get_fontweight() == "bold"}
    assert bold == {"−0.50", "−0.01"}  # the pale one too
    shown = np.asarray(top.images[0].get_array())
    np.testing.assert_allclose(shown[:, 0], [0.25, -0.5, 0, 1, 0.125])
    assert bar.get_ylim() == (-0.5, 1.5)


def test_by_default_scales_are_of_the_first_sources():
    path = tuple(Step("task_arithmetic", k, (0.5, 0.25)) for k in range(-1, 2))
    figure = plots.path_picture(path, ("a", "b", "ties", *FITTED), 2)
    assert labels_of(figure.axes[0]) == ["a", "b"]
    assert texts_of(figure.axes[0]) == {
        (x, y): ("0.50", "0.25")[y] for x in range(3) for y in (0, 1)
    }


def test_a_map_has_a_row_for_whatever_its_path_takes():
    figure = plots.path_picture((Step("ties:density=0.3", 0),), ("a", "b", "ties"), 1)
    assert labels_of(figure.axes[0]) == ["a", "b", "TIES", "base", "TIES (density=0.3)"]
    assert texts_of(figure.axes[0]) == {(0, 3): "1", (1, 4): "1"}  # the stem is the base's


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("m0@0 m1@1 m0@2", 0),
        ("m0@0 m1@2", 0),  # the column of layer 1 says that it is skipped
        ("m0@0 m1@1 m0@1", 4),
        ("m0@1 m1@0 m0@2", 4),
        ("", 0),
    ],
)
def test_boxes_say_what_a_map_cannot(text, boxes):
    figure = plots.path_picture(parse_path(text), SOURCES, 3)
    drawn = [axes for axes in figure.axes if axes.get_title() == "the same in running order"]
    assert sum(len(axes.texts) for axes in drawn) == boxes
    skipped = {x - 1 for (x, _), t in texts_of(figure.axes[0]).items() if t == "skipped"}
    assert skipped == set(range(3)) - {step.layer for step in parse_path(text)}


def test_a_source_has_one_colour_in_every_picture():
    demo = ("digits", "textures", "weight_average", "weighted_average:expert=1,share=0.75", "ties")
    for sources in (
        demo,
        ("digits", "letters", "textures", "ties"),
        ("digits", "textures", "dare", "ties"),
    ):
        looks = {source: plots.look_of(source, sources) for source in sources}
        assert len(set(looks.values())) == len(sources)
        for source in {"digits", "textures", "ties"}:
            assert looks[source] == plots.look_of(source, demo)
    crowd = [f"expert{i}" for i in range(9)]  # more than there are colours
    assert len({plots.look_of(name, crowd) for name in crowd}) == 7
    assert plots.look_of("other", demo) == ("0.4", "")


def test_short_names():
    sources = {
        "digits": "digits",
        "my_birds": "my_birds",  # an expert's name is the user's
        "weight_average": "average",
        "weighted_average:expert=1,share=0.75": "75 % digits",
        "weighted_average:expert=2,share=0.5": "50 % my_birds",
        "task_arithmetic:scale=0.75": "task arithmetic × 0.75",
        "ties": "TIES",
        "iso_cts": "Iso-CTS",
        FITTED[0]: "least squares",
        FITTED[1]: "least squares 3:1",
        "dare:drop_rate=0.5": "DARE (drop_rate=0.5)",  # two of one name keep their options
        "dare:drop_rate=0.9": "DARE (drop_rate=0.9)",
    }
    assert plots.short_names(list(sources)) == list(sources.values())


def test_a_picture_of_a_path_can_be_read_where_it_is_shown():
    """9 pt at least, in a picture that a screen of 1366 pixels shows at full size."""
    members = ("digits", "textures", *FITTED)
    scales = tuple(Step("task_arithmetic", k, (0.5, -1.25, 0.1, 0.2)) for k in range(-1, 12))
    for path in (scales, (*scales, Step("ties", 3))):
        figure = plots.path_picture(path, (*members[:2], "ties", *FITTED), 12, members=members)
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in texts) >= 9
        assert figure.get_figwidth() * 100 <= 1366
        cell = figure.axes[0].get_window_extent().width / 13
        written = [t.get_window_extent().width for t in figure.axes[0].texts]
        assert max(written) < cell


def test_a_long_path_goes_on_in_a_second_row():
    path = tuple(Step("m0", k) for k in (*range(12), 11))
    figure = plots.path_picture(path, SOURCES, 12)
    assert texts_of(figure.axes[0])[12, 0] == "2"  # layer 11, behind the stem and 0 to 10
    heights = [t.get_position()[1] for t in figure.axes[1].texts]
    assert heights == [1.5] * 8 + [0.5] * 6
    assert figure.get_figwidth() <= 11


@pytest.mark.parametrize(
    ("n", "said"), [(0, []), (2, ["d0", "d1"]), (5, ["d0", "d1", "and 3 more: compare the maps"])]
)
def test_two_differences_are_told_in_words(n, said):
    assert widgets.PathInspector.in_short([f"d{i}" for i in range(n)]) == said
