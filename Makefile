# All set-up happens on first use: a virtual environment with pinned packages, and Debian's offscreen OpenGL.
# Needs Python 3.11 or newer, make and git.   make help

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,serve,record,otel,export,tensorrt-rtx,train,data,sim,dds,docs,dev
# Options for every `pip install`, for instance another package index.
PIP_ARGS ?=
# The first interpreter that starts and is new enough; a version manager's shim may be there and not start.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$candidate" && break; \
	done; true)
ROS_VENV := runs/ros-venv
# Debian's ROS 1: roscore, rospy, and the messages of docs/ros.md.
ROS_PACKAGES := python3-roslaunch python3-rospy rosout $(patsubst %,python3-%-msgs,diagnostic geometry nav rosgraph sensor \
	std tf2 trajectory)
CHECKPOINT ?= worldvln_edge/checkpoints/nano
BENCH_ARGS ?=
PROFILES_ARGS ?=
TEST_PROCESSES ?= 2

# May we install Debian packages without being asked for a password?
define apt_install
	as_root=(); [ "$$(id -u)" = 0 ] || as_root=(sudo -n); \
	if ! command -v apt-get >/dev/null || ! "$${as_root[@]}" true 2>/dev/null; then \
		echo "error: $(2); install it as root: apt-get install $(1)" >&2; exit 1; \
	fi; \
	echo "Installing Debian packages: $(1)" >&2; \
	"$${as_root[@]}" apt-get update -qq; \
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(1) >/dev/null
endef

# The bundle is kept as long as neither the checkpoint nor the exporter changes; files are compared, not their dates.
define ensure_bundle
	$(BIN)/python -c 'import sys; from pathlib import Path; from worldvln_edge.training.evaluation.bundle_source import \
		ensure_bundle; ensure_bundle(Path(sys.argv[1]), Path(sys.argv[2]))' $(1) $(2)
endef

# Random weights: nothing but the schedule is measured with it.
define ensure_narrow_bundle
	[ -e runs/bench/narrow/checkpoint ] || $(BIN)/worldvln-edge make-checkpoint --preset narrow --random 0 \
		--out runs/bench/narrow/checkpoint
	$(call ensure_bundle,runs/bench/narrow/checkpoint,runs/bench/narrow/bundle)
endef

# The variable silences an advertisement; with --quiet, warnings would not be counted.
define build_site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build >build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
endef

.PHONY: help setup demo test test-slow test-ros bench bench-schedule profiles profiles-schedule bench-gpu bench-export bench-serve bench-record lint docs clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: setup $(VENV)/.rendering ## Export the committed checkpoint, serve it, fly held-out tasks; writes runs/demo/.
	$(BIN)/worldvln-edge demo

# Tests that share traced graphs or a fixture run in the same process (tests/process_groups.py).
test: setup $(VENV)/.rendering $(VENV)/.browser ## Run the tests (not the slow, GPU and ROS ones), and say what was skipped and why.
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not slow and not gpu and not ros" -rsx --durations=5

test-slow: setup $(VENV)/.rendering ## Run the slow tests.
	$(BIN)/python -m pytest -m "slow and not gpu and not ros" -rsx --durations=5

test-ros: setup $(VENV)/.rendering $(ROS_VENV)/.installed ## Fly the simulator through real topics, of ROS 1 and over DDS (10 minutes).
	$(call ensure_bundle,$(CHECKPOINT),runs/bench/bundle)
	$(ROS_VENV)/bin/python -m pytest tests/ros_bridge -m "ros or (slow and not gpu)" -rA --durations=5

bench: setup $(CHECKPOINT)/model.safetensors ## Time the committed checkpoint on this machine, stage by stage.
	$(call ensure_bundle,$(CHECKPOINT),runs/bench/bundle)
	$(BIN)/worldvln-edge bench runs/bench/bundle $(BENCH_ARGS)

bench-schedule: setup ## The exact schedule against the research server's, at the released scales (16 GB of memory, minutes).
	$(ensure_narrow_bundle)
	$(BIN)/worldvln-edge bench runs/bench/narrow/bundle --against full-horizon $(BENCH_ARGS)

profiles: setup $(VENV)/.rendering $(CHECKPOINT)/model.safetensors ## What the generation profiles of the committed checkpoint save and cost (15 minutes).
	$(call ensure_bundle,$(CHECKPOINT),runs/bench/bundle)
	$(BIN)/worldvln-edge profiles runs/bench/bundle --threads 1 --markdown runs/bench/profiles.md $(PROFILES_ARGS)

profiles-schedule: setup $(VENV)/.rendering ## What they save at the released scales, on random weights (10 minutes).
	$(ensure_narrow_bundle)
	$(BIN)/worldvln-edge profiles runs/bench/narrow/bundle --threads 1 --flights 2 --tasks 0 $(PROFILES_ARGS)

