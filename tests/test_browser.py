"""Every widget in JupyterLab, in a real browser: clicked, by keyboard, and without leaving this machine.

nbmake runs the notebooks without a browser: a widget whose callback is broken, or that shows nothing,
passes there. Needs Chromium or Chrome; without one these tests are skipped, and fail where CI is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from screen import BROWSERS, FLAGS

ROOT = Path(__file__).parent.parent
LIMIT = 120_000  # milliseconds that anything may take, on a busy machine
# What opens a notebook and runs it, by Lab's commands: clicks on its menus race with the kernel's start.
# ``kernel`` is the number of one that runs, or null for a new one; the answer is the kernel's number.
RUN_ALL = """async ([path, kernel]) => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = await app.commands.execute('docmanager:open', kernel ? {path, kernel: {id: kernel}} : {path});
  await panel.context.ready;
  await panel.context.sessionContext.ready;
  await panel.context.sessionContext.session.kernel.info;
  await app.commands.execute('notebook:run-all-cells');
  window.opened = panel;
  return panel.context.sessionContext.session.kernel.id;
}"""
# Leaves no widget behind in the kernel, where what it has imported and computed stays, and no notebook
# on the page; a notebook closed by a command would ask whether to save it.
CLOSE_ALL = """async () => {
  const code = 'import ipywidgets; ipywidgets.Widget.close_all()';
  await window.opened?.context.sessionContext.session.kernel.requestExecute({code}).done;
  window.opened?.dispose();
  window.opened = undefined;
}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser_path() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        words = (
            f"no browser found ({', '.join(BROWSERS)}): the widgets were NOT tested in JupyterLab"
        )
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A private JupyterLab: its address and the folder that it serves. Nothing of the user's is touched."""
    home = tmp_path_factory.mktemp("lab")
    served = home / "served"
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    env = dict(os.environ) | {
        f"JUPYTER{'' if n.startswith('LAB') else '_'}{n}": str(home / n) for n in names
    }
    env |= {"IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    config = home / "CONFIG_DIR"
    (config / "labconfig").mkdir(parents=True)
    served.mkdir()
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    all_cells = {"windowingMode": "none"}  # those out of view too
    (config / "labconfig" / "default_setting_overrides.json").write_text(
        json.dumps(
            {
                "@jupyterlab/apputils-extension:notification": quiet,
                "@jupyterlab/notebook-extension:tracker": all_cells,
            }
        )
    )
    app = {"expose_app_in_browser": True, "news_url": None}
    app["check_for_updates_class"] = "jupyterlab.NeverCheckForUpdate"
    # Of a port a kernel may find that another process has taken it.
    files = {"transport": "ipc", "ip": str(home / "kernel")}
    settings = {"LabApp": app, "KernelManager": files}
    (config / "jupyter_lab_config.json").write_text(json.dumps(settings))
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]  # any free port
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={served}"]
    log = (home / "log").open("w")
    server = subprocess.Popen(command, env=env, cwd=served, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT / 1000
        while True:
            text = (home / "log").read_text()[-3000:]
            assert server.poll() is None, f"JupyterLab ended: {text}"
            assert time.monotonic() < deadline, f"JupyterLab did not start: {text}"
            # Where the server listens is in its runtime file, which is not written in one go.
            with contextlib.suppress(OSError, ValueError):
                file = home / "RUNTIME_DIR" / f"jpserver-{server.pid}.json"
                address = f"http://127.0.0.1:{json.loads(file.read_text())['port']}"
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            time.sleep(0.1)
        yield f"{address}/lab?token={token}", served
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)
        log.close()


@pytest.fixture(scope="module")
def browser(browser_path, tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=browser_path,
            args=list(FLAGS),
            headless=True,
            viewport={"width": 1400, "height": 1600},
        )
        context.set_default_timeout(LIMIT)
        yield context
        context.close()


@pytest.fixture(scope="module")
def kernels() -> list[str]:
    """The kernel that all notebooks of given cells share, once there is one: imports take seconds."""
    return []


@pytest.fixture(scope="module")
def lab_page(lab, browser):
    """Lab, open in the browser, and the hosts that it asks: to load it takes longer than most tests."""
    page = browser.new_page()
    hosts: set[str] = set()
    page.on("request", lambda r: hosts.add(urlparse(r.url).hostname or ""))
    page.goto(f"{lab[0]}&reset")
    page.wait_for_function("() => window.jupyterapp !== undefined")
    return page, hosts


