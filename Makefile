# A fresh machine needs Python 3.11 or later, make, git and g++ (pdqhash compiles). `make demo` does the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# The CPU build of torch unless there is an NVIDIA GPU; `make demo TORCH_INDEX=` takes the package index's own build.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

.PHONY: demo test check measure gpu-kit fix install clean

demo: install  ## audit a checkpoint of the embedded model; exit code 10 (matches found) is what it should end with
	$(BIN)/lora-audit demo; code=$$?; [ $$code -eq 10 ] || { echo "expected matches (exit code 10), got $$code"; exit 1; }

test: install  ## the tests
	$(BIN)/python -m pytest

check: install  ## lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

measure: install  ## the quick form of the extraction benchmark; fails where model guidance is behind CFG
	$(BIN)/python -m benchmarks.extraction --quick

gpu-kit:  ## .gpu/, what a rented GPU machine without a network needs (docs/performance.md); wants a Python 3.12
	bash benchmarks/gpu/kit.sh

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
