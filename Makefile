# Everything starts from nothing: the first command makes the environment.
PYTHON ?= $(shell tools/python newest)
OLDEST ?= $(shell tools/python oldest)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?=
BASELINE ?= benchmarks/baselines
TOLERANCE ?= 0.5

.PHONY: help demo test check unit oldest wheel docs eval clean

help:  ## Print the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.installed  ## Fetch weights, run every stage on the bundled examples, print mIoU, write a report
	$(BIN)/clipes demo

test: check unit wheel oldest  ## Lint, types, tests on the newest Python here, the wheel and its tests on the oldest; what CI calls

check: $(VENV)/.installed-dev  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed-dev  ## All tests, those on the real CLIP tower included where it can be had
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=clipes --cov-report=term:skip-covered

wheel:  ## Build the wheel, install it alone on the oldest Python here, run the demo from it outside the checkout
	rm -rf dist .venv-oldest .demo && mkdir .demo
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[examples]"
	cd .demo && ../.venv-oldest/bin/clipes demo && test -s runs/examples/report/index.html
	rm -rf .demo

oldest: wheel  ## After the wheel, the quick tests on the oldest Python
	if [ "$(OLDEST)" != "$(PYTHON)" ]; then \
	  .venv-oldest/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' && \
	  { .venv-oldest/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[crf]' \
	    || echo "pydensecrf2 does not build here: its tests will be skipped"; } && \
	  .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not weights" clipes tests/unit tests/golden tests/cli/test_command_line.py; \
	fi
	rm -rf .venv-oldest # 7 GB, made anew each time

docs: .venv-docs/.installed  ## The documentation as a site, in site/; a warning is an error
	@# Not --quiet: that hides warnings from --strict, too.
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

eval: $(VENV)/.installed  ## mIoU of every stage that has output, per class, against its baseline (RUN=folder, default the latest)
	$(BIN)/clipes eval $(RUN) --baseline $(BASELINE) --tolerance $(TOLERANCE)

clean:  ## Remove what make and the tests made, not runs/ and not cached weights
	rm -rf $(VENV) .venv-oldest .venv-docs .demo build dist site .pytest_cache .mypy_cache .ruff_cache .coverage .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet 'pip>=25.1'
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[crf]' \
	  || echo "pydensecrf2 does not build here (it needs a C++ compiler): its tests will be skipped"
	touch $@ $(VENV)/.installed
