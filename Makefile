# Everything that a developer runs. A fresh machine needs Python 3.11 or newer and make, nothing else:
# what a target needs is installed into .venv (the demo's, smaller, into .venv-demo; other libraries that the integrations
# are for, into .venv-integrations) the first time.

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
EXPLORE_ARGS ?=
TORTURE_ARGS ?=
DEMO_ARGS ?=
FUZZ_INPUTS ?= 100000
FUZZ_ARGS ?=
# Where pip looks as well, such as PyTorch's index of CPU-only builds (PyPI's build for Linux brings CUDA along).
TORCH_INDEX ?=

VENV := .venv
DEMO_VENV := .venv-demo
INTEGRATIONS_VENV := .venv-integrations
BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt \
              $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-integrations examples check docs format bench explore torture fuzz screenshots coverage clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-24s %s\n' "$$target" "$$text"; done

venv: $(VENV)/.installed  ## make .venv with the package and all that development needs

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing ckptstore and its development tools into $(VENV); the first time this takes some minutes."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

# Where .venv stands already, it does for the demo too: it holds more.
DEMO_STAMP := $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(DEMO_VENV)/.installed)

$(DEMO_VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing ckptstore and its trainer into $(DEMO_VENV); most of the download is PyTorch."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(DEMO_VENV)/bin/python || $(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python $(PIP_INSTALL) -e '.[trainer]'
	@touch $@

demo: $(DEMO_STAMP)  ## train, kill in the middle of a save, resume, prove that nothing was lost (2 minutes)
	@$(dir $<)bin/python -m trainer.demo $(DEMO_ARGS)

test: venv  ## run the tests (PYTEST_ARGS='-k restore', JOBS=4)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

$(INTEGRATIONS_VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing ckptstore and the libraries that it integrates with into $(INTEGRATIONS_VENV)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(INTEGRATIONS_VENV)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS_VENV)
	@$(INTEGRATIONS_VENV)/bin/python $(PIP_INSTALL) -e '.[test-integrations]'
	@if command -v npm > /dev/null; then npm install --silent --no-fund --no-audit --prefix $(INTEGRATIONS_VENV)/azurite azurite@3; \
	else echo "There is no npm to install Azurite with: the tests on Azure will be skipped."; fi
	@touch $@

examples:  ## run each example in an empty environment with its extra, killed halfway and started again (10 minutes)
	@$(PYTHON) examples/from_empty.py

# Whatever else tests/docs has, its pages on these libraries run here alone.
test-integrations: $(INTEGRATIONS_VENV)/.installed  ## run the tests with Lightning, Transformers, Accelerate, Keras, TensorFlow, Azurite
	@$(INTEGRATIONS_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/integrations_frameworks \
		tests/docs/test_documents.py -k 'integrations_frameworks or lightning or transformers or accelerate or keras' $(PYTEST_ARGS)

check: venv  ## formatting, lint, types, imports between modules, code in the documents
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q tests/docs

# Warnings are errors. What has gone from the documents must not stay in the site, so it is made anew each time.
docs: venv  ## make the site of the documents in build/docs, and check it
	@rm -rf build/docs
	@$(BIN)/python -m sphinx -b html -W --keep-going --quiet -c docs/_sphinx docs build/docs
	@$(BIN)/python -m pytest -q docs/_sphinx/check_site.py
	@echo "The site is in build/docs/index.html."

format: venv  ## format the code and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: venv  ## run the benchmarks (BENCH_ARGS=...)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

explore: venv  ## walk every interleaving of saves, deletes and collections (some minutes, some GB of memory)
	@$(BIN)/python -m tests.explorer $(EXPLORE_ARGS)

torture: venv  ## kill, stop and stress processes that share a store, on a disk and on S3 (20 minutes)
	@$(BIN)/python -m tests.torture $(TORTURE_ARGS)

fuzz: venv  ## read hostile stores (FUZZ_INPUTS=100000, FUZZ_ARGS='--seed 2 --kind store')
	@$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS) $(FUZZ_ARGS)

screenshots: venv  ## make the pictures in docs/images anew, by the tests that look at the report in a browser
	@mkdir -p docs/images
	@CKPTSTORE_SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/browser -k 'light_or_dark or seen_first or phone'

coverage: venv  ## run the tests and show which lines none of them reaches
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --show-missing

clean:  ## remove what was built, installed and cached here
	@rm -rf $(VENV) $(DEMO_VENV) $(INTEGRATIONS_VENV) demo-ckpts fuzz-escapes build docs/generated dist htmlcov .coverage .coverage.* \
		.hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
