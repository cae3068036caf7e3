"""The rules of the house: imports run down, the agent and the environment stand alone, files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# A wing may import itself and the levels below its own. "root" is the files directly in the package.
LEVELS = [
    {"errors"},
    {"tasks"},
    {"families"},
    {"formulas"},
    {"root"},
    {"engine", "zoo", "figures"},
    {"search"},
    {"fronts"},
    {"evidence", "course"},
    {"__main__"},
]
# Some import less than their level allows: module or wing -> all that it may import.
ONLY = {
    "formulas": {"formulas", "errors"},
    "ppo": {"env", "errors", "tasks.console"},
    "env": {"reward", "errors"},
    "figures": {"figures", "root", "errors"},
}
MOST_LINES = {"ppo.py": 350, "the root": 2000, "a file": 450, "README.md": 170}


def modules(package: Path) -> dict[str, Path]:
    """Dotted names below the package ("ppo", "engine.cache", "" for the package itself) -> files."""
    files = sorted(package.rglob("*.py"))
    parts = {file: file.relative_to(package).with_suffix("").parts for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): f for f, p in parts.items()}


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, those inside functions too, but for those under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(ast.Module([other], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from statements(node)


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    known = modules(package)

    def target(name: str) -> str | None:
        """A dotted name, or what it is an attribute of; None outside the package."""
        head, _, rest = name.partition(".")
        if head != package.name:
            return None
        while rest not in known:
            rest = rest.rpartition(".")[0]
        return rest

    found: dict[str, set[str]] = {}
    for module, file in known.items():
        folder = [package.name, *file.relative_to(package).parts[:-1]]
        names = []
        for node in statements(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            else:
                above = folder[: len(folder) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names += [f"{base}.{alias.name}" for alias in node.names]
        # The package itself ("") is imported with each of its modules: no edge.
        found[module] = {t for name in names if (t := target(name))} - {module}
    return found


def wing(module: str, known: dict[str, Path]) -> str:
    """The wing that a module belongs to, "root" for a file directly in the package."""
    if module in ("errors", "__main__"):
        return module
    is_file = "." not in module and known[module].name != "__init__.py"
    return "root" if is_file or not module else module.partition(".")[0]


def import_faults(package: Path) -> list[str]:
    """What is wrong with the imports, a sentence for each fault."""
    known, graph = modules(package), imports(package)
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    faults = []
    for module, targets in graph.items():
        own = wing(module, known)
        only = ONLY.get(module) or ONLY.get(own)
        for to in sorted(targets):
            other = wing(to, known)
            if other != own and level[other] >= level[own]:
                faults.append(f"{module} imports {to}: {own} may not import {other}")
            elif only and not only & {to, other}:
                faults.append(f"{module} imports {to}: expected only {', '.join(sorted(only))}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append("circle: " + " <- ".join(error.args[1]))
    return faults


def size_faults(repository: Path) -> list[str]:
    """Files that are too long, with their lines."""
    package = repository / "rmm_lab"
    lines = {
        file: len(file.read_text("utf-8").splitlines())
        for file in [repository / "README.md", *package.rglob("*.py")]
    }
    sizes = {str(file.relative_to(repository)): (n, "a file") for file, n in lines.items()}
    sizes["README.md"] = (lines[repository / "README.md"], "README.md")
    if package / "ppo.py" in lines:
        sizes["rmm_lab/ppo.py"] = (lines[package / "ppo.py"], "ppo.py")
    sizes["rmm_lab/*.py"] = (sum(lines[f] for f in package.glob("*.py")), "the root")
    return [
        f"{name}: {n} lines, at most {MOST_LINES[kind]}"
        for name, (n, kind) in sorted(sizes.items())
        if n > MOST_LINES[kind]
    ]


# ------------------------------------------------------------------------------------ the house


def test_imports_run_down_without_a_circle():
    faults = import_faults(REPOSITORY / "rmm_lab")
    assert not faults, "\n".join(faults)


def test_files_are_short():
    faults = size_faults(REPOSITORY)
    assert not faults, "\n".join(faults)


# --------------------------------------------------------- the checks see what they are there for

GOOD = {
    "__init__.py": "",
    "errors.py": "",
    "__main__.py": "def main():\n    from rmm_lab.course import checks\n    from rmm_lab import ppo",
    "reward.py": "import numpy\nfrom rmm_lab.formulas import checks",
    "env.py": "import torch.nn\nfrom rmm_lab import errors, reward",
    "ppo.py": "import rmm_lab.env\nfrom .errors import InputError",
    "tasks/__init__.py": "",
    "tasks/metrics.py": "from ..errors import InputError",
    "families/__init__.py": "",
    "families/vit.py": "from rmm_lab.tasks import metrics",
    "formulas/__init__.py": "",
    "formulas/checks.py": "from rmm_lab.errors import InputError",
    "figures/__init__.py": "",
    "figures/paths.py": "from rmm_lab.reward import Step",
    "figures/models.py": "from rmm_lab.figures.paths import draw",
    "engine/__init__.py": "",
    "engine/cache.py": "",
    "engine/scorer.py": "from . import cache\nfrom rmm_lab import reward",
    "search/__init__.py": "",
    "search/pipeline.py": "from rmm_lab import ppo\nfrom rmm_lab.engine import scorer",
    "fronts/__init__.py": "",
    "fronts/searches.py": "from rmm_lab.search import pipeline\nfrom rmm_lab import ppo",
    "evidence/__init__.py": "",
    "evidence/tables.py": "import rmm_lab.search.pipeline\nimport rmm_lab.fronts.searches",
    "course/__init__.py": "",
    "course/checks.py": "import rmm_lab\nfrom rmm_lab.search.pipeline import train",
}
TYPES = (
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rmm_lab.engine import scorer\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / "rmm_lab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    (root / "README.md").write_text("# Title\n", "utf-8")
    return root / "rmm_lab"


def test_a_good_tree_has_no_fault(tmp_path):
    package = write(tmp_path, GOOD | {"layers.py": TYPES})
    assert import_faults(package) == []
    assert size_faults(tmp_path) == []
    assert imports(package)["course.checks"] == {"search.pipeline"}
    assert imports(package)["env"] == {"errors", "reward"}
    assert imports(package)["engine.scorer"] == {"engine.cache", "reward"}


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("layers.py", "from rmm_lab.engine import scorer", "root may not import engine"),
        ("layers.py", "def f():\n    import rmm_lab.search.pipeline", "may not import search"),
        ("layers.py", TYPES + "else:\n    from rmm_lab.zoo import x", "may not import zoo"),
        ("layers.py", "if True:\n    from .engine.cache import Cache", "may not import engine"),
        ("tasks/new.py", "from rmm_lab.families.vit import f", "tasks may not import families"),
        ("families/new.py", "from ..reward import Step", "families may not import root"),
        ("formulas/new.py", "from rmm_lab.layers import x", "formulas may not import root"),
        ("formulas/new.py", "from ..families import vit", "expected only errors, formulas"),
        ("engine/new.py", "from rmm_lab.search import pipeline", "engine may not import search"),
        ("zoo/new.py", "from rmm_lab.engine.cache import x", "zoo may not import engine"),
        ("search/new.py", "import rmm_lab.course.checks", "search may not import course"),
        ("search/new.py", "from rmm_lab.fronts import searches", "search may not import fronts"),
        ("fronts/new.py", "import rmm_lab.evidence.tables", "fronts may not import evidence"),
        ("course/new.py", "from rmm_lab.evidence import tables", "course may not import evidence"),
        ("evidence/new.py", "from rmm_lab.course import checks", "evidence may not import course"),
        ("errors.py", "from rmm_lab import operators", "errors may not import root"),
        ("course/new.py", "from rmm_lab.__main__ import main", "course may not import __main__"),
        ("ppo.py", "from rmm_lab.reward import Step", "expected only env, errors"),
        ("env.py", "from rmm_lab import operators", "expected only errors, reward"),
        ("figures/new.py", "import rmm_lab.families.vit", "expected only errors, figures, root"),
        ("reward.py", "import rmm_lab.layers", "circle: "),
        ("engine/cache.py", "def f():\n    from .scorer import Scorer", "circle: "),
    ],
)
def test_a_forbidden_import_is_a_fault(tmp_path, file, text, fault):
    more = {"zoo/__init__.py": "", "operators.py": "", "layers.py": "from rmm_lab import reward"}
    package = write(tmp_path, GOOD | more)
    (package / file).write_text(text, "utf-8")
    faults = import_faults(package)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("file", "lines", "fault"),
    [
        ("rmm_lab/ppo.py", 351, "rmm_lab/ppo.py: 351 lines"),
        ("rmm_lab/engine/scorer.py", 451, "rmm_lab/engine/scorer.py: 451 lines"),
        ("README.md", 171, "README.md: 171 lines"),
    ],
)
def test_a_long_file_is_a_fault(tmp_path, file, lines, fault):
    write(tmp_path, GOOD)
    (tmp_path / file).write_text("# one line\n" * (lines - 1), "utf-8")
    assert size_faults(tmp_path) == []
    (tmp_path / file).write_text("# one line\n" * lines, "utf-8")
    assert size_faults(tmp_path) == [f"{fault}, at most {lines - 1}"]


def test_a_large_root_is_a_fault(tmp_path):
    package = write(tmp_path, {name: "# one line\n" * 400 for name in "abcde"})
    for name in "abcde":
        (package / name).rename(package / f"{name}.py")
    assert size_faults(tmp_path) == []
    (package / "f.py").write_text("# one line\n", "utf-8")
    assert size_faults(tmp_path) == ["rmm_lab/*.py: 2001 lines, at most 2000"]
