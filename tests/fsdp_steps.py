"""Three training steps of MAEForPreTraining, sharded by torch's fully_shard over the processes of torchrun.

    torchrun --nproc_per_node 2 tests/fsdp_steps.py FOLDER

Writes the losses and, gathered, the model as `save_pretrained` does, after it has tried that with what is sharded.
test_sharding.py compares them with one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import random_images, random_noise, tiny_config
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from mae_hf import MAEForPreTraining


def steps(model: torch.nn.Module, rank: int, num_processes: int) -> torch.Tensor:
    """Losses of three steps on a batch of four, of which every process has its part."""
    images, noise = random_images(tiny_config(), batch=4), random_noise(tiny_config(), batch=4)
    own = slice(rank * 4 // num_processes, (rank + 1) * 4 // num_processes)
    # Not AdamW: where a gradient is nothing but rounding, its step has a random direction, at full length.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(images[own], noise=noise[own]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank, num_processes = distributed.get_rank(), distributed.get_world_size()
    mesh = distributed.init_device_mesh("cpu", (num_processes,))
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config())
    for module in model.modules():  # what fsdp_transformer_layer_cls_to_wrap names
        if type(module).__name__ == "MAELayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = steps(model, rank, num_processes)
    distributed.all_reduce(losses)
    try:
        model.save_pretrained(folder / "sharded")
    except ValueError as error:
        print(error, file=sys.stderr)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        (folder / "losses.json").write_text(json.dumps((losses / num_processes).tolist()))
    distributed.barrier()  # a process that is gone earlier can make the other abort while it leaves
    distributed.destroy_process_group()
    # The interpreter would take its modules apart while torch's threads are still there: one such end in many aborts.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
