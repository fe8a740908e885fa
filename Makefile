# Everything works from a fresh clone: each target makes the virtual environment and the build it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Compile only for the GPUs of this machine; without one, for Hopper.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';' -)
export TORCH_CUDA_ARCH_LIST ?= $(if $(GPUS),$(GPUS),9.0)

# With ccache, an unchanged file compiles in no time. Its folder of compiler names is used rather than
# CXX="ccache c++", which torch takes for a compiler called ccache.
ifneq ($(wildcard /usr/lib/ccache/c++),)
export PATH := /usr/lib/ccache:$(PATH)
export PYTORCH_NVCC ?= ccache nvcc
endif

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.cuh)

.PHONY: help venv build test test-gpu test-newest test-deepspeed lint format demo bench plots notebooks docs clean

help:
	@echo "make demo    set up, build, and fine-tune a small model: plain against liger, with a table and a plot"
	@echo "make test    set up, build, and run the test suite"
	@echo "make bench   set up, build, and measure every operator against its peers"
	@echo "make plots   write docs/performance.md and its pictures from benchmarks/results"
	@echo "make test-newest  test the Hugging Face layer on the newest transformers and TRL"
	@echo "make notebooks  run the notebooks in place, outputs included"
	@echo "make docs    build the documentation's site into build/site, which needs no network"
	@echo "make test-deepspeed  test patched models under DeepSpeed's ZeRO-3"
	@echo "make lint    check formatting and style       make format   mend them"
	@echo "make build   set up and build                 make clean    remove the build"

$(VENV)/installed: requirements-dev.txt requirements-docs.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'liger-ops needs Python 3.10 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@# An NVIDIA GPU without a CUDA toolkit: the compiler comes as wheels, beside torch.
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && ! command -v nvcc >/dev/null; then \
	  $(BIN)/python -m pip install --quiet 'cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.2'; fi
	touch $@

venv: $(VENV)/installed

$(VENV)/built: $(VENV)/installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . --verbose
	touch $@

build: $(VENV)/built

# A process a core, eight at most: each imports torch and transformers. Their threads share the cores, so a thread
# that waits must not spin. With a GPU it is one process: some tests take all of its memory.
PARALLEL := $(if $(GPUS),,-n logical --maxprocesses 8 --dist worksteal)
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PARALLEL)

test: build
	$(PYTEST)

test-gpu: build
	$(PYTEST) -m "gpu or slow"

# The tests of the Hugging Face layer on the newest transformers and TRL. Their virtual environment sees the
# packages of the first one behind its own, so torch is neither downloaded nor built for again.
NEWEST := $(VENV)-newest

test-newest: build
	test -x $(NEWEST)/bin/python || $(BIN)/python -m venv $(NEWEST)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$($(NEWEST)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/zz-behind.pth
	$(NEWEST)/bin/python -m pip install --quiet --upgrade transformers trl peft accelerate
	$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -E '^(torch|transformers|trl|peft|accelerate) '
	PYTHONPATH="$(CURDIR)" $(NEWEST)/bin/python -m pytest tests/models tests/test_compat.py tests/test_run.py \
	  --junit-xml=build/test-newest.xml

# DeepSpeed has a virtual environment of its own: where it is installed, transformers and accelerate import it in
# every process, and now and then a process that has used gloo then aborts as it exits.
DEEPSPEED := $(VENV)-deepspeed

test-deepspeed: build
	test -x $(DEEPSPEED)/bin/python || $(BIN)/python -m venv $(DEEPSPEED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$($(DEEPSPEED)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/zz-behind.pth
	$(DEEPSPEED)/bin/python -m pip install --quiet deepspeed==0.19.8
	PYTHONPATH="$(CURDIR)" $(DEEPSPEED)/bin/python -m pytest tests/distributed/test_deepspeed.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'examples/*.cpp')

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'examples/*.cpp')

demo: build
	$(BIN)/python examples/finetune.py

bench: build
	$(BIN)/python -m liger_ops bench

plots: venv
	$(BIN)/python -m benchmarks.document

notebooks: build
	$(BIN)/python notebooks/make.py

# The warning is about the future of MkDocs, not about these pages.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "to read it: $(BIN)/python -m http.server --directory build/site"

clean:
	rm -rf build dist *.egg-info liger_ops/_C*.so liger_ops/_build_info.json $(VENV)/built
