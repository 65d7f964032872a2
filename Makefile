# make demo: the main job on the embedded prior.  make test: the tests.  Both make .venv and install once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint format benchmark clean
help:
	@echo "make demo       reconstruct a photograph and synthetic cats from Fourier magnitudes (results/demo)"
	@echo "make test       run the tests"
	@echo "make lint       check style and types        make format    apply the style"
	@echo "make benchmark  where the time goes on this machine"
	@echo "make clean      remove .venv and results/demo"

$(STAMP): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 (set PYTHON=/path/to/python3.11)"; exit 1; }
	@echo "==> installing into $(VENV), once (about 5 GB with PyTorch; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
	@echo "==> installed"

setup: $(STAMP)

demo: $(STAMP)
	@echo "==> phase retrieval on the embedded prior cats64: 3 images, 4 particles each"
	@$(BIN)/python posterior_sample.py
	@echo "==> open results/demo/sheets/00000.png"

test: $(STAMP)
	@echo "==> running the tests"
	@$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

lint: $(STAMP)
	@echo "==> checking style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

benchmark: $(STAMP)
	@$(BIN)/python benchmarks/bench_sampler.py

clean:
	rm -rf $(VENV) results/demo
