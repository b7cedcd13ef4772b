# Everything a fresh machine needs: `make train`, `make test`. Run `make` to see the rest.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
# one thread a test process: two processes share two cores instead of fighting for them
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help env train browse test test-all test-latest check format docs fork update clean

help:  ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment: made once, made again when what it is built from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

env: $(VENV)/.installed  ## create the environment in .venv, everything pinned by constraints.txt

train: env  ## train the default: a ResNet on the digits, three minutes from nothing
	$(RUN) train.py

browse: env  ## a page of all runs in runs/, opened in the browser
	$(RUN) scripts/browse.py

test: env  ## run the tests of every promise, as CI does
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal --durations=20 -m "not thorough"

test-all: env  ## run every test: also those marked thorough, further cases of the same promises
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal --durations=20

check: env  ## linters, types and notebooks without outputs, as pre-commit looks at them
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) scripts/strip_notebooks.py --check
	$(RUN) -m mypy

format: env  ## let ruff mend what it can, and take the outputs out of notebooks/
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) scripts/strip_notebooks.py

docs: env  ## make the site of docs/, in build/docs
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html"

test-latest:  ## every test with the newest of every dependency, in an environment of their own
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n $(JOBS) --dist worksteal --durations=20

fork: env  ## make it a project of your own: make fork NAME=myproject [EXAMPLES=drop], see docs/fork.md
	$(RUN) scripts/fork.py $(NAME) $(if $(EXAMPLES),$(if $(filter drop,$(EXAMPLES)),--drop-examples,$(error EXAMPLES=$(EXAMPLES): drop leaves them out; without it they stay)))
	$(RUN) -m pip uninstall --quiet --yes ablab
	$(MAKE) env

update: env  ## take in what the template has become since: make update TEMPLATE=ADDRESS [REF=COMMIT]
	$(RUN) scripts/fork.py --update $(or $(TEMPLATE),$(error TEMPLATE=ADDRESS is needed: where the template is, as git fetches it)) $(REF)

clean:  ## remove caches and both environments (runs/ stays)
	rm -rf .venv .venv-latest .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
