"""What a search shows and stores: tables by hand, round trips, figures that hold what they should."""

from __future__ import annotations

import errno
import resource
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.figures import paths as plots
from rmm_lab.search import report
from rmm_lab.search import run_folder as runs
from rmm_lab.search import uniform as baselines
from rmm_lab.search.run_folder import RunFolder, append, check_new, from_csv, to_csv, write
from rmm_lab.search.uniform import Row

ROWS = [Row("base", "as it is", (0.25, 0.5)), Row("RMM", "9 episodes", (0.875, 0.625))]


TASKS = [SimpleNamespace(name=n, metric="accuracy") for n in "ab"]


def test_markdown_by_hand():
    assert report.markdown(ROWS, TASKS) == (
        "| method | a | b | mean | setting |\n"
        "|---|---:|---:|---:|---|\n"
        "| base | 25.0 | 50.0 | 37.5 | as it is |\n"
        "| RMM | 87.5 | 62.5 | 75.0 | 9 episodes |\n"
    )


def test_plain_table_by_hand():
    assert report.plain(ROWS, TASKS).splitlines() == [
        "method     a     b  mean  setting",
        "base    25.0  50.0  37.5  as it is",
        "RMM     87.5  62.5  75.0  9 episodes",
    ]


def test_a_skewed_task_has_its_accuracy_beside_the_mean():
    skewed = SimpleNamespace(name="b", metric="balanced")
    rows = [Row("always no", "-", (0.25, 0.5), {"b": 0.9})]
    assert report.plain(rows, [TASKS[0], skewed]).splitlines() == [
        "method        a  b (balanced)  mean  setting  b (accuracy)",
        "always no  25.0          50.0  37.5  -                90.0",
    ]
    assert report.markdown(rows, [TASKS[0], skewed]).splitlines()[1:] == [
        "|---|---:|---:|---:|---|---:|",
        "| always no | 25.0 | 50.0 | 37.5 | - | 90.0 |",
    ]


def test_a_row_keeps_the_accuracy_of_a_skewed_task_beside_its_metric():
    """Four of five rows are 0: always 0 has an accuracy of 0.8, and a balanced one of 0.5."""
    labels = torch.tensor([0, 0, 0, 0, 1])
    task = SimpleNamespace(
        name="b",
        metric="balanced",
        split=lambda name: SimpleNamespace(labels=labels),
        score=lambda found, labels: 0.5,
    )
    row = baselines.row(SimpleNamespace(tasks=[task]), "always", "-", [torch.zeros(5)])
    assert row.scores == (0.5,)
    assert row.plain == {"b": pytest.approx(0.8)}


SOURCES = ("digits", "ties:density=0.3,scale=1", "odd@name")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 20)), max_size=8))
def test_a_path_as_text_and_back(steps):
    path = tuple(steps)
    assert report.steps_of(report.text_of(path, SOURCES), SOURCES) == path


def test_a_path_as_text_by_hand():
    assert report.text_of(((0, 0), (1, 2)), SOURCES) == "digits@0 ties:density=0.3,scale=1@2"


numbers = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False))


@given(
    st.lists(st.fixed_dictionaries({"n": numbers, "path": st.sampled_from(SOURCES)}), min_size=1)
)
def test_tables_come_back_from_csv_as_they_were(rows):
    assert from_csv(to_csv(rows)) == rows


