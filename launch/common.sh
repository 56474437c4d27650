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
  STOP_SECONDS          from a signal to the end of a rank that does not stop; longer than a save; default 600
${2:-}
TERM, INT (Ctrl-C), USR1 or HUP stops the run at its next step: it saves and ends with 75. Once more, 10 s or later: at once.
Ends with 0 done, 2 configuration or data refused, 75 stopped by a signal (the same command goes on), another code on failure.
END
}

# --- processes and signals ---

launch=$(mktemp -u "$HOSTNAME-$$-XXXXXXXXXXXX") # names this launch to the run, and marks its processes
forwards=                                       # not empty where the launcher passes signals on to its ranks
running=                                        # process id, and group, of what `attend` runs, or ran last
asked=                                          # the signal that the script was sent

for signal in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "receive $signal" "$signal"
done
trap 'receive TERM' HUP QUIT

stopped() {
    echo "launch/${0##*/}: stopped by a signal; the same command goes on" >&2
    exit 75
}

receive() {
    asked=$1
    case $running in
        "") stopped ;;
        starting) ;; # `attend` sees to it
        *) pass_on "$1" ;;
    esac
}

# processes [RANK]: the ids of all that this launch started; only the ranks, and what they started.
processes() {
    local environs
    # grep fails for what it cannot read, too: processes of others, and those that end meanwhile.
    environs=$(grep -lszxF "PDL_LAUNCH=$launch" /proc/[0-9]*/environ || true)
    if [[ -n $environs && ${1:-} == RANK ]]; then
        # shellcheck disable=SC2086
        environs=$(grep -lsz '^RANK=' $environs || true)
    fi
    grep -o '[0-9]*' <<<"$environs" || true
}

# pass_on SIGNAL: the ranks are to stop. deepspeed's launchers would leave them alone, or kill them during a save: there they
# are told by process id. Before there are ranks nothing is to be saved, and what was started is to end.
pass_on() {
    local ranks
    ranks=$(processes RANK)
    if [[ -z $ranks ]]; then
        kill -TERM -- "-$running"
    elif [[ -n $forwards ]] && kill -0 "$running"; then
        kill -"$1" "$running"
    else
        # shellcheck disable=SC2086
        kill -"$1" $ranks
    fi 2>/dev/null || true # ended meanwhile
}

# attend COMMAND ...: runs a command to its end and sets `code`. Signals are passed on. What the command leaves behind is told
# to stop; what is there STOP_SECONDS after that, or after a signal, is killed, and `asked` is emptied: nothing stopped as asked.
attend() {
    local left=$((STOP_SECONDS * 5))
    running=starting
    set -m # a process group of its own: Ctrl-C on a terminal reaches the script alone
    {
        # The kernel hangs up on a group whose leader dies while one of its processes is suspended; ranks would die of it.
        trap '' HUP
        PDL_LAUNCH=$launch exec "$@"
    } </dev/null &
    running=$!
    set +m
    [[ -z $asked ]] || pass_on "$asked"
    wait "$running" || true # or until a signal
    [[ -n $asked || -z $(processes) ]] || pass_on TERM
    while [[ -n $(processes) ]]; do
        if ((left-- == 0)); then
            echo "launch/${0##*/}: not stopped within $STOP_SECONDS s; killing what is left" >&2
            asked=
            # shellcheck disable=SC2046
            kill -KILL $(processes) 2>/dev/null || true
        fi
        sleep 0.2
    done
    code=0
    wait "$running" || code=$?
}

# --- a run ---

# require_number NAME PATTERN WHAT: ends the script with 2 unless the variable is a number.
require_number() {
    if [[ ! ${!1} =~ ^$2$ ]]; then
        echo "$1=${!1} must be a number of $3" >&2
        exit 2
    fi
}

STOP_SECONDS=${STOP_SECONDS:-600}
require_number STOP_SECONDS '[1-9][0-9]*' seconds

# Sets NPROC and what the ranks inherit: OMP_NUM_THREADS, and without GPUs DS_ACCELERATOR.
prepare_environment() {
    local gpus cores
    unset RANK # of a cluster's making: it is what tells a rank from other processes
    [[ -z ${NPROC:-} ]] || require_number NPROC '[1-9][0-9]*' ranks
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
    attend python -m pdl train --check "$@" >/dev/null # the run says the same again
    [[ -z $asked ]] || stopped
    ((code == 0)) || exit "$code"
}

# Prints the exit code in status.json and what launch wrote it; "None None" where there is none.
read_status() {
    python -c '
import json, sys
try:
    with open(sys.argv[1]) as file:
        status = json.load(file)
    print(status["exit_code"], status["launch"])
except (OSError, ValueError, KeyError):
    print(None, None)
' "$run_directory/status.json"
}

# run_launcher COMMAND ...: runs a launcher to its end and ends the script with the true exit code.
# Launchers change exit codes (torchrun makes 1 of all, deepspeed 0 of a kill), so the run writes its own into status.json,
# with the name of its launch. Of several nodes each names its own, and the first one's is written: any new name will do.
run_launcher() {
    local written before now
    read -r _ before <<<"$(read_status)"
    attend "$@"
    read -r written now <<<"$(read_status)"
    if [[ $now != "$before" ]]; then
        [[ $written == None ]] && written=$((code ? code : 1)) # a rank was killed
        code=$written
    elif [[ -n $asked && $code != 0 ]]; then
        code=75 # before the run began
    fi
    ((code != 75)) || stopped # said last: launchers say alarming things
    exit "$code"
}
