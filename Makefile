# Everything is set up by itself: make run, make test. See `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AGENT_VERSION := 0.74.2
PROMTOOL := .tools/promtool
AGENT := .tools/agent/node_modules/.bin/pi
SYSTEM_TOOLS := bindfs faketime tmux s6-supervise shellcheck zsh fish rsyslogd logrotate journalctl
ARGS ?=
QUICK ?=
JOBS ?= 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test docs lint format types campaign chaos tools bench fuzz mutants agent clean

help: ## Show what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# What it starts again has its environment: the agent of `make agent` is to be found there.
run: export PATH := $(PATH):$(CURDIR)/$(dir $(AGENT))
run: $(VENV)/.run ## Keep the sessions folder right (ARGS="--dry-run" for more)
	$(BIN)/pi-reconciler run $(ARGS)

# The tests run beside each other, with real processes, terminals and clocks. A few that failed run
# again, alone: what fails then is broken, what passes then is a race that the report has shown.
FAILED := .pytest_cache/v/cache/lastfailed
FEW := 3

test: $(VENV)/.test agent tools $(PROMTOOL) lint docs ## Lint, types, contracts, docs, all tests, coverage gate
	rm -f .coverage .coverage.* $(FAILED)
	$(BIN)/coverage run -m pytest -n $(JOBS) --dist worksteal $(ARGS) || { \
	  failed=$$(grep -c '": true' $(FAILED)) && [ "$$failed" -le $(FEW) ] && \
	  echo "$$failed failed beside others: again, alone" && \
	  $(BIN)/coverage run -m pytest --last-failed --last-failed-no-failures none $(ARGS); }
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

lint: $(VENV)/.test types ## Style, and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test ## Strict types
	$(BIN)/mypy

docs: $(VENV)/.test ## The pages as a site, in build/docs; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs build/docs

format: $(VENV)/.test ## Put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

campaign: $(VENV)/.test agent ## The longer races and random histories
	PI_RECONCILER_CAMPAIGN=1 $(BIN)/pytest -m campaign $(ARGS)

chaos: $(VENV)/.test agent tools ## Every fault of the campaign, many rounds, one row each (ARGS="-k clock")
	PI_RECONCILER_CAMPAIGN=1 $(BIN)/pytest -m chaos --timeout 7200 $(ARGS)

# Debian's packages, each named like its command but for some. What is without its tool is
# skipped, and says so. (rsyslog's package starts it where systemd runs, to log as Debian does.)
tools: ## What some faults and benchmarks need of the system, installed as root where there is apt
	@missing=$$(for tool in $(SYSTEM_TOOLS); do \
	  command -v $$tool >/dev/null || echo $$tool; done | \
	  sed 's/^s6-supervise$$/s6/; s/^rsyslogd$$/rsyslog/; s/^journalctl$$/systemd/'); \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq; apt-get install -y -qq $$missing || echo "not installed: $$missing"; \
	fi

# Debian's package is a server that it starts, and dozens of others: one program out of it will do.
$(PROMTOOL):
	@if command -v apt-get >/dev/null; then \
	  rm -rf $(@D)/deb && mkdir -p $(@D)/deb && cd $(@D)/deb && { apt-get download -qq prometheus 2>/dev/null || \
	    { apt-get update -qq && apt-get download -qq prometheus; }; } && \
	  dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool > promtool && \
	  chmod +x promtool && mv promtool .. && cd .. && rm -r deb || echo "promtool cannot be had"; \
	else echo "apt-get is missing: promtool cannot be had"; fi

bench: SYSTEM_TOOLS := s6-supervise
bench: $(VENV)/.run tools ## Measure against peers, in one run (QUICK=1: a short check of the harness)
	$(BIN)/python -m benchmarks $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

fuzz: $(VENV)/.fuzz ## Fuzz what reads outside bytes (ARGS="wire --runs 1000000" for one of them)
	$(BIN)/python -m fuzzing $(ARGS)

mutants: $(VENV)/.mutants ## Do the tests notice changed code? (ARGS="state removal" for some rooms)
	$(BIN)/python tests/mutants.py $(ARGS)

agent: $(AGENT) ## The real pi agent, for the end-to-end tests

# Without npm its tests are skipped, and say so; where CI is set they fail.
$(AGENT):
	@if command -v npm >/dev/null; then \
	  npm install --silent --no-audit --no-fund --no-package-lock --prefix .tools/agent \
	    @earendil-works/pi-coding-agent@$(AGENT_VERSION); \
	else echo "npm is missing: the tests with the real agent will be skipped"; fi

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV) || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(BIN)/pip install --quiet 'pip>=25.1'
	touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run pyproject.toml
	$(BIN)/pip install --quiet --group dev
	touch $@

$(VENV)/.fuzz: $(VENV)/.run pyproject.toml
	$(BIN)/pip install --quiet --only-binary :all: --group fuzz || \
	  { echo "atheris cannot be had here: it has wheels for CPython on Linux alone" >&2; exit 1; }
	touch $@

$(VENV)/.mutants: $(VENV)/.test pyproject.toml
	$(BIN)/pip install --quiet --group mutants
	touch $@

clean: ## Remove all that was set up
	rm -rf $(VENV) .tools build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
