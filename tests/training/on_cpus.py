"""`t2r.train` by processes on CPUs, with FSDP2 too, which accelerate offers on accelerators alone.

For that accelerate is told that the processes are of the kind that it shards over; what it does then works on CPUs too.
With `DIES_AFTER` in the environment, processes (or the one whose rank `DIES_ALONE` is) die after so many forward
passes.
"""

import os
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

from t2r.cli.main import app
from t2r.training.trainer import T2RTrainer

begin = AcceleratorState.__init__


def as_if_on_gpus(self, *args, **kwargs):
    first = not AcceleratorState._shared_state
    PartialState(cpu=True)
    if first:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


def die_after(passes: int):
    step, calls = T2RTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > passes:
            os._exit(9)
        return step(self, *args, **kwargs)

    T2RTrainer.training_step = training_step


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        AcceleratorState.__init__ = as_if_on_gpus
    if "DIES_AFTER" in os.environ and os.environ.get("DIES_ALONE", os.environ["RANK"]) == os.environ["RANK"]:
        die_after(int(os.environ["DIES_AFTER"]))
    app(["train", *sys.argv[1:]], prog_name="t2r")
