# Every target makes what it needs first, and only what is missing.
#   make PYTHON=/path/to/python3   another Python than the one on PATH, 3.11 to 3.13 for the train environment
#   make PIP_ARGS=--extra-index-url=URL   options for pip, e.g. an index with CPU builds of torch: those are 20 times smaller
#   make test RINGS="light train" ARGS="-k plan"    some test rings only; options for pytest
PYTHON ?= python3
export PYTHON PIP_ARGS RINGS ARGS
# with the last one set, each of many processes would compile anew what it imports
unexport HPC_CONFIG HPC_SITE HPC_RUNS PYTHONDONTWRITEBYTECODE
BIN := .venvs/hpc/bin
NEED = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, $(1)) and \
    "error: $(PYTHON) is Python %d.%d, needed is 3.$(1) or newer: make PYTHON=/path/to/python3" % v)'

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: setup train-env  ## data -> a fine-tuned model, on this machine's CPU, in minutes
	@$(BIN)/python demo/fetch.py
	@cd demo && ../$(BIN)/hpc submit pipeline --site local --wait
	@$(BIN)/python demo/summary.py

test: setup  ## every test; as root those with a real Slurm and Apptainer too
	@tools/test.sh

lint: setup  ## style, types, shell scripts, and whether docs/ is up to date
	@tools/lint.sh

bench: setup train-env serve-env  ## the benchmarks, into docs/benchmarks.md; ARGS names some
	@$(BIN)/python bench/run.py $(ARGS)

docs: setup  ## write docs/cli.md anew, check the links
	@$(BIN)/python tools/docs.py

setup:  ## .venvs/hpc: hpc from this checkout, and the tools of its development
	@$(call NEED,10)
	@$(PYTHON) tools/venv.py .venvs/hpc requirements-dev.txt --editable .

train-env:  ## .venvs/train: torch, transformers, trl, peft
	@$(call NEED,11)
	@$(PYTHON) tools/venv.py .venvs/train containers/train.requirements.txt tests/requirements-train.txt

serve-env:  ## .venvs/serve: Triton, onnxruntime-genai and its builder, without containers; Python 3.11 or 3.12
	@$(call NEED,11)
	@$(PYTHON) tools/venv.py .venvs/serve containers/serve-cpu.requirements.txt

clean:  ## forget the environments, caches and the demo's runs; its model and data stay
	rm -rf .venvs .mypy_cache .ruff_cache .pytest_cache build dist demo/runs

.PHONY: help demo test lint bench docs setup train-env serve-env clean