# Asks for the GPU first, because checkpoint and bundle take 42 GB and half an hour.
bench-gpu: setup ## Time every graph at the released 8B width on a GPU, random weights (VENV=.venv-gpu EXTRAS=gpu,export).
	@why=$$($(BIN)/python -c 'from worldvln_edge.runtime.bench.bench_device import why_not_measurable; \
		print(why_not_measurable() or "")'); \
	if [ -n "$$why" ]; then echo "not measured: $$why"; exit 0; fi; set -x; \
	[ -e runs/bench/gpu/checkpoint ] || $(BIN)/worldvln-edge make-checkpoint --preset worldvln-8b --random 0 \
		--out runs/bench/gpu/checkpoint; \
	[ -e runs/bench/gpu/bundle/manifest.json ] || $(BIN)/worldvln-edge export --checkpoint runs/bench/gpu/checkpoint \
		--out runs/bench/gpu/bundle --precision fp16; \
	$(BIN)/worldvln-edge bench runs/bench/gpu/bundle --device cuda $(BENCH_ARGS)

bench-export: setup ## Measure exports at the released sizes, on random weights (45 GB of disk, about 20 minutes).
	$(BIN)/worldvln-edge bench-export --work runs/bench-export

bench-serve: setup ## Time the server itself under load, without a model (4 minutes).
	$(BIN)/worldvln-edge bench-serve $(BENCH_ARGS)

bench-record: setup $(CHECKPOINT)/model.safetensors ## What recording costs a flight of the committed checkpoint (a minute).
	$(call ensure_bundle,$(CHECKPOINT),runs/bench/bundle)
	$(BIN)/worldvln-edge bench-record runs/bench/bundle --threads 1 $(BENCH_ARGS)

# mypy and import-linter follow the mapped rooms only in an installed wheel, so that is what they read. Both run inside
# build/lint, which hides the repository's own folders; build/ starts empty, or the wheel would hold deleted files.
lint: setup ## Check style, types and the rule between rooms.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && mkdir build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/log 2>&1 || { cat build/log; exit 1; }
	$(BIN)/python -m pip install -qq --no-deps --no-index --target build/lint build/wheel/*.whl
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		worldvln_edge/*.py worldvln_edge/runtime worldvln_edge/ros_bridge
	cd build/lint && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache --no-logo
	$(build_site)

docs: setup ## Write the documentation site into build/site; a broken link or an undocumented name is an error.
	rm -rf build && mkdir build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/log 2>&1 || { cat build/log; exit 1; }
	$(BIN)/python -m pip install -qq --no-deps --no-index --target build/lint build/wheel/*.whl
	$(build_site)

clean: ## Remove what can be made again, except .venv and runs.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache runs/bench
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: $(VENV)/.installed ## Make .venv with all packages; the targets above do it themselves.

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer here; install one, or name it: make PYTHON=..." >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		$(call apt_install,python3-venv,$(PYTHON) cannot make virtual environments); \
	fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing packages into $(VENV) (about 2 GB, some minutes)" >&2
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# A context is made, not a library looked for: libEGL without a driver behind it would not render.
$(VENV)/.rendering: $(VENV)/.installed
	@check='from worldvln_edge.training.sim.camera import make_gl_context; make_gl_context(8, 8).free()'; \
	if ! $(BIN)/python -c "$$check" 2>/dev/null; then \
		$(call apt_install,libegl1 libgl1-mesa-dri,the simulator cannot render offscreen because EGL is missing); \
		$(BIN)/python -c "$$check"; \
	fi
	@touch $@

# An environment of its own: the packages of .venv come first, Debian's behind them, so that no version is replaced.
# Debian's packages are for Debian's Python, and .venv has to be of that version.
$(ROS_VENV)/.installed: $(VENV)/.installed
	@found='import rospy, roslaunch, diagnostic_msgs.msg, nav_msgs.msg, sensor_msgs.msg, tf2_msgs.msg, trajectory_msgs.msg'; \
	if ! command -v roscore >/dev/null || ! /usr/bin/python3 -c "$$found" 2>/dev/null; then \
		$(call apt_install,$(ROS_PACKAGES),ROS 1 is not installed); \
	fi
	rm -rf $(ROS_VENV)
	$(BIN)/python -m venv --without-pip $(ROS_VENV)
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	printf 'import site; site.addsitedir("%s")\n/usr/lib/python3/dist-packages\n' "$$packages" \
		>"$$($(ROS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ros.pth"
	$(ROS_VENV)/bin/python -c 'from worldvln_edge.ros_bridge.ports import rospy_wire'
	@touch $@

$(VENV)/.browser: $(VENV)/.installed
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
		$(call apt_install,chromium,the dashboard's tests need a browser); \
	fi
	@touch $@
