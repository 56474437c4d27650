#!/usr/bin/env bash
# Finetune under the deepspeed launcher: launch/deepspeed.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about="Finetunes with the deepspeed launcher: on this machine, or on the hosts of HOSTFILE, started from here over ssh or each by itself."
more="  HOSTFILE              a file of lines \"host slots=ranks\", the same on all hosts; the first one has rank 0
  NODE_RANK             the line of this host, from 0: nothing is started over ssh, every host runs the same command with its own
  MASTER_ADDR           with HOSTFILE: the address of its first host; default: the name there
  MASTER_PORT           with HOSTFILE: a free port on it; default 29500"
read_arguments "$about" "$more" "$@"

# deepspeed itself starts hosts with pdsh only. It forwards few variables, takes arguments with quotes apart, passes no signal on,
# and ends a run by what command lines look like on every host. So its --no_ssh is what this script starts on each.
if [[ -n ${HOSTFILE:-} ]]; then
    read_hosts
    MASTER_PORT=${MASTER_PORT:-29500}
    require_number MASTER_PORT '[1-9][0-9]*' 'a port'
    if [[ -z ${NODE_RANK:-} ]]; then
        for number in "${!hosts[@]}"; do
            settings+=("$(quoted "HOSTFILE=$HOSTFILE" "NODE_RANK=$number" "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT")")
        done
        run_on_hosts
    fi
    if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= ${#hosts[@]})); then
        refuse "NODE_RANK=$NODE_RANK must be a number below ${#hosts[@]}, the hosts in HOSTFILE=$HOSTFILE"
    fi
    total=$(($(IFS=+ && echo "${slots[*]}")))
    where=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
        ${NPROC:+--num_gpus "$NPROC"})
    NPROC=${slots[NODE_RANK]}
    prepare_environment
    # There deepspeed sets CUDA_VISIBLE_DEVICES itself.
    if [[ ${DS_ACCELERATOR:-} != cpu && -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES, != "$(seq -s , 0 $((NPROC - 1)))",* ]]; then
        refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: with HOSTFILE deepspeed takes the first $NPROC GPUs of a host; torchrun.sh takes any"
    fi
else
    [[ -z ${NODE_RANK:-} ]] || refuse "NODE_RANK=$NODE_RANK needs HOSTFILE"
    prepare_environment
    total=$NPROC
    # --num_gpus counts ranks on any accelerator. It takes the first GPUs whatever CUDA_VISIBLE_DEVICES says; --include names them.
    if [[ ${DS_ACCELERATOR:-} != cpu && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        where=(--include "localhost:$(cut -d, -f"1-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")")
    else
        where=(--num_gpus "$NPROC")
    fi
    where+=(--master_port "$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')")
fi

check_run "$total" "${arguments[@]}"
run_launcher deepspeed "${where[@]}" --quiet --module pdl train "${arguments[@]}"
