"""Many answers: the front of a run, from what it scored on subsets to what the test split keeps.

1. Every evaluation has a score per task. The paths whose mean scores no other path's dominate are the
   *archive*: the best of many noisy numbers, so what it *promises* is never reported as the result.
2. At most ``FINALISTS`` paths, the best by means that are shrunk as in ``shortlist``, are scored on the whole
   reward split. Those that no other one dominates there are the front.
3. The test split is scored once, for the front alone: what is *kept*.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.path import LayerPath
from rmm_lab.reward import Path, Step, parse_path, split_stem
from rmm_lab.search.card import card
from rmm_lab.search.finalists import scores
from rmm_lab.search.front_measures import (
    achievement,
    expected_utility,
    hypervolume,
    knee,
    lattice_of,
    non_dominated,
    r2,
)
from rmm_lab.search.preferences import (
    Ends,
    check_ends,
    ends_of,
    parse_preference,
    preference_of,
    scored_by_task,
)
from rmm_lab.search.uniform import path_row, uniform
from rmm_lab.tasks.files import write_file

SCHEMA = "rmm_lab/front/1"
FINALISTS = (
    21  # paths that are scored on the whole reward split; a lattice for two and for three tasks
)
SPLITS = ("promised", "reward", "test")
PRIOR = 2  # evaluations that a path's mean scores are shrunk by

ByTask = Iterable[tuple[str, np.ndarray]]  # (path as text, scores (N,)) of each evaluation

# ------------------------------------------------------------------- from subsets to the whole split


def means(scored: ByTask, prior: int = 0) -> dict[str, np.ndarray]:
    """Each path's mean scores (N,), as if ``prior`` more evaluations of it had given the mean of all."""
    seen: dict[str, list[np.ndarray]] = {}
    for path, found in scored:
        seen.setdefault(path, []).append(found)
    if not seen:
        return {}
    every = np.mean([found for own in seen.values() for found in own], axis=0)
    return {p: (sum(own) + prior * every) / (len(own) + prior) for p, own in seen.items()}


def archive(scored: ByTask, ends: Ends) -> dict[str, np.ndarray]:
    """The paths whose mean scores (N,) no other path's dominate; of equal ones that with fewest layers."""
    found = {text: own for text, own in sorted(means(scored).items(), key=_fewest)}
    if not found:
        return {}
    kept = non_dominated(ends.normalised(np.array(list(found.values()))))
    return {text: own for (text, own), keep in zip(found.items(), kept, strict=True) if keep}


def _fewest(pair: tuple[str, Any]) -> tuple[int, str]:
    return pair[0].count("@"), pair[0]


def promising(promised: Mapping[str, np.ndarray], ends: Ends, n: int = FINALISTS) -> list[str]:
    """Up to n paths for the whole reward split: by turns, for each weight of a lattice, the best for it.

    After the first round come the second best, and so on, since what is first on subsets need not be. Of
    equal paths the one with fewest layers is first.
    """
    texts = [text for text, _ in sorted(promised.items(), key=_fewest)]
    if not texts or n < 1:
        return []
    points = ends.normalised(np.array([promised[text] for text in texts]))
    values = achievement(points, lattice_of(points.shape[1], n))  # (W, P)
    ranked = np.argsort(-values, axis=1, kind="stable")
    return [texts[i] for i in dict.fromkeys(ranked.T.ravel().tolist())][:n]


# --------------------------------------------------------------------------- what else a model costs


def distance(pool: Any, path: Path) -> float:
    """The Euclidean norm of theta - theta_0, over the stem and each layer that runs; in units of the weights.

    A layer that runs twice counts twice. MM-MO's regulariser (Li et al. 2024) is the 1-norm of the same.
    """
    first, steps = split_stem(path)
    total = 0.0
    for i, step in enumerate((first, *steps)):
        base = pool.weights("base", step.layer)
        own = pool.weights(*step, prefix=(first, *steps)[:i])
        total += sum(float(((own[n] - base[n]).double() ** 2).sum()) for n in base)
    return float(np.sqrt(total))


