# Sourced by the launch scripts: what they share.
# shellcheck shell=bash

usage() {
    cat <<END
usage: launch/${0##*/} CONFIG.yaml [section.key=value ...]

$1

Run it where the paths of the configuration lead from, with the environment's bin directory on PATH.
Environment:
  NPROC                 ranks on this node; default: one per GPU, without GPUs two (one on a single core)
  CUDA_VISIBLE_DEVICES  the GPUs to use
  OMP_NUM_THREADS       threads of each rank; default: the cores divided by the ranks
${2:-}
Ends with 0 done, 2 configuration or data refused, 75 stopped with a good checkpoint, another code on failure.
END
}

# Sets NPROC and what the ranks inherit: OMP_NUM_THREADS, and without GPUs DS_ACCELERATOR.
prepare_environment() {
    local gpus cores
    if [[ ! ${NPROC:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "NPROC=$NPROC must be a number of ranks" >&2
        exit 2
    fi
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    if ((gpus)); then
        NPROC=${NPROC:-$gpus}
    else
        NPROC=${NPROC:-$((cores < 2 ? 1 : 2))}
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
}

# check_run RANKS CONFIG.yaml [section.key=value ...]: ends the script with the check's own code when the run would be refused.
# The check is one process; the configuration is also read for the real number of ranks. Sets run_directory.
check_run() {
    local ranks=$1 config
    shift
    config=$(WORLD_SIZE=$ranks python -m pdl train --print-config "$@")
    run_directory=$(python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["training"]["output_dir"])' <<<"$config")
    echo "checking $1 and its data, then training on $ranks ranks"
    python -m pdl train --check "$@" >/dev/null # the run says the same again
}

# run_launcher COMMAND ...: runs a launcher to its end and ends the script with the true exit code.
# Launchers change exit codes (torchrun makes 1 of all, deepspeed 0 of a kill), so the run writes its own into status.json.
run_launcher() {
    local started code=0
    started=$(mktemp)
    # A process group of its own: the deepspeed launcher does not pass signals on, so they go to all that it started.
    set -m
    "$@" </dev/null &
    launcher=$!
    set +m
    trap 'kill -TERM -- "-$launcher" || true' HUP INT TERM
    wait "$launcher" || code=$?
    while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.1; done
    if [[ $run_directory/status.json -nt $started ]]; then
        code=$(python -c '
import json, sys
written = json.load(open(sys.argv[1]))["exit_code"]
print((int(sys.argv[2]) or 1) if written is None else written)
' "$run_directory/status.json" "$code")
    fi
    rm "$started"
    exit "$code"
}
