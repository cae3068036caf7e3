"""pyproject.toml, environment.yml, constraints.txt and requirements.txt agree on their packages."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PIP_NAME = {"pytorch": "torch", "matplotlib-base": "matplotlib"}  # where conda-forge's differs


def pyproject_ranges() -> dict[str, SpecifierSet]:
    """Run-time dependencies and all extras: canonical pip name -> range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges: dict[str, SpecifierSet] = {}
    for requirement in (Requirement(line) for group in groups for line in group):
        name = canonicalize_name(requirement.name)
        first = ranges.setdefault(name, requirement.specifier)
        assert requirement.specifier == first, f"{name} has two ranges in pyproject.toml"
    return ranges


def conda_ranges() -> dict[str, SpecifierSet]:
    """environment.yml without Python and pip: canonical pip name -> range."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    (by_pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    packages = [line for line in lines if line not in ("python=3.11", "pip")]
    packages += [line for line in by_pip if line != "-e ."]
    ranges: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, packages):
        name = canonicalize_name(PIP_NAME.get(requirement.name, requirement.name))
        assert name not in ranges, f"{name} stands twice in environment.yml"
        ranges[name] = requirement.specifier
    return ranges


def pins() -> list[tuple[str, SpecifierSet]]:
    """constraints.txt line by line, so that a package that stands twice is seen."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [(canonicalize_name(req.name), req.specifier) for req in requirements]


def test_conda_has_the_ranges_of_pyproject():
    assert conda_ranges() == pyproject_ranges()


def test_hosted_notebooks_have_the_ranges_to_run_but_bring_their_own_jupyter():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    hosted = [Requirement(line) for line in lines if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, [*project["dependencies"], *extras["lab"], *extras["search"]])
    assert sorted(map(str, hosted)) == sorted(str(r) for r in wanted if r.name != "jupyterlab")
    binder = (ROOT / ".binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {"-r ../requirements.txt", "-e ."} <= set(binder)
    (python,) = (ROOT / ".binder" / "runtime.txt").read_text(encoding="utf-8").split()
    assert SpecifierSet(project["requires-python"]).contains(python.removeprefix("python-"))


def test_each_dependency_has_exactly_one_pin():
    assert sorted(name for name, _ in pins()) == sorted(pyproject_ranges())


@pytest.mark.parametrize(("name", "pin"), pins())
def test_pin_is_exact_and_inside_the_range(name, pin):
    (spec,) = pin  # one clause
    assert spec.operator == "=="
    assert "*" not in spec.version
    assert pyproject_ranges()[name].contains(spec.version)
