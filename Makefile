# The few commands people type. `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds torch without CUDA; tried first on machines without an NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0

.PHONY: demo compare test check format protos bench clean

demo: $(VENV)/.local ## Train the demo end to end: tiny models, embedded server, no download of weights
	$(BIN)/jackpot demo

compare: $(VENV)/.local ## On-policy, none, tis and jackpot on the same seed, in one picture
	$(BIN)/jackpot demo --compare

test: $(VENV)/.dev ## Every test that runs without a GPU
	$(BIN)/pytest

check: $(VENV)/.dev ## Format, lint, types, layers, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && BUF_CACHE_DIR=$$(mktemp -d) ../$(BIN)/buf lint

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.dev ## Regenerate the committed gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services --grpc_python_out=services protos/jackpot/v1/*.proto

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Jackpot needs CPython 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# Without an NVIDIA GPU the CPU build of torch spares several GB; pip's own configuration is the fallback.
$(VENV)/.torch: $(VENV)/.python
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install $(TORCH); \
	else $(BIN)/pip install --retries 0 --timeout 10 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null || $(BIN)/pip install $(TORCH); fi
	touch $@

$(VENV)/.local: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -e '.[local]'
	touch $@

$(VENV)/.dev: $(VENV)/.local pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist
