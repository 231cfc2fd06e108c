# llmpipe. `make demo` and `make test` set up what they need.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS ?= dev
# The tested CPU build of torch is what constraints.txt names. On a GPU machine: make setup EXTRAS=dev,gpu
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export USE_HUB_KERNELS ?= NO
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo smoke arithmetic dpo-variants rounds test test-fast check clean help

help:           ## the targets
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(VENV)/.ready  ## a virtual environment with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): set PYTHON=python3.12, or install it"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the tested versions into $(VENV) (once, a few minutes)"
	@$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

demo: setup     ## raw text → tokenizer → base model → sft → reward → ppo, dpo → eval, about 10 minutes on two cores
	@$(BIN)/llmpipe run demo

smoke: setup    ## the same graph, tiny, in under a minute
	@$(BIN)/llmpipe run smoke

arithmetic: setup  ## sums by ppo and grpo with a reward that is computed
	@$(BIN)/llmpipe run arithmetic

dpo-variants: setup  ## four losses of dpo from one sft model, three seeds each
	@$(BIN)/llmpipe run dpo-variants

rounds: setup   ## after demo: three rounds of best-of-4 and dpo beside one offline dpo
	@$(BIN)/llmpipe run rounds

test: setup     ## the whole test suite
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: setup  ## its quick part, under two minutes
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check: setup    ## ruff, mypy strict, import directions
	@$(BIN)/ruff check src stages tests benchmarks
	@$(BIN)/ruff format --check src stages tests benchmarks
	@$(BIN)/mypy
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_imports.py

clean:          ## caches, not artifacts
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist
