# `make` lists the targets. Everything is installed into .venv, by the first target that needs it.

TASKS := summarization dialogue style-transfer code-generation
TRAIN := $(TASKS:%=train-%)
PORT ?= 6006
export NPROC
export PATH := $(CURDIR)/.venv/bin:$(PATH)

LAUNCH := launch-torchrun launch-deepspeed launch-slurm
SAMPLE := configs/summarization/sample.yaml

.PHONY: help install $(TRAIN) $(LAUNCH) test test-slow test-faults test-cluster lint tensorboard clean

help:
	@echo "make install                install everything into .venv; the other targets do it when they need it"
	@echo "make train-summarization    finetune on the embedded sample: documents to summaries"
	@echo "make train-dialogue         ... a conversation to its next turn"
	@echo "make train-style-transfer   ... a sentence to the same one in another style"
	@echo "make train-code-generation  ... a description to a Python function"
	@echo "make launch-torchrun        finetune on several nodes under torchrun: on the hosts of HOSTS=, a file, over ssh"
	@echo "make launch-deepspeed       ... under the deepspeed launcher"
	@echo "make launch-slurm           ... as a Slurm job on NNODES= nodes; SBATCH=\"--gpus-per-node=8 --time=24:00:00\" and the like"
	@echo "make test                   the tests, ARGS go to pytest"
	@echo "make test-slow              the long tests: every layout of ranks, every kind of model"
	@echo "make test-faults            runs that are killed, stopped, damaged and starved, and what became of them"
	@echo "make test-cluster           the launchers on several hosts, which are namespaces of this machine; needs root"
	@echo "make lint                   ruff, checks and format"
	@echo "make tensorboard            show all runs at http://127.0.0.1:$(PORT); another port with PORT="
	@echo "make clean                  remove caches and build files; runs and .venv stay"
	@echo
	@echo "Training takes CONFIG= (default: the embedded sample), NPROC= ranks (default: one per GPU; two without GPUs) and"
	@echo "ARGS= overrides:  make train-summarization CONFIG=my.yaml NPROC=4 ARGS=\"training.max_steps=100 loss.alpha=0.5\""

install: .venv/installed

# The samples are sized for one or two ranks; a CONFIG of your own gets every GPU.
ifeq ($(CONFIG)$(NPROC),)
$(TRAIN): export CUDA_VISIBLE_DEVICES ?= 0,1
endif
$(TRAIN): train-%: .venv/installed
	@launch/torchrun.sh $(or $(CONFIG),configs/$(subst -,_,$*)/sample.yaml) $(ARGS)

# Without HOSTS= each node runs the command itself, with the variables that launch/<launcher>.sh --help lists.
launch-torchrun launch-deepspeed: launch-%: .venv/installed
	@$(if $(HOSTS),HOSTFILE="$(HOSTS)" )launch/$*.sh $(or $(CONFIG),$(SAMPLE)) $(ARGS)

launch-slurm: .venv/installed
	@sbatch $(if $(NNODES),--nodes=$(NNODES) )$(if $(SBATCH),$(SBATCH) )launch/slurm.sbatch $(or $(CONFIG),$(SAMPLE)) $(ARGS)

test: .venv/installed
	python -m pytest $(ARGS)

test-slow: .venv/installed
	python -m pytest -m slow $(ARGS)

test-faults: .venv/installed
	python -m pytest -m "faults or not slow" tests/test_faults.py tests/test_launch.py tests/test_checkpoint.py $(ARGS)

CLUSTER_TOOLS := ip:iproute2 unshare:util-linux ps:procps ssh:openssh-client sshd:openssh-server pdsh:pdsh \
	slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge shellcheck:shellcheck

test-cluster: .venv/installed
	@missing=; for tool in $(CLUSTER_TOOLS); do \
	    PATH=$$PATH:/usr/sbin:/sbin command -v "$${tool%:*}" >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	if [ -n "$$missing" ]; then echo "make: the tests of clusters need: apt-get install$$missing" >&2; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "make: the tests of clusters need root, for network namespaces" >&2; missing=root; fi; \
	[ -z "$$missing" ]
	python -m pytest -m "cluster or not slow" tests/test_cluster.py tests/test_slurm.py tests/test_kubernetes.py $(ARGS)
	python -m pytest -m cluster tests/test_preflight.py tests/test_scaling.py $(ARGS)

lint: .venv/installed
	ruff check .
	ruff format --check .

tensorboard: .venv/installed
	tensorboard --logdir runs --host 127.0.0.1 --port $(PORT)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
	find . \( -path ./runs -o -path ./.venv -o -path ./.git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# --- installation ---

PINNED = $(shell grep -oE '^($(1))==[^ ]+' requirements.txt)
# Python >= 3.11 with venv, and the headers that DeepSpeed's extensions are compiled against.
FITS := import os, sys, sysconfig, venv, ensurepip; \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))

# New pins get a new environment. One that `make` did not complete is completed.
# DeepSpeed's collectives for ranks on the CPU are compiled here: left to the first run it is a silent minute, and a run
# killed in it leaves a lock file on which the next one hangs. DeepSpeed has them for Linux only.
.venv/installed: requirements.txt pyproject.toml
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 none; do \
	    "$$python" -c '$(FITS)' 2>/dev/null && break; \
	done; \
	if [ "$$python" = none ] || ! command -v "$${CXX:-c++}" >/dev/null; then \
	    echo "make: this needs Python >= 3.11 with venv and headers, and a C++ compiler. One line installs them:" >&2; \
	    $(INSTALL_LINE); \
	    exit 1; \
	fi; \
	set -x; "$$python" -m venv $(if $(and $(wildcard $@),$(filter requirements.txt,$?)),--clear) .venv
	.venv/bin/python -m pip install $(call PINNED,torch|setuptools)
	DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=$(if $(filter Linux,$(shell uname -s)),1,0) \
	    .venv/bin/python -m pip install --no-build-isolation --no-deps --no-cache-dir $(call PINNED,deepspeed)
	.venv/bin/python -m pip install --no-build-isolation -r requirements.txt
	.venv/bin/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@

define INSTALL_LINE
sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo "; \
python=python3; [ ! -x /usr/bin/python3 ] || /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || python=python3.11; \
if command -v apt-get >/dev/null; then echo "  $${sudo}apt-get install -y $$python $$python-venv $$python-dev g++"; \
elif command -v dnf >/dev/null; then echo "  $${sudo}dnf install -y $$python $$python-devel gcc-c++"; \
elif command -v brew >/dev/null; then echo "  brew install python@3.12"; \
else echo "  (your package manager's names for them)"; fi >&2
endef
