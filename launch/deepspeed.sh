#!/usr/bin/env bash
# Finetune under the deepspeed launcher: launch/deepspeed.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about="Finetunes on this machine with the deepspeed launcher."
case ${1:-} in
    -h | --help) usage "$about" && exit ;;
    "") usage "$about" >&2 && exit 2 ;;
esac

prepare_environment
check_run "$NPROC" "$@"
# --num_gpus counts ranks on any accelerator. It takes the first GPUs whatever CUDA_VISIBLE_DEVICES says; --include names them.
if [[ ${DS_ACCELERATOR:-} != cpu && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    ranks=(--include "localhost:$(cut -d, -f"1-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")")
else
    ranks=(--num_gpus "$NPROC")
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
run_launcher deepspeed "${ranks[@]}" --master_port "$port" --quiet --module pdl train "$@"
