"""Two gloo ranks that train a DDP model and `leave`, in forks, COUNT times: a rank that hangs or aborts is an error.

    python tests/leaving.py COUNT [barrier]

With `barrier` they end the usual way, a barrier and destroy_process_group: some pairs hang (dev/log).
"""

import os
import signal
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fledge.train.run import leave

LIMIT_S = 30


def train(rank: int, store: str, usual_way: bool) -> None:
    """A few steps, and the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    for _ in range(3):
        model(torch.randn(4, 64)).sum().backward()
    if usual_way:
        dist.barrier()
        dist.destroy_process_group()
    else:
        leave(torch.device("cpu"))


def pair(usual_way: bool) -> list[int]:
    """Exit codes of the two ranks; -9 for one that had to be killed."""
    store = os.path.join(tempfile.mkdtemp(), "store")
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            train(rank, store, usual_way)
            sys.exit()  # through the interpreter's own end
        children.append(child)
    end, codes = time.monotonic() + LIMIT_S, []
    for child in children:
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(ended[1]))
    return codes


if __name__ == "__main__":
    ends = [pair("barrier" in sys.argv) for _ in range(int(sys.argv[1]))]
    bad = [codes for codes in ends if any(codes)]
    sys.exit(f"{len(bad)} of {len(ends)} pairs ended badly: {bad}" if bad else 0)
