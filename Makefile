# make serve   a server with the demo weights, on http://127.0.0.1:8000
# make test    lint, types and tests
# make cluster tests that kill runners and nodes of a Ray cluster on this machine
# make peers   compares this server with FastAPI, LitServe and BentoML, in four minutes
# make quantized    the tests of weights in 8 and 4 bits, with torchao, SDNQ and quanto
# make cuda-proof   what can be shown of CUDA without a GPU, with a PyTorch for CUDA of its own (5 GB)
# make release   builds the packages of the last commit into dist/, and tries every way to install them
# make generators   generates clients from the OpenAPI documents, and images with each; needs npm and a Java runtime
# make demo-eval   measures what the demo weights can draw
#
# CPU=avx2 imitates a CPU of 2013 to 2020, without AVX-512 and bfloat16; CONTRIBUTING.md lists what it does not imitate.
# TORCH_DEVICE=cpu or cuda chooses the version of PyTorch (constraints/); the default is cuda if nvidia-smi is there.
# TORCH_INDEX=URL installs PyTorch from that index, such as PyTorch's own index of CPU builds.

PYTHON ?= python3
TORCH_DEVICE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
BIN := .venv/bin
# --no-compile: Python compiles what it imports, at its first import; pip would compile everything, for minutes.
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
# Running two files at a time takes little more than half as long, because many tests wait for a process to start.
TWICE := -n 2 --dist loadfile
# OpenMP's threads spin less while they wait, as in the server. Otherwise two programs at a time slow each other down.
export GOMP_SPINCOUNT ?= 1000
# Some systems set this. Packages come without bytecode, and compiling them again in each process doubles its start.
unexport PYTHONDONTWRITEBYTECODE
# Read CPU from the command line only, because some systems set an environment variable of this name.
ifeq ($(origin CPU),command line)
ifneq ($(CPU),avx2)
$(error CPU=$(CPU): only CPU=avx2 can be imitated)
endif
export ONEDNN_MAX_CPU_ISA := AVX2
export ATEN_CPU_CAPABILITY := avx2
export MKL_ENABLE_INSTRUCTIONS := AVX2
endif

.PHONY: serve test soak cluster test-all lint bench peers quantized cuda-proof generators release demo demo-eval clean

serve: .venv/serve.done
	$(BIN)/flux-server serve demo $(ARGS)

test: lint tests/support/js/node_modules
	$(BIN)/pytest $(TWICE) -m "not soak and not cluster and not container and not eval and not cuda and not thorough \
		and not generators and not release" $(ARGS)

# Long runs: more than an hour on two cores. -rP shows the figures that they print.
soak: lint
	$(BIN)/pytest -m soak -rP $(ARGS)

# `make cluster` also runs the SDK tests, on one runner in a Ray process.
SDK_TESTS := $(addprefix tests/clients/test_,python_client.py node_clients.py replayed_clients.py curl.py realtime.py \
	openai.py uploads.py)
cluster: lint tests/support/js/node_modules
	$(BIN)/pytest -m cluster $(ARGS)
	TEST_RAY=local $(BIN)/pytest -m "not soak and not cluster" $(SDK_TESTS)

test-all: lint tests/support/js/node_modules build/generators/installed.done
	$(BIN)/pytest -m "not soak and not cuda and not release" $(ARGS)

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files 2>/dev/null || echo bench docs examples flux_server_testing models server tests)
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

# The other servers run in a separate environment, so that their packages cannot change this server's.
peers: .venv/dev.done build/peers/installed.done
	$(BIN)/python -m bench.peers $(ARGS)

# The parts of the proof, each a file of tests/cuda. A part that passed is not run again until a source changes. -rP shows
# the figures; Python warns of an escape sequence in torchao when it compiles it.
CUDA_PARTS := first_start allocator quantized_files engine plans compilation
CUDA_PYTEST = build/cuda/bin/python -m pytest -m cuda -n 2 -rP -W "ignore:invalid escape sequence:DeprecationWarning"
cuda-proof: build/cuda/installed.done $(if $(ARGS),,$(CUDA_PARTS:%=build/cuda/%.passed))
	$(if $(ARGS),$(CUDA_PYTEST) tests/cuda $(ARGS))

