# Every target sets up all it needs in .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo lint test test-long test-extras test-ui hostile chaos check docs dev bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## an agent run that survives the death of its worker
	$(BIN)/python examples/demo/demo.py

lint: $(INSTALLED) ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: $(INSTALLED) ## all tests, or make test ARGS='tests/fundamentals -x'
	$(BIN)/pytest -q -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(INSTALLED) ## what make test leaves out: the rest of large tables, long editions
	$(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m 'long and not slow and not ui and not extras' $(ARGS)

test-extras: $(INSTALLED) ## wheels in empty environments: every extra, the image, a newcomer (asks a package index)
	$(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m extras $(ARGS)

hostile: $(INSTALLED) ## every input that is meant to harm, and the table of them (make test takes a sample)
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow and not ui and not extras' tests/hostile $(ARGS)

test-ui: $(INSTALLED) ## the pages, in a headless Chromium (needs chromium and chromium-driver)
	@command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null || \
		{ echo "make: there is no chromium here, or no driver; on Debian: apt install chromium chromium-driver"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,ui]'
	$(BIN)/pytest -q -m ui $(ARGS)

# With SEED or MINUTES: one repeatable run of a whole deployment under faults (docs/chaos.md).
CHAOS := $(if $(SEED)$(MINUTES),python -m chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),10),pytest -q -s -m slow)

chaos: $(INSTALLED) ## the long fault tests (an hour), or one repeatable chaos run: make chaos SEED=7 MINUTES=10
	$(BIN)/$(CHAOS) $(ARGS)

check: lint ## make lint and make test, and what the tests execute least
	@rm -rf .coverage && mkdir .coverage
	$(BIN)/coverage run -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder
	@echo 'The ten modules of which the tests execute the least (a report; nothing fails by it):'
	-@$(BIN)/coverage combine --quiet && $(BIN)/coverage report --sort=cover --precision=0 | head -n 12

docs: $(INSTALLED) ## write the pages that are generated from the code
	$(BIN)/python docs/generate.py

dev: $(INSTALLED) ## Redis, a worker and Flower on this machine; Ctrl-C ends all
	$(BIN)/openagents-worker dev

bench: $(INSTALLED) ## measure this machine
	$(BIN)/python -m bench

clean: ## remove .venv and caches
	rm -rf $(VENV) .bench .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again when the dependencies change. A .venv that is not ours (no stamp) is completed, not replaced.
$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed (make PYTHON=python3.11 …)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "make: $(PYTHON) cannot make a venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
