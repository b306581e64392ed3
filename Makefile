# The one command set, for a laptop and for CI. `make help` lists it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
CHECKOV := .venv-checkov
TOOLS ?= $(VENV)
PROTOS := $(wildcard protos/v1/*.proto)
STUBS := $(PROTOS:.proto=_pb2.py)
CONFIG ?= deploy/config/laptop.yaml
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm proto serve serve-vllm test test-vllm test-deploy deploy-tools soak check generated bench clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed $(STUBS) ## Make the virtual environment and generate the gRPC code; quick when nothing changed

setup-vllm: $(VLLM)/.installed ## The same with vLLM for CPUs, in an environment of its own (.venv-vllm)
	@$(MAKE) --no-print-directory proto TOOLS=$(VLLM)

proto: $(STUBS) ## Generate the gRPC code from protos/v1/*.proto

serve: setup ## Run a whole cluster on this machine (CONFIG=a.yaml ARGS="--set a.b=c")
	$(BIN)/headwater serve --config $(CONFIG) $(ARGS)

serve-vllm: setup-vllm ## Run a cluster whose engines are vLLM's, on the CPU
	$(VLLM)/bin/headwater serve --config deploy/config/laptop-vllm.yaml $(ARGS)

test: setup ## Run the tests, without the long ones
	$(BIN)/pytest -m "not slow" --ignore tests/deploy $(ARGS)

test-vllm: setup-vllm ## Run the tests of the vLLM engine
	$(VLLM)/bin/pytest tests/vllm $(ARGS)

test-deploy: setup $(CHECKOV)/.installed deploy-tools ## Run the tests of what deploys and watches a cluster
	$(BIN)/pytest tests/deploy $(ARGS)

deploy-tools:
	@for tool in promtool prometheus chromium; do command -v $$tool >/dev/null || { echo "$$tool is not on the PATH: 'make test-deploy' needs it; on Debian: apt-get install --no-install-recommends prometheus chromium"; exit 2; }; done

soak: setup ## Run the long tests
	$(BIN)/pytest -m slow $(ARGS)

check: setup node_modules/.installed ## Check format, lint, types, import directions, protos and the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	node_modules/.bin/buf lint
	$(BIN)/hadolint deploy/docker/Dockerfile

generated: setup ## Write anew what is generated and kept: the chart's schema, the plain manifests, the dashboards
	$(BIN)/python -m cluster.kubernetes.values_schema
	$(BIN)/python -m cluster.kubernetes.examples
	$(BIN)/python -m cluster.dashboards

bench: setup ## Measure a cluster that `make serve` runs in another terminal
	$(BIN)/python -m benchmarks.serve $(ARGS)

clean: ## Remove everything that the other commands made
	rm -rf $(VENV) $(VLLM) $(CHECKOV) node_modules build .headwater *.egg-info .*_cache .hypothesis .import_linter_cache
	rm -f protos/v1/*_pb2*.py protos/v1/*_pb2*.pyi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that pip may take the CPU build where its configuration offers one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH: install Python 3.11, or name another with 'make $(MAKECMDGOALS) PYTHON=/path/to/python' (3.11 or 3.12)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Every package is named, so that nothing is resolved and nothing drawn in: torchvision, torchaudio and torchcodec, which vLLM
# asks for, have no CPU build for this torch on every index, and another build of them breaks it.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH: install Python 3.11, or name another with 'make $(MAKECMDGOALS) PYTHON=/path/to/python' (3.11 or 3.12)"; exit 2; }
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch==2.13.0+cpu || { echo "vLLM needs the CPU build of torch: give pip an index that has it (PIP_EXTRA_INDEX_URL)"; exit 2; }
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(CHECKOV)/.installed: deploy/checkov.txt
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r deploy/checkov.txt
	@touch $@

protos/v1/%_pb2.py: protos/v1/%.proto $(TOOLS)/.installed
	PATH="$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $<
	@touch $@

node_modules/.installed: package.json package-lock.json
	@command -v npm >/dev/null || { echo "npm is not on the PATH: install Node.js 18 or later; 'make check' lints the protos with buf"; exit 2; }
	npm install --no-save --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
