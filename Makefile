# Every target sets up what it needs on a fresh Debian 12 machine (as root), and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
# much of a test is waiting, so that two at a time take little more than one; what shares a fixture stays together
AT_A_TIME := -n 2 --dist loadfile

.PHONY: help setup demo test lint bench deb apt-repo test-node clean

help:
	@echo "make demo    sign a release, flash it into a real boot loader on a simulated board, refuse what must be refused"
	@echo "make test    the whole test suite, on the locked libraries and on Debian 12's; takes some twenty minutes"
	@echo "make test-node  the package on real Debian systems: containers, machines, power cuts; as root, some thirty minutes"
	@echo "make lint    ruff and mypy --strict"
	@echo "make bench   measure against avrdude and against physical limits; prints a table, writes JSON"
	@echo "make deb     build dist/edged_VERSION_all.deb, the same bytes each time"
	@echo "make apt-repo  put it into dist/apt, a signed repository for any web server"
	@echo "make setup   only set up what the others need"

setup:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh

demo:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh --demo
	@$(BIN)/edged demo

test:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh --floors
	$(BIN)/python -m pytest $(AT_A_TIME)
	.venv-floors/bin/python -m pytest -q $(AT_A_TIME) -m "not slow" --ignore=tests/mappers/edged_uart --ignore=tests/mappers/edged_mqtt -p no:cacheprovider

test-node:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh --deb --node
	$(BIN)/python -m pytest $(AT_A_TIME) --no-loadscope-reorder tests/node

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/uv lock --check --quiet

deb:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh --deb
	@packaging/build-deb.sh

apt-repo: deb
	@packaging/apt-repo.sh

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf .venv .venv-floors .mypy_cache .ruff_cache .pytest_cache .hypothesis
