# Everything runs in one Python environment, the active one or .venv. tools/setup.sh prepares it.
ENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(ENV)/bin
CPP = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu")

# The test processes together have more threads than there are processors. With OMP_WAIT_POLICY the
# threads do not spin while they wait for each other.
.PHONY: help run test build lint format docs wheel hub mutations versions clean
.NOTPARALLEL:

help:
	@echo 'make run      set up, and run the demonstration on two photographs; ARGS="--quick" for options'
	@echo 'make test     set up, and run the tests; ARGS="-k gradcheck" for options of pytest'
	@echo 'make build    set up, and compile the extension'
	@echo 'make lint     set up, and check style and types'
	@echo 'make format   format the sources'
	@echo 'make docs     set up, and build the documentation into build/docs'
	@echo 'make wheel    set up, and build the archive of the sources and two wheels into dist'
	@echo 'make hub      set up, and lay the sources out for kernel-builder, in dist/kernels/eca-fused'
	@echo 'make mutations  deliberate faults in the CUDA kernels, each of which a test must find'
	@echo 'make versions the tests under every supported torch, in clean environments'
	@echo 'make clean    remove what was built, keep the environment'
	@echo
	@echo 'They use the active virtual environment, or make .venv. An installed torch is kept.'
	@echo 'PYTHON=python3.12   the Python for a new .venv'
	@echo 'ECA_FUSED_CUDA=0|1  build without the CUDA kernels, or require them'

run:
	@tools/setup.sh demo
	@'$(BIN)/python' -m eca_fused $(ARGS)

test:
	@tools/setup.sh demo test
	@OMP_WAIT_POLICY=passive '$(BIN)/python' -m pytest -n logical --maxprocesses 4 --dist loadgroup $(ARGS)

build:
	@tools/setup.sh

lint:
	@tools/setup.sh demo dev
	'$(BIN)/ruff' check
	'$(BIN)/ruff' format --check
	'$(BIN)/mypy'
	'$(BIN)/clang-format' --dry-run -Werror $(CPP)

format:
	@tools/setup.sh dev
	'$(BIN)/ruff' check --fix
	'$(BIN)/ruff' format
	'$(BIN)/clang-format' -i $(CPP)

docs:
	@tools/setup.sh demo docs
	'$(BIN)/python' -m sphinx -q -W --keep-going docs build/docs

wheel:
	@ECA_FUSED_CUDA= tools/setup.sh wheel
	@tools/wheel.sh

hub:
	@tools/setup.sh
	@'$(BIN)/python' tools/hub_layout.py $(ARGS)

mutations:
	@tools/setup.sh demo test
	@PYTHONPATH=tests '$(BIN)/python' -m helpers.mutations $(ARGS)

versions:
	@tools/versions.sh --write

clean:
	rm -rf build dist *.egg-info eca_fused/*.so '$(ENV)/.eca_fused'
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
