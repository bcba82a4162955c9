# make demo   set up .venv, then quantize a tiny trained model on the CPU, verify the result, evaluate it, say how to serve it
# make test   set up .venv, then run all tests, in two halves beside each other
# make test-fast   set up .venv, then run only those that start no process and no whole run
# make lint   set up .venv, then ruff (lint and format) and mypy
# make clean  remove .venv and everything built
#
# MODEL=models/tiny   the checkpoint of the demo: this one, or any other small one, such as `dsv4q toy --for-vllm` makes
# PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
# PIP_ARGS=...        extra options for every `pip install`, for example an index with CPU-only torch

MODEL := models/tiny
PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
DEMO := build/demo

.PHONY: help demo test test-fast lint clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# torch comes first and alone: it is the one package whose build (CPU or CUDA, gigabytes apart) depends on where pip
# looks, so it is seen, or fails, by itself. The second call keeps the build that is there.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dsv4q needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Name a newer one: make PYTHON=python3.12 ...")'
	@$(BIN)/python -c 'import pip, sys; assert sys.version_info >= (3, 11)' 2>/dev/null || "$(PYTHON)" -m venv --clear .venv
	@echo "installing dsv4q and what it needs into .venv (minutes the first time)" >&2
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@rm -rf $(DEMO)
	@mkdir -p $(DEMO)
	$(BIN)/dsv4q plan $(MODEL) --config toy
	$(BIN)/dsv4q quantize $(MODEL) $(DEMO)/artifact --config toy --device cpu
	$(BIN)/dsv4q verify-shards $(DEMO)/artifact --source $(MODEL) --deep
	$(BIN)/dsv4q eval $(DEMO)/artifact --reference $(MODEL) --samples 16 --device cpu --save
	$(BIN)/dsv4q report $(DEMO)/artifact
	$(BIN)/dsv4q compat $(DEMO)/artifact

# Two processes for two cores: the halves are those of tests/slow.py. What the second one said comes last.
test: $(STAMP)
	@mkdir -p build
	@$(BIN)/python -m pytest -m second_half >build/test-second-half.txt 2>&1 & second=$$!; \
	$(BIN)/python -m pytest -m "not second_half"; first=$$?; \
	wait $$second; code=$$?; cat build/test-second-half.txt; exit $$((first | code))

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/dsv4q.egg-info
