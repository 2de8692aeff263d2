"""run_pretrain.py under torchrun, counting how often the gradients of the model's last bucket are exchanged.

torchrun --nproc_per_node 2 tests/count_exchanges.py SETTINGS OF run_pretrain.py
"""

import sys
from pathlib import Path

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_pretrain

exchanges = 0


def counting(group, bucket):
    global exchanges
    exchanges += bucket.is_last()
    return allreduce_hook(group, bucket)


class Counted(DistributedDataParallel):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.register_comm_hook(None, counting)


if __name__ == "__main__":
    import torch

    torch.nn.parallel.DistributedDataParallel = Counted
    run_pretrain.main()
    print(f"exchanges {exchanges}")
