# `make` lists the targets. Everything is installed into .venv, on first use.

.DEFAULT_GOAL := help
.PHONY: help demo lab student handout leaderboard test lint browser clean

# python3.11 where it runs, python3 otherwise; `make PY=/path/to/python ...` chooses another.
PY ?= $(shell for p in python3.11 python3; do if $$p -c '' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin

# The tested versions. An environment variable and not `pip install -c`, since it takes precedence
# over a pip.conf, which on some machines caps versions. Relative, since pip splits it at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One thread per process: results do not depend on the machine, and two workers do not compete.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The tests of a file stay in one process, which builds what they share once; slow files come first.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
NOTEBOOKS := find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*'

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome

comma := ,
INSTALL = echo "Installing $(1) into .venv; the first time this fetches several GB and takes minutes." \
	&& $(BIN)/python -m pip install --quiet --editable "$(1)"

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile

demo: .venv/.stamp-run ## train the agent on the pair that ships, into a fresh folder under runs/
	$(BIN)/python -m rmm_lab merge --run-dir "runs/demo-$$(date +%Y%m%d-%H%M%S)"

lab: .venv/.stamp-lab ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

student: .venv/.stamp-lab ## write the student notebooks from the solved ones
	$(BIN)/python -m rmm_lab.course.notebooks

handout: .venv/.stamp-lab ## write the tree that students get, without solutions, into build/handout
	rm -rf build/handout
	$(BIN)/python -m rmm_lab.course.notebooks --handout build/handout

CLASS ?= handed-in
leaderboard: .venv/.stamp-run ## rank the paths in a folder on the test split: make leaderboard CLASS=folder
	$(BIN)/python -m rmm_lab.course.leaderboard "$(CLASS)"

test: lint browser ## lint, run the tests, run the notebooks (student and solved)
	$(ONE_THREAD) $(BIN)/python -m pytest $(TWO_WORKERS)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=120 \
		--durations=0 --durations-min=1 notebooks

lint: .venv/.stamp-test ## check style, types, that no notebook holds outputs or is out of step
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rmm_lab
	$(NOTEBOOKS) -exec $(BIN)/nbstripout --keep-id --verify {} +
	$(BIN)/python -m rmm_lab.course.notebooks --check

# The widgets are tested in a real browser. Where none can be had, those tests are skipped, and fail in CI.
browser:
	@for p in $(BROWSERS); do if command -v $$p >/dev/null; then exit 0; fi; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "Installing Chromium, for the widgets' tests."; \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null && exit 0; fi; \
	echo "!!! No browser found ($(BROWSERS)): the widgets will NOT be tested in JupyterLab. Install Chromium."

clean: ## delete caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# Plumbing: a stamp stands for an installation that succeeded, and is older than what it depends on
# as soon as a range or a pin changes.

.venv/.stamp-venv:
	@"$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "rmm_lab needs Python 3.11 or newer, which '$(PY)' is not: install one, or name it with 'make PY=/path/to/python'." >&2; \
	exit 1; }
	"$(PY)" -m venv .venv
	@touch $@

.venv/.stamp-run: pyproject.toml constraints.txt | .venv/.stamp-venv
	@$(call INSTALL,.)
	@touch $@

.venv/.stamp-lab: pyproject.toml constraints.txt | .venv/.stamp-venv
	@$(call INSTALL,.[lab$(comma)search])
	@touch .venv/.stamp-run $@

.venv/.stamp-test: pyproject.toml constraints.txt | .venv/.stamp-venv
	@$(call INSTALL,.[lab$(comma)search$(comma)hub$(comma)test$(comma)dev])
	@touch .venv/.stamp-run .venv/.stamp-lab $@
