# Each target does all of its own set-up: virtual environment, install, native build.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find kernels edge_runtime/engine/formats -name '*.cpp' -o -name '*.h' -o -name '*.txt' -o -name '*.py' 2>/dev/null)

.PHONY: demo test lint bench gpu-check clean
demo: $(VENV)/.installed
	@$(BIN)/python examples/demo.py

test: $(VENV)/.tested
	@$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder tests

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p edge_runtime
	@if [ -x $(BIN)/clang-format ]; then $(BIN)/clang-format --dry-run --Werror $$(git ls-files 'kernels/**.cpp' 'kernels/**.h' 'kernels/**.cuh'); fi

bench: $(VENV)/.benched
	$(BIN)/python bench/decode_llama_1b.py

# Straight from the checkout, with what is there: WHEELS=folder brings missing packages, ARGS more arguments.
gpu-check:
	@$(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON)) bench/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

# --- set-up ------------------------------------------------------------------------------------------------
$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "make: python 3.10 to 3.13 is needed as '$(PYTHON)' (set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: install python3-venv (apt-get install python3-venv)"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "make: a C++17 compiler is missing (apt-get install g++)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	@echo "make: installing edge-runtime into $(VENV) (builds the native library)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[build,chat,plot,structured]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "make: installing what the tests need (torch, transformers)"
	@$(BIN)/python -m pip install -q torch==2.13.0 -c constraints.txt
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[build,chat,plot,structured,test]'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	@$(BIN)/python -m pip install -q -c constraints.txt ruff mypy types-PyYAML clang-format
	@touch $@

$(VENV)/.benched: $(VENV)/.installed
	@echo "make: building the peer (llama-cpp-python) from source; this takes minutes"
	@$(BIN)/python -m pip install -q -c constraints.txt llama-cpp-python gguf
	@touch $@

clean:
	rm -rf $(VENV) build
