# Sourced by the launch scripts: what they share.
# shellcheck shell=bash

arguments=() # the configuration and its overrides
dry_run=     # not empty where the launcher's command is to be printed, not run

# --- arguments ---

# read_arguments ABOUT MORE ARGUMENT ...: sets `arguments` and `dry_run`; ends the script after --help.
read_arguments() {
    local about=$1 more=$2 argument
    shift 2
    for argument; do
        case $argument in
            -h | --help) usage "$about" "$more" && exit ;;
            --dry-run) dry_run=yes ;;
            *) arguments+=("$argument") ;;
        esac
    done
    if ((${#arguments[@]} == 0)); then
        usage "$about" "$more" >&2
        exit 2
    fi
}

usage() {
    cat <<END
usage: launch/${0##*/} [--dry-run] CONFIG.yaml [section.key=value ...]

$1

Run it where the paths of the configuration lead from, with the environment's bin directory on PATH. --dry-run prints the
launcher's command, as a line to paste, with the variables that are set for it, and runs nothing.
Environment:
  NPROC                 ranks on this node; default: one per GPU, without GPUs two (one on a single core)
  CUDA_VISIBLE_DEVICES  the GPUs to use
  OMP_NUM_THREADS       threads of each rank; default: the cores divided by the ranks
  STOP_SECONDS          from a signal to the end of a rank that does not stop; longer than a save; default 600
$2
  INTERFACE             the network interface that joins the nodes (eth0, ib0), for NCCL and gloo, where they choose a wrong one
  PDL_PREFLIGHT         0: start without the check that nodes agree on versions, data, clocks and a working all-reduce
  PDL_CACHE, HF_HOME    where token rows and counts, models and data of the hub are kept; HF_HUB_OFFLINE=1: ask no hub
TERM, INT (Ctrl-C), USR1 or HUP stops the run at its next step: it saves and ends with 75. Once more, 10 s or later: at once.
Ends with 0 done, 2 configuration or data refused, 75 stopped by a signal (the same command goes on), another code on failure.
END
}

# refuse MESSAGE: ends the script with 2.
refuse() {
    echo "launch/${0##*/}: $1" >&2
    exit 2
}

# require_number NAME PATTERN WHAT: refuses what is no number.
require_number() {
    [[ ${!1} =~ ^$2$ ]] || refuse "$1=${!1} must be $3"
}

# quoted WORD ...: one line that a shell reads as these words.
quoted() {
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line# }"
}

# --- the environment of a run, all of it ---

# What a run reads. Of these, those that are set go to every host where this script starts others (`*`: all that begin so).
environment=(
    PATH                       # python, torchrun and deepspeed: at the same place on every host
    PYTHONPATH LD_LIBRARY_PATH # the same for what they import and link
    CUDA_VISIBLE_DEVICES       # the GPUs to use, the same on every host
    INTERFACE                  # the network between nodes; sets the two below
    'NCCL_*'                   # of GPUs: NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says what NCCL chose, and why it failed
    'FI_*' 'UCX_*'             # of the libraries that NCCL may use for it
    'GLOO_*'                   # of CPUs: GLOO_SOCKET_IFNAME
    'OMP_*'                    # OMP_NUM_THREADS: threads of a rank; more than there are cores is slow
    'TORCH*' 'PET_*' 'CUBLAS_*' # what torch, torchrun and their libraries read
    'DS_*' 'DEEPSPEED_*'       # DS_ACCELERATOR: cuda, or cpu
    CUDA_HOME CXX              # DeepSpeed compiles extensions with these
    'PDL_*'                    # PDL_CACHE: where token rows and counts are kept; PDL_PREFLIGHT=0: no check of the nodes
    'HF_*'                     # HF_HOME: where models and data of the hub are kept; HF_HUB_OFFLINE=1: ask no hub
    '*_proxy'                  # the way to it
    TOKENIZERS_PARALLELISM     # threads of the tokenizer, besides those of the ranks
    NPROC STOP_SECONDS MAX_RESTARTS LOG_DIR # what this script is told, see --help
)
defaults=() # the names of what was set here

# default NAME VALUE: for what the user has not set.
default() {
    if [[ -z ${!1:-} ]]; then
        export "$1=$2"
        defaults+=("$1")
    fi
}

# Sets NPROC, and what the ranks inherit.
prepare_environment() {
    local gpus cores quota period
    unset RANK # of a cluster's making: it is what tells a rank from other processes
    [[ -z ${NPROC:-} ]] || require_number NPROC '[1-9][0-9]*' 'a number of ranks'
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    # A container may have fewer than it sees: so much time on them, of each period.
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
        quota=$(((quota + period - 1) / period))
        cores=$((quota < cores ? quota : cores))
    fi
    if ((gpus)) && [[ ${DS_ACCELERATOR:-} != cpu ]]; then
        devices='a GPU each'
        NPROC=${NPROC:-$gpus}
    else
        devices='without GPUs'
        NPROC=${NPROC:-$((cores < 2 ? 1 : 2))}
        default DS_ACCELERATOR cpu # else DeepSpeed looks for CUDA where torch was built with it
    fi
    default OMP_NUM_THREADS $((cores > NPROC ? cores / NPROC : 1)) # torchrun would set 1, deepspeed lets each rank use all cores
    if [[ -n ${INTERFACE:-} ]]; then
        default NCCL_SOCKET_IFNAME "$INTERFACE" # between GPUs
        default GLOO_SOCKET_IFNAME "$INTERFACE" # between CPUs
    fi
}

# print_command COMMAND ...: the command with the variables that were set for it, as one line.
print_command() {
    local name words=()
    for name in "${defaults[@]}"; do
        words+=("$name=${!name}")
    done
    quoted ${words:+env} "${words[@]}" "$@"
}

# --- processes and signals ---

launch=$(mktemp -u "$HOSTNAME-$$-XXXXXXXXXXXX") # names this launch to the run, and marks its processes
forwards=                                       # not empty where the launcher passes signals on to its ranks
running=                                        # process id, and group, of what `attend` runs, or ran last
channels=()                                     # the hosts on which this script runs too, started from here
asked=                                          # the signal that the script was sent

for signal in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "receive $signal" "$signal"
done
trap 'receive TERM' HUP QUIT

# Started over ssh by `run_on_hosts`: signals come as words, and their end is the end of whoever started this.
if [[ -n ${PDL_SIGNALS:-} ]]; then
    unset PDL_SIGNALS
    {
        while read -r signal; do
            kill -"$signal" $$
        done
        kill -TERM $$
    } <&0 >/dev/null 2>&1 &
    # shellcheck disable=SC2064
    trap "kill $! 2>/dev/null || true" EXIT
    exec </dev/null
fi

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
    local ranks channel
    for channel in "${channels[@]}"; do
        (echo "$1" >&"$channel") 2>/dev/null || true # ended meanwhile; a subshell, as SIGPIPE would end the script
    done
    ((${#channels[@]} == 0)) || return 0
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
    local deadline alone
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
    alone=$SECONDS deadline=$((SECONDS + STOP_SECONDS)) # by the clock: with many processes a round takes its time
    while [[ -n $(processes) ]]; do
        if ((SECONDS >= deadline)); then
            echo "launch/${0##*/}: not stopped within $STOP_SECONDS s; killing what is left" >&2
            asked='' deadline=$((SECONDS + STOP_SECONDS))
            # shellcheck disable=SC2046
            kill -KILL $(processes) 2>/dev/null || true
        fi
        # torchrun that is sent several signals while its ranks end waits for ever for the threads that read their output.
        [[ -z $(processes RANK) ]] || alone=$SECONDS
        if ((SECONDS - alone >= 20)); then
            kill -KILL -- "-$running" 2>/dev/null || true
        fi
        sleep 0.2
    done
    code=0
    wait "$running" || code=$?
}

# --- a run ---

STOP_SECONDS=${STOP_SECONDS:-600}
require_number STOP_SECONDS '[1-9][0-9]*' 'a number of seconds'

# check_run "RANKS ..." CONFIG.yaml [section.key=value ...]: ends the script with the check's own code when the run would be refused.
# The check is one process; the configuration is also read for the real number of ranks, or each that there can be. Sets run_directory.
check_run() {
    local counts=$1 ranks config refused='' other=()
    shift
    [[ -z $dry_run ]] || return 0
    for ranks in $counts; do
        config=$(WORLD_SIZE=$ranks python -m pdl train --print-config "$@") || {
            code=$?
            refused+=" $ranks"
        }
    done
    if [[ -n $refused ]]; then
        [[ $counts == "$ranks" ]] || refuse "there can be $counts ranks; the configuration must do for each, and is refused on$refused"
        exit "$code"
    fi
    run_directory=$(python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["training"]["output_dir"])' <<<"$config")
    echo "checking $1 and its data, then training on ${counts// / or } ranks, $devices"
    if [[ $counts != "$ranks" ]]; then
        other=(training.resume=auto "training.output_dir=$(mktemp -u)") # the run may be going on, for this node to join it
    fi
    attend python -m pdl train --check "$@" "${other[@]}" >/dev/null # the run says the same again
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
# with the name of its launch. Of several nodes each names its own, and the first one's is written: any other name or code will do.
run_launcher() {
    local written before after refused
    if [[ -n $dry_run ]]; then
        print_command "$@"
        exit
    fi
    before=$(read_status)
    refused=$(mktemp -u)
    PDL_REFUSED=$refused attend "$@"
    after=$(read_status)
    if [[ -e $refused ]]; then # on this node, at the latest by all ranks together, maybe before there is a status
        rm "$refused"
        code=2
    elif [[ $after != "$before" ]]; then
        written=${after%% *}
        [[ $written == None ]] && written=$((code ? code : 1)) # a rank was killed
        code=$written
    elif [[ -n $asked && $code != 0 ]]; then
        code=75 # before the run began
    fi
    ((code != 75)) || stopped # said last: launchers say alarming things
    exit "$code"
}

# --- several hosts ---

# address_of INTERFACE: its IPv4 address; nothing where there is none, or where this is a pattern of NCCL's (=eth0, ^docker0, eth).
address_of() {
    [[ $1 =~ ^[A-Za-z0-9] && -e /sys/class/net/$1 ]] || return 0
    python -c '
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
        told = fcntl.ioctl(s, 0x8915, struct.pack("256s", sys.argv[1].encode()[:15]))  # SIOCGIFADDR
        print(socket.inet_ntoa(told[20:24]))
    except OSError:
        pass
' "$1"
}

# --- over ssh ---

settings=() # of each host: variables and their values

# read_hosts: sets `hosts` and `slots` from HOSTFILE, and MASTER_ADDR. NPROC goes before what stands there.
read_hosts() {
    local line wrong=
    hosts=() slots=()
    [[ -f $HOSTFILE ]] || refuse "HOSTFILE=$HOSTFILE is no file"
    [[ -z ${NPROC:-} ]] || require_number NPROC '[1-9][0-9]*' 'a number of ranks'
    while read -r line || [[ -n $line ]]; do
        if [[ $line =~ ^([^#[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)$ && " ${hosts[*]} " != *" ${BASH_REMATCH[1]} "* ]]; then
            hosts+=("${BASH_REMATCH[1]}")
            slots+=("${NPROC:-${BASH_REMATCH[2]}}")
        elif [[ $line != "" && $line != "#"* ]]; then
            wrong+=$'\n'"  - $line"
        fi
    done <"$HOSTFILE"
    [[ -z $wrong ]] || refuse "HOSTFILE=$HOSTFILE: lines must read \"host slots=ranks\", each host once:$wrong"
    ((${#hosts[@]})) || refuse "HOSTFILE=$HOSTFILE names no host"
    MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
}

# on_host NUMBER: sets `command`, which runs this script, as it was called, on a host, with what it is to know there.
on_host() {
    local words=() pattern name
    for pattern in "${environment[@]}"; do
        for name in $(compgen -e); do
            # shellcheck disable=SC2053
            [[ $name != $pattern ]] || words+=("$name=${!name}")
        done
    done
    words+=(PDL_SIGNALS=stdin)
    # A host that is cut off is noticed within half a minute, one that asks for a password at once.
    command=(ssh -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3 "${hosts[$1]}"
        "cd $(quoted "$PWD") && exec env $(quoted "${words[@]}") ${settings[$1]} $(quoted "$(realpath -s "$0")" "${arguments[@]}")")
}

# run_on_hosts: runs this script on every host, with the variables in `settings`, quoted, and ends with the code of the first. Each host looks after its own processes. Signals reach it over its connection; when that ends, as it does when this script is
# killed, it stops. What fails on one host stops the others.
run_on_hosts() {
    local number command directory channel failed='' processes=() codes=()
    if [[ -z $dry_run ]]; then
        running=starting
        directory=$(mktemp -d)
    fi
    set -m # process groups of their own: Ctrl-C on a terminal reaches the script alone
    for number in "${!hosts[@]}"; do
        on_host "$number"
        if [[ -n $dry_run ]]; then
            quoted "${command[@]}"
        else
            mkfifo "$directory/$number"
            "${command[@]}" <"$directory/$number" &
            processes+=($!)
        fi
    done
    set +m
    [[ -z $dry_run ]] || exit 0
    for number in "${!hosts[@]}"; do
        exec {channel}>"$directory/$number" # now: no process but this one holds it
        channels+=("$channel")
    done
    rm -r "$directory"
    running=hosts
    [[ -z $asked ]] || pass_on "$asked"
    while ((${#processes[@]})); do
        sleep 0.5
        for number in "${!processes[@]}"; do
            if ! kill -0 "${processes[number]}" 2>/dev/null; then
                codes[number]=0
                wait "${processes[number]}" || codes[number]=$?
                unset "processes[number]"
                if ((codes[number])) && [[ -z $failed ]]; then
                    failed=${codes[number]}
                    [[ -n $asked ]] || pass_on TERM
                fi
            fi
        done
    done
    # Stopped, and nobody had asked: it was stopped for what failed elsewhere.
    ((codes[0] != 75)) || [[ -n $asked ]] || exit "$failed"
    exit "${codes[0]}"
}
