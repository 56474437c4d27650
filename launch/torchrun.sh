#!/usr/bin/env bash
# Finetune under torchrun: launch/torchrun.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about="Finetunes on this machine with torchrun, or on several, each running the same command."
more="  MAX_RESTARTS          how often all ranks are started again, from the last checkpoint, after one died; default 0
  NNODES                number of nodes; default 1
  RDZV_ENDPOINT         with several nodes: host:port of one of them, the same on all
  RDZV_ID               with several nodes: a name for this job, the same on all; default pdl"
case ${1:-} in
    -h | --help) usage "$about" "$more" && exit ;;
    "") usage "$about" "$more" >&2 && exit 2 ;;
esac

MAX_RESTARTS=${MAX_RESTARTS:-0}
require_number MAX_RESTARTS '(0|[1-9][0-9]*)' restarts
NNODES=${NNODES:-1}
if ((NNODES == 1)); then
    meeting=(--standalone) # a free port, so that two runs do not meet
elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
    meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-pdl}")
else
    echo "NNODES=$NNODES needs RDZV_ENDPOINT=host:port" >&2
    exit 2
fi

prepare_environment
check_run $((NNODES * NPROC)) "$@"
forwards=yes
if ((MAX_RESTARTS)); then
    # Else ranks that are started again find the addresses of the dead ones in torchrun's store (pytorch issue 135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
run_launcher torchrun "${meeting[@]}" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$STOP_SECONDS" \
    --log-dir /dev/null -m pdl train "$@" # no directory in /tmp for each run
