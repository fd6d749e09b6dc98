# Everything happens in .venv, which the targets create themselves.
# Needs GNU make 3.81 or later and Python 3.10 or later: make PYTHON=python3.12 demo

PYTHON ?= python3
JOBS ?= 4
PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint services docs bench clean

help:
	@echo 'make demo      a live stream of this machine through windows, on a MongoDB of its own (15 seconds)'
	@echo 'make test      all tests, in several processes (JOBS=4)'
	@echo 'make soak      producers and consumers under random faults, and a proof (MINUTES=1)'
	@echo 'make lint      ruff, mypy, and checks of Dockerfile and docker-compose.yml'
	@echo 'make services  the system packages the tests need (Debian and Ubuntu, as root)'
	@echo 'make docs      the documentation, in docs/_build/html'
	@echo 'make bench     the benchmarks, each beside its floor: tables, benchmarks/results.json and a chart (15 minutes)'
	@echo 'make clean     remove .venv and everything built'

demo: .venv/.demo
	@.venv/bin/minibatch demo

test: .venv/.dev
	@.venv/bin/python -m pytest -n $(JOBS) --dist worksteal

soak: .venv/.dev
	@.venv/bin/python tests/soak.py --minutes $(or $(MINUTES),1)

lint: .venv/.dev
	@echo 'ruff' && .venv/bin/ruff check --quiet .
	@echo 'mypy' && .venv/bin/mypy --no-error-summary
	@echo 'hadolint' && .venv/bin/hadolint Dockerfile examples/service/Dockerfile
	@echo 'check-jsonschema' && .venv/bin/check-jsonschema --quiet \
		--builtin-schema vendor.compose-spec docker-compose.yml examples/service/docker-compose.yml

docs: .venv/.dev
	@.venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

bench: .venv/.dev
	@.venv/bin/python benchmarks/run.py --save

# The mongod of the embedded extra is linked against these. Loading them is the test, because their packages
# have other names on other systems.
LIBRARIES_PRESENT = $(PYTHON) -c 'import ctypes; [ctypes.CDLL(n) for n in ("libcurl.so.4", "libssl.so.3")]' 2>/dev/null

services:
	@missing=; \
	$(LIBRARIES_PRESENT) || missing=' libcurl4 libssl3'; \
	PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || missing="$$missing mosquitto"; \
	[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || missing="$$missing rabbitmq-server"; \
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing="$$missing chromium chromium-driver"; \
	if [ "$$(uname -s)" != Linux ]; then \
		echo 'services: nothing is installed on this system; tests that need mosquitto, rabbitmq or chromium are skipped without'; \
	elif [ -z "$$missing" ]; then \
		echo 'services: libcurl, OpenSSL 3, mosquitto, rabbitmq and chromium are there'; \
	elif ! command -v apt-get >/dev/null; then \
		echo "services: no apt-get here; install these packages of Debian, or what they are called here:$$missing" >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
		echo "services: must run as root to install$$missing: sudo make services" >&2; exit 1; \
	else \
		echo "services: installing$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

clean:
	@rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say what .venv holds; a change of the requirements installs again.

.venv/.made:
	@command -v $(PYTHON) >/dev/null || { \
		echo 'minibatch needs Python 3.10 or later, and there is no $(PYTHON): install it, or name it: make PYTHON=...' >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "minibatch needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo '$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv' >&2; \
		exit 1; }
	@echo 'Creating .venv'
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.demo: .venv/.made setup.cfg pyproject.toml
	@echo 'Installing minibatch and its embedded MongoDB into .venv (once)'
	@$(PIP) install -e '.[embedded]'
	@touch $@

.venv/.dev: .venv/.made setup.cfg pyproject.toml
	@echo 'Installing minibatch and its development tools into .venv (once)'
	@$(PIP) install -e '.[embedded,kafka,mqtt,celery,apps,prometheus,dask,dev]'
	@touch .venv/.demo $@
