# nbdstore's two commands, and the pieces they are made of:
#
#   make serve         install, make a pool and a volume if there is none, serve on 127.0.0.1:10809
#   make test          all that CI runs: packages, linters, types, every test
#
#   make lint types    the quick checks
#   make tests         the tests alone; ARGS="tests/store -k journal" chooses
#   make soak          the long tests, for MINUTES=10, from SEED=... on; see tests/soak.py
#   make kubernetes-test
#                      applications on a real control plane, which is made from Debian's sources the
#                      first time: as root, five minutes
#   make memory-test   100 volumes of 1 TiB with 1 GiB in each: 100 GiB of disk, a quarter of an hour
#   make compose-kernel-test
#                      the Compose file with the kernel's nbd driver, in an emulated machine; minutes
#   make bench-quick   nbdstore beside nbdkit, qemu-nbd and nbd-server, in under three minutes
#   make bench         every benchmark; ARGS="fsync --rounds 9" chooses; see benchmarks/README.md
#   make format        rewrite the code as ruff wants it
#   make clean         remove what the others have made
#
# PYTHON=... chooses the interpreter (3.11 or newer); see scripts/make-venv.

VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
ARGS ?=
MINUTES ?= 10
SEED ?=
LISTEN ?= 127.0.0.1:10809

.PHONY: serve test lint types tests soak kubernetes-test memory-test compose-kernel-test bench bench-quick format packages clean
.NOTPARALLEL:

serve: $(VENV)/.ready
	@$(BIN)/nbdstore serve --demo --listen $(LISTEN)

test: packages lint types tests

packages:
	@scripts/install-packages tests/debian-packages.txt

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

tests: $(VENV)/.ready-test
	$(BIN)/pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal $(ARGS)

soak: $(VENV)/.ready-test
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

kubernetes-test: $(VENV)/.ready-test
	@tests/orchestration/make-cluster.sh $${XDG_CACHE_HOME:-$$HOME/.cache}/nbdstore-tests/kubernetes
	$(BIN)/pytest tests/orchestration/on_a_cluster.py $(ARGS)

memory-test: $(VENV)/.ready-test
	NBDSTORE_MEMORY_TEST=full $(BIN)/pytest tests/clients/test_memory.py

compose-kernel-test: $(VENV)/.ready-test
	$(BIN)/pytest tests/docker/in_a_guest.py $(ARGS)

bench: $(VENV)/.ready-bench
	@scripts/install-packages benchmarks/debian-packages.txt
	$(BIN)/python -m benchmarks run $(ARGS)

bench-quick: override ARGS := --quick $(ARGS)
bench-quick: bench

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: setup.cfg pyproject.toml scripts/make-venv
	@scripts/make-venv $(VENV)
	@touch $@

$(VENV)/.ready-test: setup.cfg pyproject.toml scripts/make-venv
	@scripts/make-venv $(VENV) test
	@touch $(VENV)/.ready $@

$(VENV)/.ready-bench: setup.cfg pyproject.toml scripts/make-venv
	@scripts/make-venv $(VENV) bench
	@touch $(VENV)/.ready $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find nbdstore benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
