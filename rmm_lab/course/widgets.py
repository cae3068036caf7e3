"""The notebooks' widgets: thin views over ``episode_walk``, ``run_record`` and ``rmm_lab.figures.paths``.

Every control is a plain ipywidgets one and works by keyboard. Each view's picture has an alt sentence,
and a PNG replaces the view where no kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import BoundedIntText, Button, Dropdown, HBox, IntSlider, Layout, Play, jslink
from matplotlib.figure import Figure

from rmm_lab.course.episode_walk import Walk
from rmm_lab.course.explorers import ClipExplorer, DarExplorer, DistanceMap, TiesExplorer  # noqa: F401
from rmm_lab.course.pareto import ParetoExplorer  # noqa: F401
from rmm_lab.course.run_record import Run, difference, source_text
from rmm_lab.course.views import View, status
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.figures import episodes
from rmm_lab.figures import paths as plots
from rmm_lab.reward import Path, parse_path, path_text

WIDE = {"description_width": "initial"}  # else long descriptions are cut
SEEN = 9  # rows of a table in sight
SHOWN = 2  # differences between two paths, in words
TABLE_STYLE = (  # once, since a style of each cell is most of the bytes
    "<style>.rmm-table {max-height: 15em; overflow-y: auto} .rmm-table :is(td, th) {padding: 0 8px; "
    "line-height: 1.4; white-space: nowrap; text-align: right} "
    ".rmm-table :is(th:first-child, td:last-child) {text-align: left}</style>"
)
PARTS = "here a layer is a part of a block: attention comes first, the MLP last"


def percent(scores: Mapping[str, float]) -> str:
    """``digits 80.7 %, textures 69.3 %, mean 75.0 %``."""
    parts = [f"{task} {100 * s:.1f} %" for task, s in scores.items()]
    return ", ".join([*parts, f"mean {100 * np.mean(list(scores.values())):.1f} %"])


def path_words(path: Path, stacks: Sequence[range]) -> str:
    """A path in running order: ``stem of digits, layer 0 of ties``."""
    names = [f"{plots.place_name(step.layer, stacks)} of {source_text(step)}" for step in path]
    return ", ".join(names)


class ButtonTest(View):
    """One button and a count: do widgets work here at all?"""

    def __init__(self) -> None:
        self.count = 0
        self.button = Button(description="press me", tooltip="counts how often it was pressed")
        self.button.on_click(lambda _: self.press())
        super().__init__([self.button], ())

    def sentence(self) -> str:
        """How often it was pressed."""
        times = f"{self.count} time{'' if self.count == 1 else 's'}"
        return f"widgets work: pressed {times}" if self.count else "not pressed yet"

    def press(self) -> None:
        """What the button does."""
        self.count += 1
        self.refresh()

    def refresh(self, change: Any = None) -> None:
        """Say how often it was pressed."""
        self.status.value = status(self.sentence())

    def still(self) -> tuple[Figure, str]:
        """The sentence, also as a picture."""
        figure = Figure(figsize=(4, 0.6), layout="constrained")
        figure.text(0.02, 0.5, f"[ press me ]  {self.sentence()}", va="center", fontsize=10)
        return figure, f"A button, {self.sentence()}."


class MapStepper(View):
    """A walk through the environment: a button per action, undo, start again, the agent's next step."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.buttons = {name: self._button(name, walk.act, name) for name in walk.action_names}
        self.undo_button = self._button("undo", walk.undo)
        self.undo_button.tooltip = "take the last action back"
        self.reset_button = self._button("start again", walk.reset)
        self.reset_button.tooltip = "back to the start, nothing chosen"
        self.agent_button = self._button("agent's next step", walk.agent_step)
        self.agent_button.tooltip = "let the agent do its most probable action"
        control = [self.undo_button, self.reset_button]
        control += [self.agent_button] if walk.agent is not None else []
        wrap = Layout(flex_flow="row wrap")
        self.rows = [HBox(list(self.buttons.values()), layout=wrap), HBox(control, layout=wrap)]
        super().__init__(self.rows, ())

    def _button(self, name: str, what: Callable[..., Any], *arguments: str) -> Button:
        button = Button(description=name, layout=Layout(width="auto"))
        button.on_click(lambda _: self._do(what, *arguments))
        return button

    def press(self, action: int | str) -> None:
        """Do an action by its name or number."""
        self._do(self.walk.act, action)

    def _do(self, what: Callable[..., Any], *arguments: int | str) -> None:
        try:
            what(*arguments)
        except Exception as error:  # a notebook does not show what a callback raises
            self.status.value = status(f"error: {one_sentence(error)}")
            raise
        self.refresh()

    def refresh(self, change: Any = None) -> None:
        """Draw the walk, and enable the buttons that do something."""
        walk, legal = self.walk, self.walk.legal
        for number, (name, button) in enumerate(self.buttons.items()):
            button.disabled = walk.done or (walk.masked and not legal[number])
            button.tooltip = walk.does(name)
        self.undo_button.disabled = not walk.actions
        self.agent_button.disabled = walk.done
        super().refresh()

    def sentence(self) -> str:
        """What happened last, and the scores at the end."""
        scores = self.walk.scores
        return self.walk.sentence() + (f" ({percent(scores)})" if scores else "")

    def still(self) -> tuple[Figure, str]:
        """The map with the cursor; the agent's probabilities, at the end the scores."""
        walk, env, (pi, value) = self.walk, self.walk.env, self.walk.policy()
        words = [f"{step.source} ({walk.place(step.layer)})" for step in walk.env.path]
        figure = episodes.walk_picture(
            env.merging_map, walk.action_names, env.first, walk.stacks, env.layer, words,
            probabilities=pi, value=value, legal=walk.legal, scores=walk.scores,
        )  # fmt: skip
        alt = f"Merging map; {self.sentence()}. Path: {path_text(walk.env.path) or 'no layer yet'}."
        if pi is not None:
            best = int(pi.argmax())
            alt += (
                f" The agent's most probable action is {walk.action_names[best]} ({pi[best]:.2f}); "
                f"its value is {value:+.2f} deviations from the mean return."
            )
        return figure, alt


