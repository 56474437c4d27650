#!/usr/bin/env bash
# Finetune under torchrun: launch/torchrun.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about="Finetunes with torchrun: on this machine; on several, each running the same command; or on those of HOSTFILE, started from here."
more="  MAX_RESTARTS          how often all ranks are started again, from the last checkpoint, after one died; default 0
  LOG_DIR               a directory: each rank's output is kept in a file below it too, by host and start
  NNODES                number of nodes; default 1; or least:most, needs MAX_RESTARTS: a node that is lost costs a restart, and nodes
                        may join at any time, when all ranks save (torchrun gives them 30 s) and start again. Global batches stay the
                        same, so every number of nodes must divide them: 2:4 with 8 GPUs each needs multiples of 96 (of 16, 24, 32).
                        Any node may get rank 0, so they must share training.output_dir
  RDZV_ENDPOINT         with several nodes: host:port of one of them, the same on all. The run ends with that node: with MAX_RESTARTS
                        stop the run by a signal to it, or to all; after one to another node, the rest wait for that to come back
  RDZV_ID               with several nodes: a name for this job, the same on all; default pdl
  HOSTFILE              instead of NNODES: a file of lines \"host slots=ranks\"; this script is started on each over ssh. Ranks are
                        numbered by torchrun, in the order of the hosts' own names (of their addresses with INTERFACE)"
read_arguments "$about" "$more" "$@"

MAX_RESTARTS=${MAX_RESTARTS:-0}
require_number MAX_RESTARTS '(0|[1-9][0-9]*)' 'a number of restarts'

if [[ -n ${HOSTFILE:-} ]]; then
    [[ -z ${NNODES:-} ]] || refuse "HOSTFILE says how many nodes there are, and NNODES=$NNODES too; give one of them"
    read_hosts
    endpoint=${RDZV_ENDPOINT:-$MASTER_ADDR:29400}
    for number in "${!hosts[@]}"; do
        settings+=("$(quoted "NNODES=${#hosts[@]}" "NPROC=${slots[number]}" "RDZV_ENDPOINT=$endpoint" "RDZV_ID=${RDZV_ID:-$launch}")")
    done
    run_on_hosts
fi

NNODES=${NNODES:-1}
[[ $NNODES =~ ^([1-9][0-9]*)(:([1-9][0-9]*))?$ ]] || refuse "NNODES=$NNODES must be a number of nodes, or least:most"
least=${BASH_REMATCH[1]} most=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
((least <= most)) || refuse "NNODES=$NNODES: the least comes first"
((least == most || MAX_RESTARTS)) || refuse "NNODES=$NNODES needs MAX_RESTARTS: a node that is lost costs one restart"
if ((most == 1)); then
    meeting=(--standalone) # a free port, so that two runs do not meet
elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
    # Nodes come when their checks are done; by default torchrun waits a minute for the one that keeps the store.
    meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-pdl}"
        --rdzv-conf "read_timeout=1800,join_timeout=1800${PET_RDZV_CONF:+,$PET_RDZV_CONF}")
    # The address that torchrun tells the others is its host's name, unless this is said; names may lead elsewhere, or nowhere.
    address=$(address_of "${INTERFACE:-}")
    [[ -z $address ]] || meeting+=(--local-addr "$address")
else
    refuse "NNODES=$NNODES needs RDZV_ENDPOINT=host:port"
fi
if [[ -n ${LOG_DIR:-} ]]; then
    logs=(--log-dir "$LOG_DIR/$HOSTNAME" --tee 3)
else
    logs=(--log-dir /dev/null) # no directory in /tmp for each run
fi

prepare_environment
if ((least < most)); then
    default PDL_ELASTIC 1 # ranks are stopped when a node joins, and are to go on when they are started again
fi
if ((MAX_RESTARTS)); then
    # Else ranks that are started again find the addresses of the dead ones in torchrun's store (pytorch issue 135712).
    default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
fi
check_run "$(seq -s ' ' $((least * NPROC)) "$NPROC" $((most * NPROC)))" "${arguments[@]}"
forwards=yes
run_launcher torchrun "${meeting[@]}" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$STOP_SECONDS" \
    "${logs[@]}" -m pdl train "${arguments[@]}"
