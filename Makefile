# Everything a newcomer needs: each target sets up .venv first; a second call does not install again.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
RACES := $(sort $(wildcard benchmarks/race_*.py))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check evidence race docs clean

demo: $(STAMP)
	$(BIN)/gradmatch demo --out demo

# one thread a worker: two workers of one thread each beat one process of two
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

evidence: $(STAMP)
	$(BIN)/gradmatch evidence --all
	$(BIN)/gradmatch board --readme README.md

# the peers come from the extra [race] and benchmarks/peers.txt; one that cannot be had is reported as missing by its race
race: .venv/.raced
	@failed=0; for file in $(RACES); do echo "== $$file"; \
	$(BIN)/python $$file --json benchmarks/$$(basename $$file .py).json || failed=1; done; exit $$failed

docs: $(STAMP)
	$(BIN)/gradmatch board --out site
	$(BIN)/python -m gradmatch.board README.md CONTRIBUTING.md docs

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "gradmatch needs Python 3.11 or newer; none was found."; exit 1; }
	@echo "setting up .venv with $(PYTHON); a few minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.raced: $(STAMP) benchmarks/peers.txt
	-$(BIN)/python -m pip install -q -c constraints.txt -e '.[race]'
	@grep '^[^#]' benchmarks/peers.txt | while read -r peer; do \
	$(BIN)/python -m pip install -q --no-deps "$$peer" || echo "could not install $$peer"; done
	@touch $@

clean:
	rm -rf .venv demo site runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
