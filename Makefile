# The first use of a target that needs it makes a virtual environment in .venv and installs the package there.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install train test test-all coverage same-bits bench gpu-check chaos crash-points fuzz slurm-test package docs docs-check lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

install: .venv/installed  ## make .venv and install the package into it

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
	    { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

train: .venv/installed  ## train both models on real data, draw from the GAN, and write the report (minutes)
	$(BIN)/python launch/fetch_data.py
	@config=$$($(BIN)/python -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")') && set -ex && \
	    $(BIN)/accelerate launch --config_file accelerate_configs/$$config.yaml launch/gan.py --run-dir runs/gan && \
	    $(BIN)/accelerate launch --config_file accelerate_configs/$$config.yaml launch/lstm.py --run-dir runs/lstm
	$(BIN)/python launch/sample.py grid runs/gan --out runs/grid.png
	$(BIN)/python launch/sample.py interpolate runs/gan --start-digit 4 --end-digit 1 \
	    --out runs/strip.png --gif runs/walk.gif
	$(BIN)/python launch/report.py runs/gan runs/lstm --out runs/report.html
	@echo
	@echo "The LSTM's last word: $$(tail -n 1 runs/lstm/metrics.jsonl)"
	@echo "To look at:"
	@echo "  runs/report.html the page of both runs: curves, films, what was run"
	@echo "  runs/grid.png    digits that the GAN made"
	@echo "  runs/strip.png   from a 4 to a 1; as a film: runs/walk.gif"
	@echo "  runs/gan/samples how they came about, step by step"

test: .venv/installed  ## what a change is checked with (5 to 8.5 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-all: .venv/installed  ## everything (about half an hour on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

coverage: .venv/installed  ## everything once more, and which lines of the package it reaches
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal -m "not gpu"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under 96

same-bits: .venv/installed  ## every task on 1 to 8 processes, killed and not: the same bits (25 to 40 minutes on 2 cores)
	$(BIN)/python tests/same_bits.py

bench: .venv/installed  ## speed, against what users would write (a quarter of an hour on 2 cores)
	$(BIN)/python launch/fetch_data.py
	$(BIN)/python benchmarks/speed.py

gpu-check: .venv/installed  ## what only a GPU can show (four groups; ARGS="--group 1"; ARGS=--pretend: on a CPU, small)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

chaos: .venv/installed  ## 200 kills at random moments, every end compared bit for bit (under 25 minutes on 2 cores)
	$(BIN)/python tests/chaos.py

crash-points: .venv/installed  ## fail at every file operation of a run, and compare its end (12 to 17 minutes on 2 cores)
	$(BIN)/python tests/crash_points --jobs 2 --out benchmarks/results/crash_points.json

fuzz: .venv/installed  ## damage run folders in 10 000 ways, and read them (about 25 minutes on 2 cores)
	$(BIN)/python tests/fuzz.py --jobs 2

slurm-test: .venv/installed  ## jobs, faults and requeues on a real Slurm on this machine (root; 20 to 30 minutes; ARGS=--store)
	$(BIN)/python -m pytest -v tests/slurm $(ARGS)

package: .venv/installed  ## build the wheel, and run it in an environment of its own (PYTHON=... for another Python)
	rm -rf build
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet build/dist/*.whl
	cd build && venv/bin/python -m cs324dist.launch.gan --preset smoke --dataset fake --wandb disabled --run-dir run
	cd build && venv/bin/python -m cs324dist.launch.sample grid run --out grid.png
	tests/outside_checkout.sh build/venv/bin
	rm -rf build/venv build/run  # gigabytes, where torch brings CUDA

docs: .venv/installed  ## build the site of docs/ in build/site, and check its links (REPOSITORY_URL=...: sources are linked)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

docs-check: .venv/installed  ## run the commands of README.md and docs/ (minutes; PAGES=README.md: of one page)
	$(BIN)/python docs/check.py $(PAGES)

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and what tools leave behind; runs and data stay
	rm -rf .venv build .coverage* ./*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
