"""One rank on a host of its own: what really leaves the host's network interface for each collective, as JSON on stdout."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

ELEMENTS = 6 << 20  # of float32; divides by 2 and by 3


def left(interface: str) -> int:
    """Bytes transmitted so far."""
    (line,) = [
        line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(f"{interface}:")
    ]
    return int(line.partition(":")[2].split()[8])


def main() -> None:
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    whole, part = torch.ones(ELEMENTS), torch.ones(ELEMENTS // world_size)
    operations = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    sent = {}
    for name, operation in operations.items():
        operation()  # the first one also connects
        dist.barrier()
        before = left(os.environ["GLOO_SOCKET_IFNAME"])
        operation()
        dist.barrier()
        sent[name] = left(os.environ["GLOO_SOCKET_IFNAME"]) - before
    print(json.dumps(sent))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
