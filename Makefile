# make demo: set up and run everything on the embedded default.   make test: set up and run the tests.
#
# CONFIG and RUN choose another configuration and artifact folder: make vstar train CONFIG=my.toml RUN=mine
# ACCELERATOR=cpu|cuda overrides that of .venv, or before set-up this machine's. NPROC=4 trains on four processes.

SHELL := /bin/bash
# For a shell: one word, whatever is in it.
quoted = '$(subst ','\'',$(1))'
PYTHON ?= python3
VENV := .venv
# What it was set up for stays: a node without a GPU may share the environment of those that have one.
ifndef ACCELERATOR
ACCELERATOR := $(shell cat $(VENV)/.accelerator 2>/dev/null)
endif
ifeq ($(ACCELERATOR),)
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
CONFIG ?= configs/demo.toml
ifndef RUN
RUN := $(shell $(PYTHON) -c 'import re, sys, tomllib; run = tomllib.load(open(sys.argv[1], "rb"))["run"]; \
	print(run if re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", run) else "")' $(call quoted,$(CONFIG)) 2>/dev/null)
endif
ifneq ($(findstring ://,$(CONFIG)),)
$(error CONFIG=$(CONFIG): make reads the config itself: give a file of this machine)
endif
NPROC ?= 1
STUDY ?= configs/studies/demo-short.toml
ROUNDS ?= 3
ARGS ?=

BIN := $(VENV)/bin
ARTIFACTS := $(if $(ASTAR_PO_ARTIFACTS),$(ASTAR_PO_ARTIFACTS),artifacts)
# As in common/runs.py. The names of targets have no spaces.
ifneq ($(RUN),)
ifneq ($(shell printf %s $(call quoted,$(RUN)) | LC_ALL=C grep -cxE '[A-Za-z0-9][A-Za-z0-9._-]*'),1)
$(error RUN=$(RUN): a run's name is of letters, digits, ".", "_" and "-", and begins with a letter or digit)
endif
endif
ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): give a folder whose path has no spaces)
endif
FOLDER = $(call quoted,$(ARTIFACTS)/$(or $(RUN),unknown))
# Without a RUN the config is missing or wrong: the command line says what about it.
OPTIONS = --config $(call quoted,$(CONFIG)) $(if $(RUN),--run $(RUN)) $(ARGS)
INSTALLED := $(VENV)/.$(ACCELERATOR)
# The demo's config points at a base model of its own making; other configs bring theirs.
BASE_MODEL := $(if $(shell grep -s '{run}/base_model' -- $(call quoted,$(CONFIG))),yes)
# As in common/processes.py.
LAUNCH = $(if $(filter 1,$(NPROC)),$(BIN)/python,$(BIN)/torchrun --nproc-per-node $(NPROC) --shutdown-timeout 3600 --)
IF_MISSING = [ -e $(FOLDER)/$(1) ] ||
MAKE_BASE_MODEL = $(if $(BASE_MODEL),$(call IF_MISSING,base_model) $(BIN)/python cli.py base-model $(OPTIONS))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-direct-advantage test check browser setup setup-stage1 setup-ray setup-s3 base-model vstar segments critic advantages train rounds evaluate report compare lock clean

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-21s %s\n' "$$name" "$$text"; done
	@echo; sed -n '3,4s/^# /  /p' Makefile

demo: setup ## Set up, then base model → vstar → train → evaluate → report on the embedded default
	@$(BIN)/python cli.py run --nproc $(NPROC) $(OPTIONS)

demo-direct-advantage: ## The same with the step-level method: base model → segments → critic → advantages → train → …
	@$(MAKE) --no-print-directory demo CONFIG=configs/demo-direct-advantage.toml

test: $(INSTALLED)-dev ## Set up, then run the tests (ARGS="-k name" for some of them)
	@$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)-dev ## Lint and type-check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Without it the tests of the report's page say why they are skipped.
browser: ## Install Chromium for the tests of the report's page, where that takes no more than apt-get and root
	@if command -v chromium chromium-browser google-chrome >/dev/null; then \
		echo "nothing to do: there is a browser"; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "no browser: that takes root and apt-get here; the tests of the report's page will be skipped"; \
	elif apt-get update -qq && ! apt-cache show chromium >/dev/null 2>&1; then \
		echo "no browser: apt-get knows no chromium; the tests of the report's page will be skipped"; \
	else \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			-o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 chromium >/dev/null && chromium --version; \
	fi

setup: $(INSTALLED)-train ## Install everything that both stages need into .venv

