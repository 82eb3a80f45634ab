"""What a worker other than the first runs: `python -m aphroquant.conversion.team.helper`, told on its standard input.

It plans the same outputs, takes part in the walk over the blocks, and writes nothing. What ends it is left in a file.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys

import torch

from aphroquant.checkpoint.base import naming
from aphroquant.conversion.job.job import Job
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.team.orders import READY, Orders
from aphroquant.conversion.team.processes import is_parting, joined
from aphroquant.conversion.walk import Walk, branches
from aphroquant.devices import torch_device
from aphroquant.errors import AphroquantError, is_out_of_memory, out_of_memory


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first worker ends, and this one with it
    orders = pickle.load(sys.stdin.buffer)  # of the process that started this one
    assert isinstance(orders, Orders)
    try:
        _work(orders)
    except AphroquantError as error:
        return _left(orders, error)
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            return _left(orders, out_of_memory())
        if is_parting(error):  # another worker has ended, and tells why
            return 1
        raise
    return 0


def _work(orders: Orders) -> None:
    from aphroquant.conversion.run import opened_source, planned_conversion

    torch.set_num_threads(orders.num_threads)
    if orders.requests[0][0].device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(orders.rank)
    device = torch_device(orders.requests[0][0].device)
    checkpoint = opened_source([request for request, _ in orders.requests])
    conversions = [
        planned_conversion(request, checkpoint, Progress(), reason, measures=False)
        for request, reason in orders.requests
    ]
    found = branches([(plan, each) for each in conversions if (plan := each.solved_plan) is not None])
    os.write(sys.stdout.fileno(), READY)
    with joined(orders.address, orders.rank, orders.size, device) as team, naming(checkpoint.path):
        Walk(checkpoint, orders.windows, found, device, Progress(), Job(), team, observes=orders.observes).help()


def _left(orders: Orders, error: AphroquantError) -> int:
    told = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    orders.errors.write_text(json.dumps(told), encoding="utf-8")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
