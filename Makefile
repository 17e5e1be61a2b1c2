# The compendium's commands. `make` alone lists them.
#
# Variables: PROFILE  demo (default), cpu or gpu
#            PYTHON   the Python (>= 3.11) from which the environment is made; default python3
#            VENV     where the environment is; default .venv
#            STAMP=   (empty) use VENV as it is and install nothing, e.g. `make STAMP= VENV=$$CONDA_PREFIX test` in a conda environment

PROFILE ?= demo
PYTHON  ?= python3
VENV    ?= .venv
STAMP   ?= $(VENV)/.complete
PY      := "$(VENV)/bin/python"
PLAN    := $(PY) -m l2rec.training.plan
WARM    := $(PY) -m l2rec.training.warm
HOUSE   := $(PY) .ci/notebooks.py
PIP     := -m pip install --quiet --disable-pip-version-check

# Memory that a step frees is kept for the next one. Otherwise the C library gives every large tensor back to the system and has it
# filled with zeros again, page by page, in each step. Read by glibc alone, once, when a process starts.
export MALLOC_MMAP_THRESHOLD_ ?= 2000000000
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000

# And it takes memory in pages of 2 MB where the system has them, so that what does come anew comes in one piece, not in 512.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help env reproduce test lab plan readme export notebooks check docs bench-env clean
.SUFFIXES:

help: ## this list
	@echo "make <target> [PROFILE=demo|cpu|gpu]"
	@sed -n 's/^\([a-z][a-z%<>-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | sed 's/%/<name>/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

# --- the environment ------------------------------------------------------------------------------------------------
# The stamp is written last: an environment without it was interrupted half-way and is made anew. One that is complete but older
# than the lock is brought up to date.

env: $(STAMP) ## the environment in .venv, with the exact versions of requirements.lock

$(VENV)/.complete: requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python >= 3.11 is needed; name one: make PYTHON=python3.11 ...' >&2; exit 1; }
	@[ -e "$@" ] || { echo 'making the environment in $(VENV)'; "$(PYTHON)" -m venv --clear "$(VENV)"; }
	@echo 'installing torch (the largest part)'
	@$(PY) $(PIP) torch==2.13.0
	@echo 'installing the rest of requirements.lock'
	@$(PY) $(PIP) -r requirements.lock
	@$(PY) $(PIP) -e . --no-deps
	@$(PY) -m ipykernel install --sys-prefix --name python3 --display-name python3 > /dev/null
	@touch "$@"

bench-env: .venv-bench/.complete ## RecTools in .venv-bench, for the comparison of speed only

.venv-bench/.complete: Makefile
	@[ -e "$@" ] || "$(PYTHON)" -m venv --clear .venv-bench
	@.venv-bench/bin/python $(PIP) torch==2.13.0
	@.venv-bench/bin/python $(PIP) 'rectools[torch]==0.19.0' torch==2.13.0
	@touch "$@"

# --- results ----------------------------------------------------------------------------------------------------------
# `plan make` looks what is stale and writes .make/<profile>.mk, one target a run; a second make carries it out. The `+` lets both happen
# under `make -n` too, which then lists exactly the stale runs. -j N: each run gets (cores / N) threads. Beside the second make stands a warm
# interpreter, which has imported torch and its like once; every run is a fork of it (nbs/training/12_warm.ipynb).

define carry_out
+@if [ -x $(PY) ]; then $(PLAN) make --profile $(PROFILE) $(2) && \
  exec $(WARM) serve $(MAKE) --no-print-directory -f .make/$(PROFILE).mk PLAN='$(WARM) start l2rec.training.plan' $(1); \
  else echo 'no environment in $(VENV) yet: what is stale can be told once it is made'; fi
endef

reproduce: $(STAMP) ## everything of a profile: runs, tables, figures
	$(call carry_out,all)

table-%: $(STAMP) ## one table, with the runs that it needs
	$(call carry_out,$@,--want $@)

figure-%: $(STAMP) ## one figure, with the runs that it needs
	$(call carry_out,$@,--want $@)

plan: $(STAMP) ## every run of a profile, and why it is stale
	@$(PLAN) list --profile $(PROFILE)

data-%: $(STAMP) ## fetch and check one dataset
	@$(PY) -c 'import sys; from l2rec.data.load import load_dataset; d = load_dataset(sys.argv[1]); print(f"{d.name}: {d.n_users:,} users, {d.n_items:,} items, {d.n_interactions:,} interactions, in {d.folder or "memory"}")' $*

# --- notebooks, library, documentation --------------------------------------------------------------------------------

lab: $(STAMP) ## JupyterLab on the notebooks
	@$(PY) -m jupyterlab nbs

export: $(STAMP) ## the notebooks' exported cells -> l2rec/
	@$(HOUSE) export

notebooks: $(STAMP) ## execute every library notebook again and save its outputs
	@$(HOUSE) execute

readme: $(STAMP) ## nbs/index.ipynb -> README.md
	@$(HOUSE) readme

docs: $(STAMP) ## HTML pages in _docs (by quarto where it is installed)
	@$(HOUSE) docs

# --- checks -----------------------------------------------------------------------------------------------------------

test: $(STAMP) ## the whole test suite: library notebooks, one real training run, pytest
	@echo 'library notebooks'
	@OMP_NUM_THREADS=1 $(HOUSE) test
	@echo 'one experiment, trained for real'
	@set -e; there=$$(mktemp -d); trap 'rm -rf "$$there"' EXIT; \
	  $(PLAN) run --profile demo --results "$$there" --without-needs retrieval/synthetic/sasrec/seed-0
	@echo 'pytest'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

check: $(STAMP) ## library in sync with the notebooks, notebooks clean and with outputs, README in sync
	@$(HOUSE) check

clean: ## forget unfinished work and what can be made again; results and environments stay
	rm -rf .make .work _docs _proc build .pytest_cache
	find results -depth -name '.partial-*' -exec rm -rf {} + 2> /dev/null || true
	find l2rec tests .ci -name __pycache__ -exec rm -rf {} + 2> /dev/null || true
