# Every target sets up what it needs: a virtual environment with the pinned packages, made once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: help run smollm2 smoke reference verify test test-cpus test-kills lint bench bench-merges clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@bash .ci/install $(VENV) $(PYTHON)
	@touch $@

.PHONY: first
first: $(STAMP) ## A first look: one small family trained, merged and scored, in a minute
	$(BIN)/python run.py

run: $(STAMP) ## Five families trained here, every method, three seeds (about 15 minutes cold on two cores)
	$(BIN)/python run.py experiment=tiny

smollm2: $(STAMP) ## The real thing in small: SmolLM2-135M (about 40 minutes cold on two cores)
	$(BIN)/python run.py experiment=smollm2

smoke: $(STAMP) ## The whole path on random tiny models, in minutes
	$(BIN)/python run.py experiment=smoke

reference: $(STAMP) ## Make the results of a finished run the committed ones (EXPERIMENT=tiny)
	$(BIN)/python run.py mode=reference experiment=$(or $(EXPERIMENT),tiny)

verify: $(STAMP) ## Make what the committed manifest names and compare it, artifact by artifact (EXPERIMENT=tiny)
	$(BIN)/python run.py mode=verify experiment=$(or $(EXPERIMENT),tiny)

test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-cpus: $(STAMP) ## Compare digests on this CPU and on emulated Haswell, Skylake and Rome (needs qemu-user; an hour)
	command -v qemu-x86_64 > /dev/null || apt-get install -y qemu-user || { apt-get update && apt-get install -y qemu-user; }
	tests/cpus/compare.sh $(BIN)/python

test-kills: $(STAMP) ## Kill runs at 50 random moments, run them again, and compare all digests (ten minutes on a quiet machine)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills.kills --kills $(or $(KILLS),50)

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP) ## Print each benchmark's ratio to its floor (with SLOW=1 the long ones, an hour)
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -p no:xdist -o addopts= $(if $(SLOW),,-m "not slow")

bench-merges: $(STAMP) ## Merges of ours and of mergekit side by side (135M; SIZE=1.24B takes 25 minutes and 15 GB of disk)
	tests/benchmarks/mergekit.sh .venv-mergekit
	$(BIN)/python -m tests.benchmarks.side_by_side $(or $(SIZE),135M) --mergekit .venv-mergekit/bin/python

clean: ## Remove the environment; the store and the results stay
	rm -rf $(VENV)