@pytest.fixture
def run(lab, lab_page, kernels, request):
    """Opens a notebook in Lab, runs it, and gives the page, where no other one is open.

    The notebook is made of cells, or is a file, which gets a kernel of its own.
    """
    served = lab[1]
    page, hosts = lab_page
    names = []

    def start(*cells: str, file: Path | None = None):
        name = f"{request.node.name}.ipynb"
        name = re.sub(r"[^\w.]", "-", name)
        if file is not None:
            shutil.copy(file, served / name)  # Lab may save what it opens
        else:
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            notebook = new_notebook(
                cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": kernel}
            )
            nbformat.write(notebook, served / name)
        names.append(name)
        if file is not None:
            page.evaluate(RUN_ALL, [name, None])
        else:
            kernels[:] = [page.evaluate(RUN_ALL, [name, *(kernels or [None])])]
        return page

    yield start
    for name in names:
        if os.environ.get("RMM_LAB_SCREENSHOTS"):
            folder = Path(os.environ["RMM_LAB_SCREENSHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=folder / f"{name}.png")
    page.evaluate(CLOSE_ALL)
    assert page.locator(".jp-OutputArea").count() == 0  # else the next test would look at this one
    assert hosts <= {"127.0.0.1", ""}, hosts  # "": pictures inside the page


def status(page, words: str) -> None:
    """Wait until a line of status says these words."""
    from playwright.sync_api import expect

    expect(page.get_by_role("status").filter(has_text=words).first).to_be_visible(timeout=LIMIT)


LAST_ALT = "[...document.querySelectorAll('.jp-OutputArea img[alt]')].pop()?.alt"


def alt(page) -> str:
    """The alt text of the last picture on the page, once there is one."""
    page.wait_for_function(f"() => {LAST_ALT}")
    return page.evaluate(LAST_ALT)


def changed(page, before: str) -> str:
    """Wait until the last picture is another one; its alt text."""
    page.wait_for_function(f"old => {LAST_ALT} !== old", arg=before)
    return alt(page)


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True).first


def handle(page, n: int = 0):
    """The n-th slider's handle, which the keyboard moves."""
    found = page.locator(".jp-OutputArea .noUi-handle").nth(n)
    found.wait_for()
    return found


def pick(page, index: int, n: int = 0) -> None:
    """Choose an option of the n-th dropdown, by its position."""
    page.locator(".jp-OutputArea select").nth(n).select_option(index=index)


def test_button_test(run):
    page = run("from rmm_lab.course.widgets import ButtonTest\nButtonTest()")
    button(page, "press me").click()
    button(page, "press me").click()
    status(page, "pressed 2 times")
    button(page, "press me").focus()
    page.keyboard.press("Enter")
    status(page, "pressed 3 times")


LANDSCAPE = """
import numpy as np
class Landscape:
    sources, n_models, n_layers, stacks = ("digits", "textures", "ties"), 2, 3, (range(3),)
    n_subsets, task_names, chooses_stem = 2, ["digits", "textures"], False
    def score(self, path, subset=None):
        taken = [step.source for step in path]
        return np.array([taken.count("digits") / 4, taken.count("ties") / 4])
"""


def test_map_stepper(run):
    page = run(
        LANDSCAPE,
        "from rmm_lab.course.episode_walk import Walk\nfrom rmm_lab.course.widgets import MapStepper\n"
        "MapStepper(Walk(Landscape()))",
    )
    button(page, "digits").wait_for()
    start = alt(page)
    assert button(page, "back").is_disabled()  # at layer 0 there is nowhere to go back to
    button(page, "digits").click()
    status(page, "took digits; next: layer 1")
    taken = changed(page, start)
    assert "digits@0" in taken
    assert button(page, "back").is_enabled()
    button(page, "undo").click()
    status(page, "next: layer 0")
    assert changed(page, taken) == start
    button(page, "ties").focus()
    for k in (1, 2):
        page.keyboard.press("Enter")  # the button keeps the focus
        status(page, f"took ties; next: layer {k}")
    button(page, "skip").click()
    status(page, "reward")
    status(page, "textures 50")  # two layers of ties, each a quarter of textures
    assert button(page, "digits").is_disabled()
    button(page, "start again").click()
    status(page, "next: layer 0")


# Two tests look at one search.
RUN = """
from rmm_lab.course.run_record import Run
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
if "run" not in globals():
    problem = load_problem(("demo",), unit="both")
    config = configure("weights", episodes=16, data_fraction=0.02, finalists=3, quiet=True)
    run = Run.of(train(config, problem, table=False), problem)
"""


def test_path_inspector(run):
    page = run(RUN, "from rmm_lab.course.widgets import PathInspector\nPathInspector(run)")
    one = alt(page)
    pick(page, 1, n=1)  # the second path: from none to the best
    two = changed(page, one)
    pick(page, 1, n=0)
    assert len({one, two, changed(page, two)}) == 3


def test_training_replay(run):
    page = run(RUN, "from rmm_lab.course.widgets import TrainingReplay\nTrainingReplay(run)")
    handle(page).focus()
    before = alt(page)
    page.keyboard.press("ArrowRight")
    after = changed(page, before)
    assert "episode 1" in after
    page.locator(".jp-OutputArea button:has(.fa-play)").first.click()
    changed(page, after)


@pytest.mark.parametrize("widget", ["TiesExplorer", "ClipExplorer", "DarExplorer"])
def test_sliders_by_keyboard(run, widget):
    page = run(f"from rmm_lab.course.widgets import {widget}\n{widget}()")
    seen = alt(page)
    for n in range(2):
        handle(page, n).focus()
        page.keyboard.press("ArrowLeft")
        seen = changed(page, seen)


def test_distance_map(run):
    page = run(
        "from rmm_lab.search.problem import load_problem\nfrom rmm_lab.course.widgets import DistanceMap\n"
        "DistanceMap(load_problem(('demo',)))"
    )
    before = alt(page)
    pick(page, 1)
    assert "cosine" in changed(page, before)


FRONT = """
import numpy as np
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step
from rmm_lab.search.front import Front, Point
from rmm_lab.search.preferences import Ends
from rmm_lab.search.problem import load_problem
problem = load_problem(("demo",))
def point(source, *scores):
    path = LayerPath.of(problem.pool, tuple(Step(source, k) for k in range(6)), "base")
    return Point(path, scores, None, None, 6, 1.0, 7)
ends = {"reward": Ends(np.zeros(2), np.ones(2))}
points = point("digits", 0.9, 0.1), point("ties", 0.6, 0.6), point("textures", 0.1, 0.9)
front = Front(("digits", "textures"), ("digits", "textures"), ends, points, 3, 20, 3, 0.5)
"""


def test_pareto_explorer(run, tmp_path):
    folder = tmp_path / "models"
    page = run(
        FRONT,
        "from rmm_lab.course.widgets import ParetoExplorer\n"
        f"ParetoExplorer(front, folder={str(folder)!r})",
    )
    middle = alt(page)
    assert "point 1 of 3" in middle
    handle(page).focus()
    page.keyboard.press("Home")
    end = changed(page, middle)
    assert "digits 100%" in end
    assert "point 0 of 3" in end
    status(page, "point 0 of 3")
    button(page, "export this model").click()
    status(page, "written: ")
    assert (folder / "point-0" / "model.safetensors").is_file()
    box = page.locator(".jp-OutputArea .widget-vbox").first.bounding_box()
    assert box["height"] <= 640
    assert box["width"] <= 1366


def test_results_table(run):
    page = run(
        "from rmm_lab.course.widgets import ResultsTable\n"
        "rows = [{'method': m, 'setting': 's', 'scores': {'digits': a, 'textures': b}}"
        " for m, a, b in (('TIES', 0.5, 0.7), ('RMM (agent)', 0.8, 0.6))]\nResultsTable(rows)"
    )
    table = page.locator(".jp-OutputArea table").first
    table.wait_for()
    assert "80.0" in table.inner_text()
    before = table.inner_html()
    pick(page, 1)
    page.wait_for_function(
        "old => document.querySelector('.jp-OutputArea table').innerHTML !== old", arg=before
    )


# As the lessons show them, each with the most that it shows there.
LARGEST = {
    "ButtonTest": "ButtonTest()",
    "DistanceMap": "DistanceMap(pair)",
    "TiesExplorer": "TiesExplorer()",
    "MapStepper": """scorer = pair.scorer()
walk = Walk(scorer)
while not walk.done:
    walk.act("ties")
MapStepper(walk)""",
    "PathInspector": """inspector = PathInspector(run)
inspector.select(*list(run.named)[:2])
inspector""",
    "ClipExplorer": "ClipExplorer()",
    "TrainingReplay": "TrainingReplay(run)",
    "DarExplorer": "DarExplorer()",
    "ResultsTable": """vision = read("vision").query("group == 'digits+textures' and seed == 1").reset_index()
rows = vision[["method", "setting", "path"]].assign(path=vision["path"].replace("", None))
rows["scores"] = (task_scores(vision) / 100).to_dict("records")
parts = problem_of(configure(**json.loads(vision["config"].iloc[-1])).problem)
table = ResultsTable(rows, sources=parts.pool.sources, n_layers=parts.pool.n_layers)
table.choose("agent + CMA-ES")
table""",
    "MapStepper of a T5": """texts = load_problem(("qa",))
there = Walk(texts.scorer(fraction=0.1), subset=0)
for _ in range(8):
    there.act("colours")
MapStepper(there)""",
    "ParetoExplorer": "ParetoExplorer(front)",
    "Beat": """from rmm_lab.course.beat import Beat, HighScores
tried = HighScores("scores.json")
for i in range(5):
    tried.add(f"try {i}", 0.5 + i / 100)
other = Walk(scorer)
while not other.done:
    other.act("ties")
Beat(other, {f"rival {i}": 0.6 + i / 100 for i in range(6)}, tried)""",
}
LARGEST_NEEDS = """
import json
from rmm_lab.course.episode_walk import Walk
from rmm_lab.course.widgets import *
from rmm_lab.course.widgets import TiesExplorer, ClipExplorer, DarExplorer, DistanceMap, ParetoExplorer
from rmm_lab.evidence.rows import task_scores
from rmm_lab.evidence.tables import read
from rmm_lab.search.problem import problem_of
pair = load_problem(("demo",))
"""
TALLEST, LAPTOP = 640, {"width": 1366, "height": 768}  # pixels
HEAVIEST = 20_000  # bytes of a redraw
# Of each cell with a widget: its height, how much is wider than the cell, whether all is there, bytes.
WIDGETS = """() => [...window.opened.node.querySelectorAll('.jp-Cell')].flatMap(cell => {
  const view = cell.querySelector('.widget-vbox');
  if (!view) return [];
  const wide = [view, ...view.querySelectorAll('table, img')].filter(
    e => e.scrollWidth > e.clientWidth + 1
      || e.getBoundingClientRect().right > cell.getBoundingClientRect().right
  );
  const images = [...view.querySelectorAll('img')];
  const sizes = [...view.querySelectorAll('.widget-html-content')].map(e => e.innerHTML.length);
  const bytes = sizes.reduce((a, b) => a + b, 0);
  return [[view.getBoundingClientRect().height, wide.length, images.every(i => i.complete), bytes]];
})"""


def test_every_widget_fits_a_laptop(run, lab_page):
    page, before = lab_page[0], lab_page[0].viewport_size
    page.set_viewport_size(LAPTOP)
    try:
        run(RUN, FRONT, LARGEST_NEEDS, *LARGEST.values())
        page.wait_for_function(
            f"n => {{const found = ({WIDGETS})(); return found.length === n && found.every(w => w[2]);}}",
            arg=len(LARGEST),
        )
        found = dict(zip(LARGEST, page.evaluate(WIDGETS), strict=True))
    finally:
        page.set_viewport_size(before)
    print({name: (round(height), size) for name, (height, _, _, size) in found.items()})
    assert {n: w for n, w in found.items() if w[0] > TALLEST or w[1] or w[3] > HEAVIEST} == {}


def test_a_broken_callback_fails_here(run):
    """What nbmake does not see: the cell is green, the button does nothing."""
    page = run(
        "from IPython.display import display\nfrom rmm_lab.course.widgets import ButtonTest\n"
        "broken, good = ButtonTest(), ButtonTest()\n"
        "broken.button._click_handlers.callbacks.clear()\n"
        "broken.button.on_click(lambda b: 1 / 0)\ndisplay(broken, good)"
    )
    buttons = page.get_by_role("button", name="press me", exact=True)
    buttons.nth(1).wait_for()
    buttons.nth(0).click()
    buttons.nth(1).click()  # the kernel answers in order: after this answer it has had both clicks
    status(page, "pressed 1 time")
    status(page, "not pressed yet")


def test_the_first_notebook_runs_in_lab(run):
    page = run(file=ROOT / "notebooks" / "00_start_here.ipynb")
    button(page, "press me").click()
    status(page, "pressed 1 time")
    status(page, "not attempted")
    assert page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
