#!/usr/bin/env bash
# Finetune under torchrun: launch/torchrun.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about="Finetunes on this machine with torchrun, or on several, each running the same command."
several="  NNODES                number of nodes; default 1
  RDZV_ENDPOINT         with several nodes: host:port of one of them, the same on all
  RDZV_ID               with several nodes: a name for this job, the same on all; default pdl"
case ${1:-} in
    -h | --help) usage "$about" "$several" && exit ;;
    "") usage "$about" "$several" >&2 && exit 2 ;;
esac

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
run_launcher torchrun "${meeting[@]}" --nproc-per-node "$NPROC" -m pdl train "$@"