def modules(pool: Any, paths: Iterable[Path]) -> int:
    """How many different stems and layers are stored for these models together (MERGE, Qiu et al. 2026)."""
    kept: set[Any] = set()
    for path in paths:
        first, steps = split_stem(path)
        for i, step in enumerate((first, *steps)):
            before = (first, *steps)[:i] if pool.depends_on_path(step.source) else ()
            kept.add((step, before))
    return len(kept)


# ---------------------------------------------------------------------------------------- the front


@dataclass(frozen=True)
class Point:
    """One merged model of a front, with each task's score in [0, 1] by split.

    ``promised``: the mean on subsets, None where it was scored on none. ``test``: None until ``on_test``.
    ``layers`` that run, ``distance`` from the base, ``modules`` stored: see above.
    """

    path: LayerPath
    reward: tuple[float, ...]
    promised: tuple[float, ...] | None
    test: tuple[float, ...] | None
    layers: int
    distance: float
    modules: int


@dataclass(frozen=True)
class Front:
    """The models that no other one dominates on the whole reward split, from the first task's best on.

    ``ends``: split -> both ends of each task's scale; what is promised has those of ``reward``.
    ``finalists``: how many paths it was chosen from. ``modules``: stored for all points together.
    ``archive``: how many paths no other one dominated on subsets; ``promise``: their hypervolume there.
    """

    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    ends: dict[str, Ends]
    points: tuple[Point, ...]
    finalists: int
    modules: int
    archive: int
    promise: float

    def scores(self, split: str = "reward") -> np.ndarray:
        """(n, N), NaN where there are none."""
        nothing = (np.nan,) * len(self.tasks)
        return np.array([getattr(p, split) or nothing for p in self.points], float)

    def normalised(self, split: str = "reward") -> np.ndarray:
        """The same on the scale of ``Ends``, (n, K), for a split of ``scaled``."""
        ends = self.ends["test" if split == "test" else "reward"]
        return ends.normalised(self.scores(split), self.ends["reward"].counts)

    @property
    def scaled(self) -> tuple[str, ...]:
        """The splits with a scale for each task that counts: ``test`` if the experts are better there too."""
        on = self.ends["reward"].counts
        there = "test" in self.ends and self.ends["test"].counts[on].all()
        return SPLITS if there else SPLITS[:2]

    @property
    def knee(self) -> int:
        """The number of the point at the knee, by the reward split."""
        return knee(self.normalised())

    def prefer(self, wanted: str | Sequence[float]) -> int:
        """The number of the point for a preference, by the reward split.

        wanted: a text such as ``digits=2,textures=1``, or a weight for each task, in their order.
        """
        weights = self.weights_of(wanted)[self.ends["reward"].counts]
        return int(achievement(self.normalised(), weights / weights.sum())[0].argmax())

    def _spelled(self, weights: Sequence[float]) -> str:
        if len(weights) != len(self.tasks):
            raise InputError(
                f"front: expected a weight for each of {len(self.tasks)} tasks, found {len(weights)}; give "
                f"as many, in the order {', '.join(self.tasks)}"
            )
        pairs = zip(self.tasks, weights, strict=True)
        return ",".join(f"{task}={float(weight)!r}" for task, weight in pairs)

    def measures(self) -> dict[str, dict[str, float]]:
        """Split -> hypervolume, R2 and expected utility of the points, as far as they were scored."""
        out: dict[str, dict[str, float]] = {}
        for split in self.scaled:
            points = self.normalised(split)
            if len(points := points[np.isfinite(points).all(1)]):
                weights = lattice_of(points.shape[1], FINALISTS)
                out[split] = {
                    "hypervolume": hypervolume(points),
                    "R2": r2(points, weights),
                    "expected utility": expected_utility(points, weights),
                }
        return out

    def on_test(self, problem: Any) -> Front:
        """The same with the points' scores on the test split, and the ends there."""
        pool, found = problem.pool, []
        base = uniform(problem, "base", "test")
        own = [uniform(problem, name, "test")[i] for i, name in enumerate(pool.names)]
        for point in self.points:
            found.append(replace(point, test=path_row(problem, "", "", point.path.path).scores))
            pool.forget(_made(pool, point.path.path))
        ends = self.ends | {"test": Ends(base, np.array(own))}
        return replace(self, points=tuple(found), ends=ends)

    def build(self, i: int) -> Any:
        """The merged model of a point, as of timm or transformers."""
        from rmm_lab.search.problem import pool_of

        path = self._point(i).path
        return path.build(pool_of(path))

    def export(
        self, i: int, folder: str | Folder, wanted: str | Sequence[float] | None = None
    ) -> Folder:
        """Write a point's model as a folder that timm or transformers loads, with its card and path.json.

        wanted: the preference that it answers, for the card; by default one of those that ``prefer`` would
        answer with it.
        """
        from rmm_lab.search.problem import pool_of

        path, said = (
            self._point(i).path,
            self._said(i, wanted),
        )  # refused before anything is written
        pool = pool_of(path)
        folder = path.save_pretrained(folder, pool)
        write_file(folder / "path.json", path.to_json())
        write_file(folder / "README.md", card(path, pool, self.scores_of(i), said))
        return folder

    def _said(self, i: int, wanted: str | Sequence[float] | None) -> str:
        """What a card says before the scores of a point."""
        on = self.ends["reward"].counts
        if wanted is not None:
            answered, how = [self.weights_of(wanted)], "chosen for the preference"
        else:
            lattice = lattice_of(int(on.sum()), FINALISTS)  # (W, K)
            every = np.zeros((len(lattice), len(on)))
            every[:, on] = lattice
            answered = [w for w in every if self.prefer(w.tolist()) == i]
            how = "the answer to preferences such as"
        said = f"Point {i} of a front of {len(self.points)}"
        if i == self.knee:
            said += ", its knee"
        if answered:
            middle = answered[len(answered) // 2]
            shares = zip(self.tasks, middle, strict=True)
            said += f", {how} " + ", ".join(f"{task} {share:.0%}" for task, share in shares)
        once = " The test split was scored once, after the choice." if "test" in self.ends else ""
        return f"{said}. In %; the front was chosen on the reward split.{once}"

    def scores_of(self, i: int) -> str:
        """A point's scores as Markdown, in %, a row for each task: base, point, expert, by split."""
        import pandas as pd

        columns: dict[str, np.ndarray] = {}
        for split, ends in self.ends.items():
            found = {"base": ends.base, "this": self.scores(split)[i], "expert": ends.expert}
            columns |= {f"{name}, {split}": 100 * own for name, own in found.items()}
        table = pd.DataFrame(columns, index=pd.Index(self.tasks, name="task"))
        return str(table.to_markdown(floatfmt=".1f"))

    def weights_of(self, wanted: str | Sequence[float]) -> np.ndarray:
        """A preference as weights (N,) that add up to 1, see ``prefer``."""
        text = wanted if isinstance(wanted, str) else self._spelled(wanted)
        weights = parse_preference(text, self.tasks, self.experts)
        if not weights[self.ends["reward"].counts].any():
            raise InputError(
                f"--prefer: expected weight on a task that the front is about, found {text!r}; give others"
            )
        return weights

    def _point(self, i: int) -> Point:
        if not 0 <= i < len(self.points):
            raise InputError(
                f"front: expected a point from 0 to {len(self.points) - 1}, found {i}; see front.md"
            )
        return self.points[i]

    def to_json(self) -> str:
        """The front with all that is needed to build each point again, and what it is worth."""
        numbers = {
            split: {"base": ends.base.tolist(), "expert": ends.expert.tolist()}
            for split, ends in self.ends.items()
        }
        points = [
            {"path": json.loads(point.path.to_json())}
            | {key: value for key, value in vars(point).items() if key != "path"}
            for point in self.points
        ]
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "tasks": self.tasks,
            "experts": self.experts,
            "ends": numbers,
        }
        data |= {"finalists": self.finalists, "modules": self.modules}
        data |= {"archive": self.archive, "promise": self.promise}
        data |= {"knee": self.knee, "measures": self.measures(), "points": points}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Front:
        """The inverse of ``to_json``; InputError for anything else."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"the schema is not {SCHEMA}")
            arrays = {
                split: Ends(*(np.array(own[key], float) for key in ("base", "expert")))
                for split, own in data["ends"].items()
            }
            points = []
            for own in data["points"]:
                path = LayerPath.from_json(json.dumps(own.pop("path")))
                found = {key: own.pop(key) for key in SPLITS}
                found = {key: own and tuple(map(float, own)) for key, own in found.items()}
                points.append(Point(path, **found, **own))
            numbers = {key: data[key] for key in ("finalists", "modules", "archive", "promise")}
            tasks, experts = tuple(data["tasks"]), tuple(data["experts"])
            front = cls(tasks, experts, arrays, tuple(points), **numbers)
            front.normalised()
            return front
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"front: expected JSON of schema {SCHEMA}, found something else ({error!r}); take "
                "front.json of a run folder"
            ) from error


def read_front(folder: str | Folder) -> Front:
    """The front of a run folder, or of a front.json; InputError where there is none."""
    file = Folder(folder)
    file = file if file.is_file() else file / "front.json"
    try:
        return Front.from_json(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"front: expected {file}, found none that can be read ({type(error).__name__}); make it with "
            f"python -m rmm_lab merge --resume {file.parent} --front"
        ) from error


def find_front(
    scorer: Any,
    scored: ByTask,
    ends: Ends,
    answers: Iterable[Path] = (),
    n: int = FINALISTS,
) -> Front:
    """The front of what was scored on subsets, and of a search's ``answers``, the best first.

    Answers leave a quarter of the n places to others. Raises InputError where nothing was scored.
    """
    scored = list(scored)
    promised = means(scored)
    own = list(dict.fromkeys(answers))[: n - min(n // 4, len(promised))]
    others = map(parse_path, promising(means(scored, PRIOR), ends, n))
    paths = list(dict.fromkeys([*own, *others]))[:n]
    if not paths:
        raise InputError("front: expected at least one legal episode, found none; raise --episodes")
    found = scores(scorer, [(path, None) for path in paths])
    points = ends.normalised(np.array(found))
    fewest = np.argsort([len(path) for path in paths], kind="stable")  # of equal ones it stays
    kept = fewest[non_dominated(points[fewest])]
    kept = kept[np.lexsort((-points[kept].T)[::-1])]  # the best for the first task comes first
    pool, stem = scorer.pool, getattr(scorer, "stem", "base")
    texts = {parse_path(text): text for text in promised}
    models = []
    for i in kept:
        path = paths[i]
        layers = LayerPath.of(pool, path, stem)
        seen_as = tuple(promised[texts[path]].tolist()) if path in texts else None
        costs: dict[str, Any] = {
            "layers": len(layers.steps),
            "distance": distance(pool, layers.path),
            "modules": modules(pool, [layers.path]),
        }
        pool.forget(_made(pool, path))
        models.append(Point(layers, tuple(found[i].tolist()), seen_as, None, **costs))
    best = archive(scored, ends)
    promise = hypervolume(ends.normalised(np.array(list(best.values())))) if best else 0.0
    return Front(
        tasks=tuple(scorer.task_names),
        experts=tuple(pool.names),
        ends={"reward": ends},
        points=tuple(models),
        finalists=len(paths),
        modules=modules(pool, [m.path.path for m in models]),
        archive=len(best),
        promise=promise,
    )


def _made(pool: Any, path: Path) -> list[Step]:
    """The steps whose layers were merged for this path alone."""
    return [step for step in path if step.scales or step.source not in (*pool.sources, "base")]


# -------------------------------------------------------------------------------- for a run folder


def check(run: Any, scorer: Any) -> None:
    """InputError where a run's preference or front cannot be had, before anything is searched."""
    preference_of(run.prefer, scorer)
    if run.front:
        check_ends(ends_of(scorer), scorer.task_names, "--front")


def front_of(search: Any) -> Front:
    """The front of a search that is over: of all that it scored, on the whole reward split."""
    scored = scored_by_task(search.episodes, search.scorer.task_names)
    return find_front(search.scorer, scored, ends_of(search.scorer))
