# Everything runs in one environment, .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.vlm-attn-installed
EXTRAS := eval,demo,clip,dev
OLDEST := $(VENV)/oldest
OLDEST_TRANSFORMERS ?= 5.17.0
CONFIG ?= eval_configs/quickstart.yaml
# Two worker processes with one thread each: the fastest split on two cores.
PYTEST_ARGS ?= -n 2 --dist loadfile
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False

.PHONY: help install install-oldest quickstart test test-browser test-matrix test-oldest test-gpu style quality docs bench demo
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  install, run $(CONFIG), print the table and where the report lies"
	@echo "make test        the whole test suite on the CPU, without network; the demo page in chromium at its end"
	@echo "make test-browser  the visit of the demo page alone"
	@echo "make test-matrix every method on every model family and backend; rewrites docs/support.md"
	@echo "make test-oldest the family tests with the oldest supported transformers"
	@echo "make test-gpu    the tests that need a CUDA device"
	@echo "make style       sort imports, fix and format the code"
	@echo "make quality     lint, format and type checks; changes nothing"
	@echo "make docs        write docs/reference.md from the installed methods and families, check links"
	@echo "make bench       speed of the methods against the stock model"
	@echo "make demo        the demo page on http://127.0.0.1:7860"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vlm-attn needs Python 3.11 or newer; $(PYTHON) is" `$(PYTHON) -V` "- try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

install: $(STAMP)

# One thread: the model is small, and threads that wait for each other on a busy machine cost twenty times the work.
quickstart: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/vlm-attn eval $(CONFIG)

# The visit of the demo page comes last and alone: a browser beside two busy workers only waits for them.
test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not hub and not browser" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-browser

test-browser: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/test_demo_browser.py

test-matrix: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m vlm_attn.families.matrix

# The oldest transformers in a folder of its own in front of the environment: everything else stays as installed.
$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(OLDEST) \
		transformers==$(OLDEST_TRANSFORMERS) "huggingface_hub<2"
	@touch $@

install-oldest: $(OLDEST)/.installed

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) \
		tests/test_families.py tests/test_truth_families.py tests/test_identity.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/build.py

bench: $(STAMP)
	$(BIN)/vlm-attn bench

demo: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/vlm-attn demo