def test_write_replaces_whole_files_only(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write(file, "old")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert "expected space on the device" in one_sentence(caught.value)


def test_append_adds_to_the_end(tmp_path):
    file = tmp_path / "table.csv"
    for part in (b"one\n", b"", b"two\n"):
        append(file, part)
    assert file.read_bytes() == b"one\ntwo\n"


def test_an_append_that_finds_no_space_leaves_the_file_as_it_was(tmp_path):
    """A real limit: the kernel takes three of the bytes, and refuses the rest."""
    file = tmp_path / "table.csv"
    append(file, b"one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append(file, b"two\nthree\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"one\n"
    append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"


def saved(folder, n, start=0):
    """n updates of two episodes each; returns the rows and policies that were saved last."""
    episodes = [{"episode": i, "reward": i / 3, "path": f"a@{i % 7}"} for i in range(2 * n)]
    updates = [{"update": i, "loss": 1 / (i + 1)} for i in range(n)]
    policies = [torch.tensor([[i, 0.1], [float("nan"), 2]]) for i in range(n)]
    for i in range(start + 1, n + 1):
        tensors, counters = {"w": torch.tensor([i])}, {"dar_episode": 2 * i}
        folder.save_checkpoint(tensors, counters, episodes[: 2 * i], updates[:i], policies[:i])
    return episodes, updates, policies


def test_saving_costs_the_same_after_a_hundred_updates_as_after_two(tmp_path, monkeypatch):
    """Every row is formatted once and every byte of the tables is written once."""
    rows_formatted, written = [], {}
    original = {name: getattr(runs, name) for name in ("to_csv", "append", "write")}

    def to_csv(rows, **options):
        rows_formatted.append(len(rows))
        return original["to_csv"](rows, **options)

    def counted(how):
        def write(file, content):
            written.setdefault(file.name, []).append(len(content))
            original[how](file, content)

        return write

    monkeypatch.setattr(runs, "to_csv", to_csv)
    for how in ("append", "write"):
        monkeypatch.setattr(runs, how, counted(how))
    saved(RunFolder(tmp_path), 100)
    assert rows_formatted == [2, 1] * 100
    for name in ("episodes.csv", "updates.csv", "policies.bin"):
        assert sum(written[name]) == (tmp_path / name).stat().st_size
    checkpoints = written["checkpoint.safetensors"]
    assert len(checkpoints) == 100
    assert max(checkpoints) <= checkpoints[0] + 16  # digits of the counters, and what pads them


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    assert RunFolder(tmp_path).load_checkpoint() is None
    episodes, updates, policies = saved(RunFolder(tmp_path), 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    folder = RunFolder(tmp_path)
    tensors, counters, *tables = folder.load_checkpoint()
    assert tables == [episodes, updates]
    assert counters["dar_episode"] == 6
    assert tensors["w"].tolist() == [3]
    assert torch.equal(
        tensors["policies"].view(torch.int32), torch.stack(policies).view(torch.int32)
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    inode = (tmp_path / "episodes.csv").stat().st_ino
    saved(folder, 5, start=3)  # goes on
    assert (tmp_path / "episodes.csv").stat().st_ino == inode  # in the same file, not in a new one
    (tmp_path / "whole").mkdir()
    saved(RunFolder(tmp_path / "whole"), 5)
    for name in before:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("episodes.csv", b"6,2.0,a@6\n"),
        ("episodes.csv", b"6,2.0,a@6\n7,2.3"),
        ("episodes.csv", b'6,2.0,"a\n'),
        ("episodes.csv", "7,2.3,\N{GREEK SMALL LETTER ALPHA}".encode()[:-1]),
        ("updates.csv", b"3"),
        ("policies.bin", bytes(16)),
        ("policies.bin", bytes(3)),
    ],
)
def test_what_a_stopped_search_wrote_after_its_checkpoint_is_cut_off(tmp_path, name, more):
    episodes, updates, _ = saved(RunFolder(tmp_path), 3)
    whole = (tmp_path / name).read_bytes()
    append(tmp_path / name, more)
    tensors, _, *tables = RunFolder(tmp_path).load_checkpoint()
    assert tables == [episodes, updates]
    assert tensors["policies"].shape == (3, 2, 2)
    assert (tmp_path / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("episodes.csv", None, "at least 6 rows in .*episodes.csv, found 0"),
        ("episodes.csv", b"episode,reward,path\n0,0.0,a@0\n", "at least 6 rows .*found 1"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"0,0.0\n", "6 rows .*an altered one"),
        ("updates.csv", b"update,loss\n0,1.0\n1,0.5\n2,0.3", "at least 3 rows .*found 2"),
        ("policies.bin", bytes(47), "at least 48 bytes in .*policies.bin, found 47"),
    ],
)
def test_a_table_that_lacks_rows_is_refused(tmp_path, name, left, message):
    saved(RunFolder(tmp_path), 3)
    (tmp_path / name).unlink()
    if left is not None:
        (tmp_path / name).write_bytes(left)
    with pytest.raises(InputError, match=message):
        RunFolder(tmp_path).load_checkpoint()


def test_the_first_save_replaces_what_a_search_without_a_checkpoint_left(tmp_path):
    (tmp_path / "episodes.csv").write_bytes(b"episode,reward,path\n0,0.1,a@0\n1,")
    (tmp_path / "policies.bin").write_bytes(bytes(5))
    folder = RunFolder(tmp_path)
    assert folder.load_checkpoint() is None
    episodes, *_ = saved(folder, 2)
    assert from_csv((tmp_path / "episodes.csv").read_text()) == episodes
    assert (tmp_path / "policies.bin").stat().st_size == 32


def test_a_new_folder_is_absent_or_empty(tmp_path):
    check_new(tmp_path)
    check_new(tmp_path / "new" / "below")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="found files"):
        check_new(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check_new(tmp_path / "file")


def test_errors_are_one_line():
    assert one_sentence(ValueError("two\nlines  here")) == "two lines here"


def episodes(raw, dar=None):
    return [
        {"raw_reward": r, "dar_reward": d, "penalised": 0, "path": f"p{i}"}
        for i, (r, d) in enumerate(zip(raw, dar or raw, strict=True))
    ]


def test_progress_says_episode_best_path_and_time_left(capsys):
    rows = episodes([0.5, 0.75, 0.25])
    progress = report.Progress(3, [], quiet=False)
    for n in (1, 2, 3):
        progress.show(rows[:n])
    line = capsys.readouterr().out.splitlines()[-1]
    for words in ("episode 3/3", "reward 25.0", "last 50 50.0", "best 75.0 (p1)", "0 s left"):
        assert words in line
    report.Progress(3, [], quiet=True).show(rows)
    assert capsys.readouterr().out == ""


def test_progress_of_a_search_that_goes_on_knows_the_best_before(capsys):
    rows = episodes([0.5, 0.9, 0.75, 0.25])
    rows[1]["penalised"] = 1
    report.Progress(4, rows[:3], quiet=False).show(rows)
    assert "best 75.0 (p2)" in capsys.readouterr().out


def test_a_commit_that_looks_like_a_number_stays_itself():
    rows = [{"commit": c, "mean": m} for c, m in (("37932e1", 1.5), ("0012345", 2), ("12e4567", 0))]
    assert from_csv(to_csv(rows)) == rows


def test_a_path_of_scales_does_not_fill_the_progress_line(capsys):
    path = " ".join(f"task_arithmetic:scale=0.{k}51/0.249@{k}" for k in range(10))
    row = {"raw_reward": 0.5, "dar_reward": 0.5, "penalised": 0, "path": path}
    report.Progress(1, [], quiet=False).show([row])
    line = capsys.readouterr().out.strip()
    assert f"({path[:107]} ...)" in line  # three whole steps, and no more
    assert report.shortened("digits@0 ties@1") == "digits@0 ties@1"


def test_moving_average_by_hand():
    assert plots.moving_average([1, 3, 5, 11], 2).tolist() == [1, 2, 4, 8]
    assert plots.moving_average([1, 3, 5, 11], 50).tolist() == [1, 2, 3, 5]


def test_the_reward_curve_draws_dar_only_where_there_is_some():
    plain = plots.reward_curve(episodes([0.5, 0.7]))
    labels = [t.get_text() for t in plain.axes[0].get_legend().get_texts()]
    assert not any("DAR" in label for label in labels)
    blended = plots.reward_curve(episodes([0.5, 0.7], [0.5, 0.6]))
    labels = [t.get_text() for t in blended.axes[0].get_legend().get_texts()]
    assert any("DAR" in label for label in labels)
    assert plots.png(plain).startswith(b"\x89PNG")


def test_the_path_picture_shows_every_layer_in_running_order():
    steps = [("digits", 0), ("digits", 0), ("odd@name", 2)]
    figure = plots.path_picture(steps, SOURCES, 3, "weighted_average:expert=2")
    top, bottom = figure.axes
    boxes = [t.get_text() for t in bottom.texts]
    assert boxes == [
        "weighted\naverage → 2\nstem",
        "digits\nlayer 0",
        "digits\nlayer 0",
        "odd@name\nlayer 2",
    ]
    assert len(bottom.patches) == 4
    assert [t.get_text() for t in top.texts] == ["2", "1"]  # the merging map's counts
    assert plots.png(figure).startswith(b"\x89PNG")
    assert plots.png(plots.path_picture([], SOURCES, 3, "base")).startswith(b"\x89PNG")


def test_the_path_picture_of_two_stacks_names_them_and_draws_their_border():
    steps = [("digits", 0), ("odd@name", 2), ("odd@name", 3)]
    figure = plots.path_picture(steps, SOURCES, 4, "base", (range(3), range(3, 4)))
    top, bottom = figure.axes
    assert [t.get_text() for t in top.get_xticklabels()] == ["enc 0", "enc 1", "enc 2", "dec 0"]
    assert [t.get_text().splitlines()[-1] for t in bottom.texts] == [
        "stem",
        "enc 0",
        "enc 2",
        "dec 0",
    ]
    (border,) = top.lines
    assert list(border.get_xdata()) == [2.5, 2.5]


def test_many_sources_look_different_each():
    sources = [f"s{i}" for i in range(20)]
    figure = plots.path_picture([(s, 0) for s in sources], sources, 1, "base")
    boxes = figure.axes[1].patches[1:]  # the first is the stem
    assert len({(box.get_facecolor(), box.get_hatch()) for box in boxes}) == 20


def test_the_cost_of_a_search_in_a_line():
    cache = SimpleNamespace(peak=3 * 2**20, budget=8 * 2**20, evicted=5)
    scorer = SimpleNamespace(evaluations=71, work_asked=900, work_run=400, cache=cache)
    assert report.cost(scorer) == (
        "scored 71 paths: 2.25 times as many layers asked for as computed, 3 of at most 8 MiB of "
        "activations kept, 5 forgotten"
    )
    cache.peak = 0  # all that was kept is with the workers of a cluster
    assert report.cost(scorer) == (
        "scored 71 paths: 2.25 times as many layers asked for as computed"
    )
