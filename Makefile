# Every target sets up what it needs on a fresh Debian 12 machine (as root), and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
# half of a test is waiting, so that three at a time are no load for two cores; what shares a fixture stays together
AT_A_TIME := -n 3 --dist loadfile
# guests are at work all the time
GUESTS_AT_A_TIME := -n 2 --dist loadfile
# where the time goes
SLOWEST := --durations=20 --durations-min=10
# tests sync what they write as often as the daemon does, and ask nothing of the disk: it goes to memory where that is large enough
SCRATCH := $(shell [ "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ] 2>/dev/null && echo /dev/shm || echo "$${TMPDIR:-/tmp}")
# a skipped test shows nothing: what setup installs is all that they need, but for one that mounts a disk, as root
INSIST := $(shell [ "$$(id -u)" = 0 ] && echo --no-skips)
# what Debian 12's versions of aiohttp and cryptography cannot change: wires use neither, but for a key on the CAN bus
NOT_THEIRS := $(addprefix --ignore=tests/,mappers/edged_uart mappers/edged_mqtt faults/test_serial_faults.py \
	$(patsubst %,mappers/edged_can/test_can_%.py,conformance docs engine faults link power_cuts))

.PHONY: help setup demo test lint bench deb apt-repo test-node clean

help:
	@echo "make demo    sign a release, flash it into a real boot loader on a simulated board, refuse what must be refused"
	@echo "make test    the whole test suite, on the locked libraries and on Debian 12's; takes some fifteen minutes"
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
	TMPDIR=$(SCRATCH) $(BIN)/python -m pytest $(INSIST) $(AT_A_TIME) $(SLOWEST)
	TMPDIR=$(SCRATCH) .venv-floors/bin/python -m pytest -q $(INSIST) $(AT_A_TIME) -p no:cacheprovider -m "not slow" $(NOT_THEIRS)

test-node:
	@PYTHON=$(PYTHON) packaging/setup-dev.sh --deb --node
	$(BIN)/python -m pytest $(INSIST) $(GUESTS_AT_A_TIME) $(SLOWEST) --no-loadscope-reorder tests/node

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