setup-stage1: $(INSTALLED)-stage1 ## Install what stage 1 and the offline commands need (no deepspeed)

setup-ray: $(INSTALLED)-stage1 ## Install Ray besides, for --executor ray
	@$(BIN)/pip install -q --no-deps -r requirements/ray.txt

setup-s3: $(INSTALLED)-stage1 ## Install s3fs besides, for artifacts at s3://
	@$(BIN)/pip install -q --no-deps -r requirements/s3.txt

base-model: $(INSTALLED)-stage1 ## Pre-train the demo's reference model
	@$(call IF_MISSING,base_model) $(BIN)/python cli.py base-model $(OPTIONS)

vstar: $(INSTALLED)-stage1 ## Stage 1: sample, grade, estimate V̂*; continues where it stopped
	@$(MAKE_BASE_MODEL)
	@$(BIN)/python cli.py vstar $(OPTIONS)

segments: $(INSTALLED)-stage1 ## Solutions cut into steps, and values of their states (direct_advantage)
	@$(MAKE_BASE_MODEL)
	@$(BIN)/python cli.py segments $(OPTIONS)

critic: $(INSTALLED)-train ## The critic of states (direct_advantage)
	@$(LAUNCH) cli.py critic $(OPTIONS)

advantages: $(INSTALLED)-train ## The advantages of next steps (direct_advantage)
	@$(BIN)/python cli.py advantages $(OPTIONS)

train: $(INSTALLED)-train ## Stage 2: train, after stage 1 where the objective needs it; continues where it stopped
	@$(MAKE_BASE_MODEL)
	@set -e; for step in $$($(BIN)/python cli.py needs-stage1 --missing $(OPTIONS) 2>/dev/null); do \
		$(MAKE) --no-print-directory $$step; \
	done
	@$(LAUNCH) cli.py train $(OPTIONS)

rounds: $(INSTALLED)-train ## Train in ROUNDS rounds: each trained model is the next one's reference; continues where it stopped
	@$(BIN)/python cli.py rounds --rounds $(ROUNDS) --nproc $(NPROC) $(OPTIONS)

evaluate: $(INSTALLED)-train ## Evaluate the reference and the trained model on held-out prompts
	@$(BIN)/python cli.py evaluate $(OPTIONS)

report: $(INSTALLED)-stage1 ## One page of a run, with what it has so far
	@$(BIN)/python cli.py report $(if $(RUN),--run $(RUN))

compare: $(INSTALLED)-train ## Compare methods over seeds (STUDY=configs/studies/…); the short study takes about nine minutes
	@$(BIN)/python cli.py compare $(call quoted,$(STUDY)) $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed, $$($(PYTHON) --version) found; set PYTHON=…" >&2; exit 2; }
	@echo "setting up $(VENV) for $(ACCELERATOR)"
	@$(PYTHON) -m venv $(VENV)

# PyPI has no CPU build of torch: pip finds one where it was told to look (PIP_FIND_LINKS), else uv knows PyTorch's index.
$(INSTALLED)-stage1: requirements/$(ACCELERATOR)-stage1.txt | $(BIN)/python
	@rm -f $(VENV)/.cpu-* $(VENV)/.cuda-*; echo $(ACCELERATOR) > $(VENV)/.accelerator
	@set -e; torch=$$(grep '^torch==' $<); \
	if [ $(ACCELERATOR) = cpu ] && ! $(BIN)/pip install -q --no-deps "$$torch" 2>/dev/null; then \
		$(BIN)/pip install -q uv; \
		$(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu --no-deps "$${torch%+cpu}"; \
	fi
	@$(BIN)/pip install -q --no-deps -r $<
	@touch $@

$(INSTALLED)-train: requirements/$(ACCELERATOR)-train.txt $(INSTALLED)-stage1
	@$(BIN)/pip install -q --no-deps -r $<
	@touch $@

$(INSTALLED)-dev: requirements/$(ACCELERATOR)-dev.txt $(INSTALLED)-train
	@$(BIN)/pip install -q --no-deps -r $<
	@touch $@

lock: $(INSTALLED)-stage1 ## Pin the requirements anew
	@$(BIN)/pip install -q uv && PATH="$(BIN):$$PATH" requirements/lock.sh

clean: ## Remove a run's artifacts (RUN=…)
	$(if $(RUN),,$(error RUN is empty: name the run to remove, make clean RUN=...))$(if $(findstring ://,$(ARTIFACTS)),$(error \
		$(ARTIFACTS)/$(RUN) is in an object store: remove it there))rm -rf -- $(FOLDER)