CUDA_SOURCES := $(wildcard models/*.py models/*/*.py server/*.py server/*/*.py server/*/*/*.py tests/cuda/* tests/support/*.py)
build/cuda/%.passed: tests/cuda/test_%.py build/cuda/installed.done $(filter %.py %.c,$(CUDA_SOURCES))
	$(CUDA_PYTEST) $<
	touch $@

# The libraries that load quantized weights run in a separate environment: diffusers imports them at each start.
quantized: build/quantized/installed.done
	build/quantized/bin/python -m pytest $(TWICE) tests/parity/test_quantized_directory.py \
		tests/parity/test_loras_on_plans.py $(ARGS)

# The wheel of a commit has the same bytes each time, because its times are those of the commit.
release: .venv/dev.done
	rm -rf dist build/release
	mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation --outdir dist build/release
	PACKAGES=dist $(BIN)/pytest tests/project/test_package.py -rP $(ARGS)
	$(BIN)/python -m zipfile --list dist/*.whl
	$(BIN)/python -m tarfile --list dist/*.tar.gz
	cd dist && sha256sum *.whl *.tar.gz | tee SHA256SUMS

# The generators run in a separate environment, because they need other versions of the server's packages.
generators: .venv/dev.done build/generators/installed.done tests/support/js/node_modules
	$(BIN)/pytest tests/generators -m generators $(ARGS)

# Train the demo weights again, into build/demo/export. This takes hours on two cores; a stopped run can be continued.
demo: .venv/dev.done
	$(BIN)/python -m models.demo.recipe $(ARGS)

# Measure what the demo weights can draw: writes models/demo/evaluation.json and its contact sheet.
demo-eval: .venv/dev.done
	$(BIN)/python -m models.demo.recipe evaluate --weights models/demo $(ARGS)

clean:
	rm -rf .venv dist build/cuda build/generators build/peers build/quantized build/release tests/support/js/node_modules tests/support/.clients

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Install PyTorch first and alone: otherwise pip would look for the other packages at TORCH_INDEX too.
.venv/serve.done: .venv/bin/python pyproject.toml $(wildcard constraints/*.txt)
	@echo "Installing; PyTorch alone is a large download, this may take minutes."
	$(if $(TORCH_INDEX),$(PIP) install -q --no-compile -c constraints/$(TORCH_DEVICE).txt torch --index-url $(TORCH_INDEX))
	$(PIP) install -q --no-compile -c constraints/$(TORCH_DEVICE).txt -e '.$(if $(filter cuda,$(TORCH_DEVICE)),[quantize])'
	touch $@

.venv/dev.done: .venv/serve.done
	$(PIP) install -q --no-compile -c constraints/$(TORCH_DEVICE).txt -e '.[dev]'
	touch $@

build/cuda/installed.done: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv --clear build/cuda
	build/cuda/bin/python -m pip --disable-pip-version-check install -q --no-compile -c constraints/cuda.txt \
		-e '.[dev,quantize]' bitsandbytes
	touch $@

build/quantized/installed.done: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv --clear build/quantized
	build/quantized/bin/python -m pip --disable-pip-version-check install -q --no-compile \
		-c constraints/$(TORCH_DEVICE).txt -e '.[dev,quantize]' sdnq optimum-quanto
	touch $@

build/peers/installed.done: bench/peer_servers/requirements.txt
	$(PYTHON) -m venv --clear build/peers
	build/peers/bin/python -m pip --disable-pip-version-check install -q -r bench/peer_servers/requirements.txt
	touch $@

build/generators/installed.done: tests/support/generators/requirements.txt
	$(PYTHON) -m venv --clear build/generators
	build/generators/bin/python -m pip --disable-pip-version-check install -q -r tests/support/generators/requirements.txt
	touch $@

# Without npm, pytest skips the tests of the Node SDKs and says why.
tests/support/js/node_modules: tests/support/js/package.json
	if command -v npm > /dev/null; then cd tests/support/js && npm install --no-package-lock --no-audit --no-fund --loglevel=error; fi
	mkdir -p $@ && touch $@