class PathInspector(View):
    """Paths of a search: how they run, what they score on the whole reward split, where two differ."""

    steady = True

    def __init__(self, run: Run) -> None:
        self.run = run
        options = [(f"{n} ({100 * row['reward']:.1f} %)", n) for n, row in run.named.items()]
        options.append(("episode", "episode"))
        number = {"max": len(run.episodes) - 1, "style": WIDE}
        self.first = Dropdown(options=options, description="first path", style=WIDE)
        self.second = Dropdown(
            options=[("none", "none"), *options], description="second path", style=WIDE
        )
        self.first_episode = BoundedIntText(description="episode of the first", **number)
        self.second_episode = BoundedIntText(description="episode of the second", **number)
        self._pickers = (
            ("first", self.first, self.first_episode),
            ("second", self.second, self.second_episode),
        )
        self._ready = True
        rows = [HBox(picker[1:]) for picker in self._pickers]
        super().__init__(rows, [control for picker in self._pickers for control in picker[1:]])

    def select(self, first: str | int, second: str | int | None = None) -> None:
        """Show one or two paths, each by its name or by an episode's number."""
        self._ready = False  # draw once, not after each control
        try:
            for name, (_, control, number) in zip((first, second), self._pickers, strict=True):
                if name is not None:
                    self.run.path(name)  # refuses an unknown one
                if isinstance(name, int):
                    number.value, name = name, "episode"
                control.value = "none" if name is None else name
        finally:
            self._ready = True
            self.refresh()

    def chosen(self) -> list[tuple[str, str | int]]:
        """What is shown: (label, name or episode's number), one or two."""
        out: list[tuple[str, str | int]] = []
        for which, control, number in self._pickers:
            if control.value == "episode":
                phase = self.run.episode(number.value)["phase"]
                note = "" if phase == "agent" else f", {phase} phase"
                out.append((f"{which}: episode {number.value}{note}", number.value))
            elif control.value != "none":
                out.append((f"{which}: {control.value}", control.value))
        return out

    def refresh(self, change: Any = None) -> None:
        """Draw what is chosen, and say it in a list."""
        if not self._ready:
            return
        for _, control, number in self._pickers:
            number.disabled = control.value != "episode"
        try:
            sentences = self.sentences()
            self.draw()
        except Exception as error:  # a notebook does not show what a callback raises
            self.status.value = status(f"error: {one_sentence(error)}")
            raise
        n = len(self.chosen())
        lines = [*sentences[:n], "; ".join(self.in_short(sentences[n:]))]
        items = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
        self.status.value = f'<ul role="status" aria-live="polite">{items}</ul>'

    @staticmethod
    def in_short(differences: Sequence[str]) -> list[str]:
        """What of them a line or two holds; the picture's alt text has all."""
        if len(differences) <= SHOWN:
            return list(differences)
        return [*differences[:SHOWN], f"and {len(differences) - SHOWN} more: compare the maps"]

    def scores(self, name: str | int) -> dict[str, float] | None:
        """The path's scores on the whole reward split; None where the episode ended with a penalty."""
        if isinstance(name, int) and self.run.episode(name)["penalised"]:
            return None
        return self.run.scores(self.run.path(name))

    def sentences(self) -> list[str]:
        """Scores of the paths, then their difference place by place."""
        pool, chosen, out = self.run.problem.pool, self.chosen(), []
        for label, name in chosen:
            scores = self.scores(name)
            words = percent(scores) if scores else "ended with the penalty, so there is no model"
            out.append(f"{label}: {words}")
        if len(chosen) == 2:
            (_, a), (_, b) = chosen
            differences = difference(self.run.path(a), self.run.path(b), pool.stacks)
            out += differences or ["both are the same path"]
        if pool.blocks:
            out.append(PARTS)
        return out

    def still(self) -> tuple[Figure, str]:
        """The paths, one below the other, and bars of their scores."""
        run, pool, chosen = self.run, self.run.problem.pool, self.chosen()
        paths = [(label, run.with_stem(run.path(name))) for label, name in chosen]
        scores = {label: s for label, name in chosen if (s := self.scores(name))}
        place = (pool.sources, pool.n_layers, pool.stacks)
        more: Any = {"members": pool.members, "caption": "score on the whole reward split"}
        figure = episodes.compare_picture(paths, scores, *place, **more)
        words = [f"{label}: {path_words(path, pool.stacks)}" for label, path in paths]
        return figure, ". ".join(["Layer paths", *words, *self.sentences()]) + "."


