# kata-shim: every task of the project. `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
PREFIX ?= /opt/kata-shim
DESTDIR ?=
PYTEST_ARGS ?=
STORM_ARGS ?=
HOSTS_ARGS ?=
SOAK_ARGS ?=
WALK_ARGS ?=
FUZZ_ARGS ?=
CMD ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-e2e test-hotplug test-templates test-liars test-containerds containerd-2.3 test-docker test-hosts test-failpoints storm soak fuzz lint format proto guest bench bench-vmms bench-host test-kvm install uninstall clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, .venv, what confines children, the vsock daemon, the guest (as root)
	@scripts/setup.sh

demo: setup ## run containers in VMs under a containerd of its own, with the time of each phase
	@$(PY) -m scripts.demo

test: setup ## unit, end-to-end, fault and security tests, and a part of test-kvm
	@$(PY) -m pytest $(PYTEST_ARGS)

test-unit: setup ## the tests that need no containerd and no VM
	@$(PY) -m pytest -m "not e2e" $(PYTEST_ARGS)

test-e2e: setup ## the tests through containerd; KATA_E2E_RUNTIME=io.containerd.runc.v2 checks them against runc
	@$(PY) -m pytest -m e2e $(PYTEST_ARGS)

test-containerds: setup ## all end-to-end tests under each containerd: 1.6, 1.7 and 2.x, and 2.3 if it is built; with a minute without it, and 1 GiB of output (25 min)
	@set -e; for version in 1.6 1.7 2 $$(test ! -x $(CONTAINERD_2_3)/containerd || echo 2.3); do \
	    echo "== containerd $$version"; \
	    KATA_E2E_CONTAINERD=$$version KATA_E2E_AWAY=65 KATA_E2E_BYTES=1073741824 $(PY) -m pytest -m "e2e and not benchhost" $(PYTEST_ARGS); \
	done

test-liars: setup ## the whole conformance suite against each driver that lies: one test fails, all others pass (20 min)
	@KATA_LIARS=all $(PY) -m pytest tests/conformance/test_liars.py $(PYTEST_ARGS)

# Newer than Debian's. The module proxy's names only; nothing of it is part of the project.
CONTAINERD_2_3 := build/containerd/2.3/usr/bin
containerd-2.3: ## build containerd 2.3 for test-containerds, where there is a Go of 1.26 (3 min)
	@command -v go >/dev/null || { echo "containerd-2.3: no \`go\` in PATH; see https://go.dev/dl" >&2; exit 1; }
	@mkdir -p $(CONTAINERD_2_3)
	@GOBIN=$(abspath $(CONTAINERD_2_3)) go install $(addprefix github.com/containerd/containerd/v2/cmd/,\
	    $(addsuffix @v2.3.7,containerd ctr containerd-shim-runc-v2))
	@$(CONTAINERD_2_3)/containerd --version

test-docker: setup ## Docker itself, both of Debian's (26.1 and 28.5), with all that `make test` does with one of them
	@KATA_E2E_DOCKER=all $(PY) -m pytest tests/e2e/test_docker.py $(PYTEST_ARGS)

test-hosts: setup ## README's commands and the tests on fresh machines of the other releases (docs/hosts.md); HOSTS_ARGS=--short
	@$(PY) -m scripts.hosts $(HOSTS_ARGS)

test-kvm: setup ## the tests that need KVM, inside the bench host, a nested machine that has it
	@$(PY) -m pytest -m benchhost --bench-host=all $(PYTEST_ARGS)

bench-host: setup ## a shell in the bench host, or CMD='...' there; docs/bench-host.md
	@$(PY) -m tests.benchhost -- '$(subst ','\'',$(value CMD))'

storm: setup ## 200 short containers, eight at a time, in pods and alone; STORM_ARGS=--help (10 min)
	@$(PY) -m tests.stress $(STORM_ARGS)

soak: setup ## lives in parallel in two namespaces with 500 random faults; SOAK_ARGS=--help (25 min)
	@$(PY) -m tests.stress.soak $(SOAK_ARGS)

test-failpoints: setup ## a life for each await that leaves the daemon, broken in four ways; WALK_ARGS=--help (30 min)
	@$(PY) -m tests.fault.walk $(WALK_ARGS)

test-hotplug: setup ## a disk plugged and unplugged 1,000 times in one VM: nothing leaks
	@KATA_HOTPLUG_CYCLES=1000 $(PY) -m pytest tests/e2e/test_hotplug.py -k cycles --timeout=1200 $(PYTEST_ARGS)

test-templates: setup ## VMs from templates: 200 starts, 20 at once, templates that are broken or being made (15 min)
	@KATA_TEMPLATES=all $(PY) -m pytest tests/e2e/test_templates.py --timeout=1800 $(PYTEST_ARGS)

fuzz: setup ## fuzz every reader of foreign bytes; FUZZ_ARGS='--runs 1000000 --target qmp', --help (a minute)
	@$(PY) -m tests.fuzz $(FUZZ_ARGS)

lint: ## ruff, ruff format and mypy --strict
	@scripts/setup.sh venv
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy .

format: ## let ruff format the code
	@.venv/bin/ruff format .

proto: ## generate the modules of proto/ from its .proto files
	@scripts/setup.sh venv
	@$(PY) -m proto.build

guest: ## build the guest's kernel and image into build/guest; KERNEL=trixie takes that release's kernel
	@scripts/setup.sh packages venv guest

bench-vmms: setup ## what each VMM costs, in the bench host, as ratios to QEMU's q35 (KATA_CLH=FILE: Cloud Hypervisor too); BENCH_ARGS=--help
	@$(PY) -m tests.bench.vmms $(BENCH_ARGS)

bench: setup ## measure against runc, a bare QEMU and Go's ttrpc: table, JSON and docs/bench.svg
	@$(PY) -m tests.bench

install: setup ## install for the system's containerd (PREFIX=/opt/kata-shim, DESTDIR=)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install.sh install

uninstall: ## take away what `make install` put there
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install.sh uninstall

clean: ## remove what was built here (not .venv)
	rm -rf build devices/kata-confine shim/launch/kata-start hypervisors/qemu/kata-readonly.so
