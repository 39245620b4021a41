# make serve   a server with the demo weights, on http://127.0.0.1:8000
# make test    lint, types and tests
# make cluster a cluster of Ray's on this machine, with runners and nodes that die
# make peers   this server next to FastAPI, LitServe and BentoML, in four minutes
# make demo-eval   what the demo weights can do, measured
#
# CPU=avx2 computes as a CPU of 2013 to 2020 does, without AVX-512 and bfloat16; CONTRIBUTING.md says how far.
# TORCH_INDEX=URL takes PyTorch from there, such as PyTorch's own index of CPU builds.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
# Much of a test is waiting for a process to start: two files at a time take hardly more than half as long.
TWICE := -n 2 --dist loadfile
# As the server does for itself: OpenMP's threads spin less while they wait, which two programs at a time would pay for.
export GOMP_SPINCOUNT ?= 1000
# On the command line only: some systems have a variable of this name.
ifeq ($(origin CPU),command line)
ifneq ($(CPU),avx2)
$(error CPU=$(CPU): only CPU=avx2 can be imitated)
endif
export ONEDNN_MAX_CPU_ISA := AVX2
export ATEN_CPU_CAPABILITY := avx2
export MKL_ENABLE_INSTRUCTIONS := AVX2
endif

.PHONY: serve test soak cluster test-all lint bench peers demo demo-eval clean

serve: .venv/serve.done
	$(BIN)/flux-server serve demo $(ARGS)

test: lint tests/support/js/node_modules
	$(BIN)/pytest $(TWICE) -m "not soak and not cluster and not container and not eval" $(ARGS)

# Long runs, more than an hour on two cores; -rP shows the figures that they print.
soak: lint
	$(BIN)/pytest -m soak -rP $(ARGS)

# Then what the SDKs do, on one runner in a process of Ray's.
SDK_TESTS := $(addprefix tests/clients/test_,python_client.py node_clients.py replayed_clients.py curl.py realtime.py \
	openai.py uploads.py)
cluster: lint tests/support/js/node_modules
	$(BIN)/pytest -m cluster $(ARGS)
	TEST_RAY=local $(BIN)/pytest -m "not soak and not cluster" $(SDK_TESTS)

test-all: lint tests/support/js/node_modules
	$(BIN)/pytest -m "not soak" $(ARGS)

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files 2>/dev/null || echo bench docs models server tests)
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/dev.done
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.load
	$(BIN)/python -m bench.demo_weights
	$(BIN)/flux-server bench demo --sizes 512x512 --steps 28 --rounds 9
	$(BIN)/flux-server bench demo --sizes 512x512 --steps 8 --waiting 8 --rounds 5
	$(BIN)/python -m bench.mixed_load --weights cost
	$(BIN)/python -m bench.mixed_load --weights demo --requests 60

# Needs an environment of its own, where nothing of theirs meets what the server runs on.
peers: .venv/dev.done build/peers/installed.done
	$(BIN)/python -m bench.peers $(ARGS)

# Trains the demo weights anew, into build/demo/export; hours on two cores. Stopped, it goes on where it was.
demo: .venv/dev.done
	$(BIN)/python -m models.demo.recipe $(ARGS)

# What the demo weights can do: models/demo/evaluation.json and its contact sheet.
demo-eval: .venv/dev.done
	$(BIN)/python -m models.demo.recipe evaluate --weights models/demo $(ARGS)

clean:
	rm -rf .venv build/peers tests/support/js/node_modules tests/support/.clients

.venv/bin/python:
	$(PYTHON) -m venv .venv

# PyTorch by itself first: asked for together, the other packages would be looked up at that index too.
.venv/serve.done: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing; PyTorch alone is a large download, this may take minutes."
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(PIP) install -q -c constraints.txt -e .
	touch $@

.venv/dev.done: .venv/serve.done
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

build/peers/installed.done: bench/peer_servers/requirements.txt
	$(PYTHON) -m venv --clear build/peers
	build/peers/bin/python -m pip --disable-pip-version-check install -q -r bench/peer_servers/requirements.txt
	touch $@

# Without npm the tests of the Node SDKs are skipped, and say so.
tests/support/js/node_modules: tests/support/js/package.json
	if command -v npm > /dev/null; then cd tests/support/js && npm install --no-package-lock --no-audit --no-fund --loglevel=error; fi
	mkdir -p $@ && touch $@