class TrainingReplay(View):
    """A search played back: slider over episodes; rewards, the policy that acted, the episode's map."""

    steady = True

    def __init__(self, run: Run) -> None:
        self.run, last = run, len(run.episodes) - 1
        self.rewards = np.array([e["raw_reward"] for e in run.episodes])
        # One frame per update of the agent.
        first = [e["phase"] for e in run.episodes].count("uniform")
        step = run.updates[0]["episodes"] - first if run.updates else 1
        look = {"description": "episode", "layout": Layout(width="60%")}
        self.slider = IntSlider(0, 0, last, continuous_update=False, **look)
        self.play = Play(value=0, min=0, max=last, step=step, interval=700, description="play")
        jslink((self.play, "value"), (self.slider, "value"))
        super().__init__([HBox([self.play, self.slider])], [self.slider])

    def go(self, episode: int) -> None:
        """Show an episode."""
        self.run.episode(episode)
        self.slider.value = episode

    def sentence(self) -> str:
        """Who played this episode, and what it was paid."""
        row = self.run.episode(self.slider.value)
        what = "the penalty" if row["penalised"] else f"a reward of {row['raw_reward']:.3f}"
        recent = self.rewards[max(0, self.slider.value - 49) : self.slider.value + 1]
        agent, who = f"policy after {row['update']} updates", f"{row['phase']} phase"
        return (
            f"episode {row['episode']}, {agent if row['phase'] == 'agent' else who}: {what}; "
            f"mean of the last {len(recent)} episodes {recent.mean():.3f}; path: "
            f"{row['path'] or 'no layer'}"
        )

    def still(self) -> tuple[Figure, str]:
        """The reward curve with a marker, the policy's heat map, the merging map of the episode."""
        run, pool, number = self.run, self.run.problem.pool, self.slider.value
        places = pool.n_layers - run.first
        path = run.path(number)
        counts = plots.merging_map(path, pool.sources, run.first, places, pool.members)
        mean, names, stacks = run.policy(number), run.action_names, run.agent_stacks
        n_places = stacks[-1].stop - run.first
        policy = np.full((n_places, len(names)), np.nan) if mean is None else mean.numpy()
        title, phase = "the policy that acted: mean probability", run.episode(number)["phase"]
        if phase == "agent" and mean is None:
            title = "agent phase: it set scales"
        elif phase != "agent":
            which = "no policy" if mean is None else "the agent's last policy"
            title = f"{phase} phase: {which}"
        figure = episodes.replay_picture(
            self.rewards, number, policy, counts, names, run.first, pool.stacks, stacks, title
        )
        likeliest, kind = [], "layer" if stacks == pool.stacks else "block"
        for k, row in enumerate(policy, run.first):
            best = "never visited" if np.isnan(row).any() else names[row.argmax()]
            likeliest.append(f"{plots.place_name(k, stacks).replace('layer', kind)} {best}")
        words = f"Most probable actions: {', '.join(likeliest)}."
        if mean is None:
            words = "The agent set scales." if phase == "agent" else "No policy acted."
        return figure, f"Search at {self.sentence()}. {words}"


