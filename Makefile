# Everything starts from nothing: the first command makes the environment.
PYTHON ?= $(shell tools/python newest)
OLDEST ?= $(shell tools/python oldest)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?=
BASELINE ?= benchmarks/baselines
TOLERANCE ?= 0.5

.PHONY: help demo test check unit oldest wheel eval clean

help:  ## Print the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.installed  ## Fetch weights, run every stage on the bundled examples, print mIoU, write a report
	$(BIN)/clipes demo

test: check unit oldest wheel  ## Lint, types, tests on the newest and the oldest Python here, and from a wheel; what CI calls

check: $(VENV)/.installed-dev  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed-dev  ## All tests, those on the real CLIP tower included where it can be had
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=clipes --cov-report=term:skip-covered

oldest:  ## The tests again on the oldest supported Python here, but for the slow ones
	if [ "$(OLDEST)" != "$(PYTHON)" ]; then \
	  $(MAKE) PYTHON=$(OLDEST) VENV=.venv-oldest .venv-oldest/.installed-dev && \
	  .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not weights"; \
	fi

wheel:  ## Build the wheel, install it alone, run the demo from it outside the checkout
	rm -rf dist .venv-wheel .demo && mkdir .demo
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[examples]"
	cd .demo && ../.venv-wheel/bin/clipes demo && test -s runs/examples/report/index.html
	rm -rf .venv-wheel .demo

eval: $(VENV)/.installed  ## mIoU of every stage that has output, per class, against its baseline (RUN=folder, default the latest)
	$(BIN)/clipes eval $(RUN) --baseline $(BASELINE) --tolerance $(TOLERANCE)

clean:  ## Remove what make and the tests made, not runs/ and not cached weights
	rm -rf $(VENV) .venv-oldest .venv-wheel .demo build dist .pytest_cache .mypy_cache .ruff_cache .coverage .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[crf]' \
	  || echo "pydensecrf2 does not build here (it needs a C++ compiler): its tests will be skipped"
	touch $@ $(VENV)/.installed
