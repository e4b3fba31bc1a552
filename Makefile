# What people type and CI types. Every target sets up what it needs and re-uses it until pyproject.toml or constraints/
# change. `make PYTHON=/path/to/python demo` chooses the interpreter.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all test-openpi-pins test-lerobot test-groot test-libero test-nightly docs dist attack mutants lint format clean

# $(call python,VERSION...): the first interpreter of these versions that runs, from the path (where a version manager's
# stand-ins exist for Pythons that do not run) or from the folders of pyenv and uv, which need not be on it.
python = $(shell for v in $(1); do for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python \
	"$${UV_PYTHON_INSTALL_DIR:-$$HOME/.local/share/uv/python}"/cpython-$$v.*/bin/python; do \
	if "$$p" -c '' >/dev/null 2>&1; then echo "$$p"; exit; fi; done; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# The newest, for it decides how new the newest releases are.
PYTHON ?= $(or $(call python,3.13 3.12 3.11),python3)
# openpi's own versions, and those that GR00T's code runs with, have wheels for this one.
PYTHON311 ?= $(call python,3.11)
# lerobot needs this one.
PYTHON312 ?= $(call python,3.12)

# Two, not one a core: every worker compiles with all cores and holds its own programs in memory.
WORKERS ?= 2
# Neighbours share fixtures and compiled programs: each worker has half of the files, and takes of the other's when done.
PYTEST_ALL := -m pytest -n $(WORKERS) --dist worksteal
# Against others' code with programs as they are outside the tests (tests/conftest.py).
OPTIMISED := XLA_FLAGS=--xla_backend_optimization_level=3
# For example ARGS='tests/test_cka.py -k bias'.
ARGS ?=

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r target what; do printf 'make %-18s %s\n' "$$target" "$$what"; done

install: .venv/.installed ## clp_jax in .venv, with the newest releases
	@echo "installed: .venv/bin/clp"

demo: .venv/.installed-demo ## analyse, prune, fine-tune and roll out the small example model
	@.venv/bin/python -m clp_jax demo $(ARGS)

# One thread of NumPy's for each of the workers: more would wait for each other in loops.
test test-all test-openpi-pins test-nightly: export OPENBLAS_NUM_THREADS = 1

test: .venv/.installed-test ## tests and doctests with the newest releases, but for the slow ones
	@.venv/bin/python $(PYTEST_ALL) $(if $(ARGS),$(ARGS),-m "not slow")

test-all: .venv/.installed-test ## all of them, as CI runs them
	@.venv/bin/python $(PYTEST_ALL) $(ARGS)

test-openpi-pins: .venv-openpi/.installed-test ## all tests with openpi's versions, on Python 3.11
	@CI_HAS=openpi_client$(if $(DRAWS),$(comma)gym_aloha) .venv-openpi/bin/python $(PYTEST_ALL) $(ARGS)

test-lerobot: .venv-lerobot/.installed-test ## the lerobot exports against the real lerobot (6 GB on disk), on Python 3.12
	@CI_HAS=torch,lerobot HF_HUB_OFFLINE=1 $(OPTIMISED) .venv-lerobot/bin/python -m pytest tests/test_export_lerobot.py tests/smolvla/test_stock_lerobot.py tests/test_lerobot_reader.py $(ARGS)

test-groot: .venv-groot/.installed-test ## stock GR00T-N1.5 on cuts and exports (3 GB on disk), on Python 3.11
	@CI_HAS=torch,lerobot HF_HUB_OFFLINE=1 $(OPTIMISED) .venv-groot/bin/python -m pytest tests/groot/test_stock_groot.py $(ARGS)

test-libero: .venv-libero/.installed-test ## the real LIBERO (3 GB on disk), on Python 3.11; needs libosmesa6
	@CI_HAS=libero .venv-libero/bin/python -m pytest tests/evaluation/test_libero.py $(ARGS)

test-nightly: .venv-nightly/.installed-test ## the tests with JAX before its release: JAX_NIGHTLY=ADDRESS, the package index of its nightly builds
	@.venv-nightly/bin/python $(PYTEST_ALL) $(ARGS)

docs: .venv-docs/.installed-docs ## the site, in site/: no broken link, every flag, every public name; tutorial and notebook run
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet
	@CI_HAS=nbclient $(OPTIMISED) .venv-docs/bin/python -m pytest docs/test_examples.py $(ARGS)

dist: .venv-dist/.installed ## wheel and sdist, in dist/, installed into an empty environment and used there
	@rm -rf dist
	@.venv-dist/bin/python -m build --outdir dist . >/dev/null
	@.venv-dist/bin/python scripts/try_wheel.py dist

attack: .venv/.installed-test ## damage inputs of every kind and count what comes of it: ARGS='--seeds 1 2 --targets plan'
	@JAX_PLATFORMS=cpu PYTHONPATH=.:tests .venv/bin/python -m attack $(ARGS)

mutants: .venv/.installed-test ## deliberate faults, each of which its tests must notice (an hour or two; weekly, not in CI)
	@.venv/bin/python -m mutants $(ARGS)

lint: .venv/.installed-lint ## format, style, types, direction of imports
	@.venv/bin/python -m ruff format --check --quiet .
	@.venv/bin/python -m ruff check --quiet .
	@.venv/bin/python -m pyright --pythonpath .venv/bin/python
	@.venv/bin/lint-imports --no-logo --no-cache

format: .venv/.installed-lint ## rewrite the files in our format
	@.venv/bin/python -m ruff check --quiet --select I --fix .
	@.venv/bin/python -m ruff format --quiet .

clean: ## remove environments and caches
	@rm -rf .venv .venv-openpi .venv-lerobot .venv-groot .venv-libero .venv-docs .venv-dist .venv-nightly dist site
	@rm -rf .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Twice quiet: pip still prints errors. What is never imported need not be compiled.
PIP := -m pip install -qq --disable-pip-version-check --no-compile

# One environment, three sizes, each on top of the one before: the demo does not wait for the linters, and parallel make
# never runs pip twice in the same place.
.venv/.installed: pyproject.toml constraints/newest.txt
	$(call install,$(PYTHON),.,newest)
# MetaWorld is not for every machine; the demo says what is missing and ends without rollouts.
.venv/.installed-demo: .venv/.installed
	@.venv/bin/python $(PIP) -e '.[metaworld]' -c constraints/newest.txt || \
		echo "MetaWorld cannot be installed here: the demo will have no rollouts" >&2
	@touch $@
.venv/.installed-test: .venv/.installed
	$(call install,$(PYTHON),.[test],newest)
.venv/.installed-lint: .venv/.installed-test
	$(call install,$(PYTHON),.[lint],newest)
.venv-openpi/.installed-test: pyproject.toml constraints/openpi.txt
	$(call install,$(PYTHON311),.[test$(comma)openpi-client$(comma)aloha-sim],openpi)
.venv-libero/.installed-test: pyproject.toml constraints/openpi.txt
	$(call install,$(PYTHON311),.[test$(comma)libero],openpi)

.venv-lerobot/.installed-test: pyproject.toml constraints/lerobot.txt
	$(call install,$(PYTHON312),.[test],lerobot)
	@rm $@
	@"$(@D)/bin/python" $(PIP) -r constraints/lerobot.txt
	@"$(@D)/bin/python" $(PIP) --no-deps lerobot==0.6.1 torchvision==0.29.2 && touch $@

.venv-groot/.installed-test: pyproject.toml constraints/groot.txt
	$(call install,$(PYTHON311),.[test],groot)
	@rm $@
	@"$(@D)/bin/python" $(PIP) -r constraints/groot.txt
	@"$(@D)/bin/python" $(PIP) --no-deps lerobot==0.4.4 && touch $@

.venv-docs/.installed-docs: pyproject.toml constraints/docs.txt
	$(call install,$(PYTHON),.[docs],docs)
.venv-dist/.installed: constraints/newest.txt
	$(call install,$(PYTHON),build,newest)
.venv-nightly/.installed-test: pyproject.toml constraints/newest.txt
	$(call install,$(PYTHON),.[test],newest)
	@rm $@
	@.venv-nightly/bin/python $(PIP) --upgrade --pre \
		$(if $(JAX_NIGHTLY),--extra-index-url "$(JAX_NIGHTLY)") jax jaxlib && touch $@

# $(1) interpreter, $(2) what, $(3) constraints. An environment whose interpreter is gone is made anew.
comma := ,
define install
	@python="$(1)"; \
	if ! "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		echo "error: no Python for $(@D) found on the path, among pyenv's or uv's ($${python:-none} is the last tried): install" \
			"one, or name it with make PYTHON=... (3.11 to 3.13), PYTHON311=... or PYTHON312=..." >&2; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "error: $$python has no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; fi; \
	echo "setting up $(@D) for $(2): $$("$$python" --version), constraints/$(3).txt (a minute or two)"; \
	"$(@D)/bin/python" -c '' 2>/dev/null || "$$python" -m venv --clear "$(@D)"; \
	"$(@D)/bin/python" $(PIP) $(if $(filter .%,$(2)),-e) '$(2)' -c constraints/$(3).txt && touch $@
endef