class ResultsTable(View):
    """Methods with their scores; the selected one is marked, and its path drawn if it has one.

    rows: a list of dicts or a DataFrame with ``method``, ``setting``, ``scores`` (task -> metric in [0, 1]),
    and for a layer path ``path`` (text as in a run folder) and ``stem``. ``sources``, ``n_layers``,
    ``stacks``: of the problem; by default what the paths name. ``caption``: what the scores are.
    """

    def __init__(
        self,
        rows: Any,
        *,
        caption: str = "Score on the test split, %",
        sources: Sequence[str] = (),
        n_layers: int | None = None,
        stacks: Sequence[range] = (),
    ) -> None:
        frame = pd.DataFrame(rows, dtype=object)
        if frame.empty:
            raise InputError("rows: expected at least one method, found none; give some")
        columns = ["method", "setting", "scores", "path", "stem"]
        frame = frame.reindex(columns=columns).astype(object)  # or a new column would hold NaN
        self.rows = frame.where(frame.notna(), None).to_dict("records")
        self.caption, self.stacks = caption, tuple(stacks)
        self.paths = [  # with the stem as the first step
            None
            if row["path"] is None
            else plots.with_stem(parse_path(row["path"]), row["stem"] or "base")
            for row in self.rows
        ]
        steps = [step for path in self.paths for step in path or ()]
        named = dict.fromkeys(step.source for step in steps if step.source != "base")
        self.sources = list(sources or named)
        self.n_layers = n_layers or 1 + max((step.layer for step in steps), default=0)
        names = [(row["method"], i) for i, row in enumerate(self.rows)]
        self.select = Dropdown(options=names, description="method", style=WIDE)
        super().__init__([self.select], [self.select])

    def choose(self, method: str) -> None:
        """Select a method by its name."""
        names = [row["method"] for row in self.rows]
        if method not in names:
            raise InputError(f"method: expected one of {', '.join(names)}, found {method!r}")
        self.select.value = names.index(method)

    def refresh(self, change: Any = None) -> None:
        """Write the table, and draw the selected method's path."""
        self.status.value = self.html()
        self.place.value = ""
        if self.paths[self.select.value] is not None:
            self.draw()

    def html(self) -> str:
        """The table, with a caption, scopes, and a word after the selected method."""
        tasks = list(self.rows[0]["scores"])
        names = ["method", *tasks, "mean", "setting"]
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        body = chosen = ""
        for i, row in enumerate(self.rows):
            values = [row["scores"][t] for t in tasks]
            numbers = "".join(f"<td>{100 * v:.1f}</td>" for v in [*values, np.mean(values)])
            word, bold = "", ""
            if i == self.select.value:
                word, bold = " (selected)", ' style="font-weight: bold; outline: 2px solid"'
            short = setting if len(setting := row["setting"]) <= 48 else f"{setting[:47]}…"
            whole = "" if short == setting else f' title="{escape(setting)}"'
            line = (
                f'<tr{bold}><th scope="row">{escape(row["method"])}{word}</th>{numbers}'
                f"<td{whole}>{escape(short)}</td></tr>"
            )
            body, chosen = body + line, line if word else chosen
        again = chosen if len(self.rows) > SEEN else ""  # else it is in sight
        caption = f"<caption>{escape(self.caption)}</caption>"
        table = f"{caption}<thead><tr>{heads}</tr>{again}</thead><tbody>{body}</tbody>"
        return f'{TABLE_STYLE}<div class="rmm-table"><table>{table}</table></div>'

    def still(self) -> tuple[Figure, str]:
        """The selected method's path, or bars of its scores where it has none."""
        row, path = self.rows[self.select.value], self.paths[self.select.value]
        label = f"{row['method']} ({row['setting']})"
        sentence = f"{label}: {percent(row['scores'])}."
        if path is None:
            scores = {label: row["scores"]}
            return episodes.compare_picture([], scores, (), 0, caption=self.caption), sentence
        figure = plots.path_picture(path, self.sources, self.n_layers, self.stacks, label=label)
        return figure, f"{sentence} Its path: {path_words(path, self.stacks)}."
