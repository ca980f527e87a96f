# Every target prepares the test environment first (nothing to do the second time) and runs inside it.
# Everything is kept in this checkout and one cache folder: $PARADIT_CACHE, or ~/.cache/paradit.

PYTHON ?= python3
RUN := $(PYTHON) tests/env/prepare.py run

.PHONY: demo test test-all matrix compat bench lint env clean

demo:           ## one prompt on the real server, stock and accelerated, with pictures in demo-output/
	@$(RUN) tests/demo.py

test: lint      ## checks and the test suite
	$(RUN) -m pytest tests -m "not slow"

test-all: lint  ## the same with the slow tests
	$(RUN) -m pytest tests

matrix:         ## every run of the generated matrix; writes tests/matrix/RESULT.json
	$(RUN) -m pytest tests/matrix --record-matrix

compat:         ## every plan on another ComfyUI: make compat COMFYUI_PATH=/path/to/ComfyUI
	@$(RUN) tests/matrix/compat.py

bench:          ## cost of hooks, bytes exchanged, time to a ready group
	$(RUN) tests/bench/bench.py overhead group

lint:
	$(RUN) -m ruff check .
	$(RUN) -m mypy para_core

env:            ## only prepare
	@$(PYTHON) tests/env/prepare.py

clean:          ## what the targets leave in the checkout; the cache folder stays
	rm -rf demo-output dist .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
