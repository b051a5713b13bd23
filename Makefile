# Everything below works on a fresh Linux machine with Python 3.11 or later: the first target that needs it builds .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup train smoke test drills gpu lint lock clean FORCE

help:
	@echo "make setup    build .venv with the tested versions (about 3 minutes, 6 GB)"
	@echo "make train    train CIFAR-10 from shards with the recipe quickstart"
	@echo "make smoke    train a few steps on a generated data set, on the CPU"
	@echo "make test     run the tests"
	@echo "make drills   run the long tests"
	@echo "make gpu      run what only a GPU can show, in ten minutes; GPU_PYTHON=python3: without make setup"
	@echo "make lint     check style and types"
	@echo "make lock     write requirements.lock anew, after a change of setup.cfg; UPGRADE=1: with the newest versions"

setup: $(INSTALLED)

# The lock file has all packages: pip refuses a file whose hash is not there, and the project itself brings nothing more.
$(INSTALLED): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "requirements.lock is for Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Train on CIFAR-10 if it is available, else on scikit-learn's digits, with a loud notice.
train: setup data/cifar10/train/manifest.json data/cifar10/test/manifest.json
	@if [ -f data/cifar10/train/manifest.json ] && [ -f data/cifar10/test/manifest.json ]; then \
		$(BIN)/shardstep train quickstart; \
	else \
		echo; \
		echo "*****************************************************************************"; \
		echo "*  CIFAR-10 IS NOT AVAILABLE (see above): training on scikit-learn's 8x8    *"; \
		echo "*  DIGITS instead. This checks the installation, not CIFAR-10.              *"; \
		echo "*****************************************************************************"; \
		echo; \
		$(BIN)/shardstep train digits; \
	fi

data/cifar10/%/manifest.json: | setup
	-$(BIN)/shardstep shards write --source cifar10 --split $* --out data/cifar10/$*

smoke: setup
	$(BIN)/shardstep train smoke run.resume=never

# worksteal: a core that has done its half of the tests takes from the other's.
test: setup
	$(BIN)/pytest -n 2 --dist worksteal -m "not drill"

drills: setup
	$(BIN)/pytest -n 2 --dist worksteal -m "drill and not alone"
	$(BIN)/pytest -m "drill and alone"

# GPU_PYTHON is an interpreter that has the dependencies: nothing is downloaded for it, and shardstep goes into build/.
gpu: $(if $(GPU_PYTHON),build/gpu,setup)
	$(if $(GPU_PYTHON),PYTHONPATH="$(CURDIR)/build/gpu:$$PYTHONPATH" $(GPU_PYTHON),$(BIN)/python) -m tests.gpu $(GPU_OPTIONS)

build/gpu: FORCE
	rm -rf build
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
		--target $@ .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy configs datasets trainer launch

# Versions stay as they are if they fit setup.cfg. uv is installed for this alone; any index that it is told of stays unsaid.
lock:
	tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && $(PYTHON) -m venv "$$tool" && \
	"$$tool/bin/pip" install --quiet --disable-pip-version-check uv && \
	"$$tool/bin/uv" pip compile --quiet --custom-compile-command 'make lock' --output-file requirements.lock \
		--universal --python-version 3.11 --generate-hashes $(if $(UPGRADE),--upgrade) \
		--extra digits --extra tensorboard --extra dev setup.cfg

clean:
	rm -rf .venv build gpu-results *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
