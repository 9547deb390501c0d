# Two commands on a fresh machine, set-up included:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test bench lab lint setup
demo: $(READY)  ## PPO against T-PPO on a built-in task, about 6 minutes on 2 cores; figures in runs/demo
	$(BIN)/python -m tppo_ref compare --config tppo_ref/configs/demo.yaml

test: $(READY) lint  ## everything that runs on a CPU; sim/, notebooks/ and scale/ will join
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check tppo_ref tests benchmarks
	$(BIN)/ruff format --check tppo_ref tests benchmarks
	$(BIN)/mypy

bench: $(READY)  ## speed, as ratios within one run; results go to benchmarks/results
	$(BIN)/python -m benchmarks

lab: $(READY)  ## the tutorials, in JupyterLab
	$(BIN)/jupyter lab notebooks

setup: $(READY)
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)
