"""DistributedDataParallel: each process trains on a part of every batch, on a GPU of its own.

    torchrun --nproc-per-node 2 examples/several_gpus.py

Without GPUs the processes use the CPU. The loop needs no change for SAM: all processes perturb
along the averaged gradient, and have equal weights after every step.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastsam


def main(epochs: int = 5) -> float:
    """Train, and return the accuracy on the test images in percent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same batches in every process, which takes its part
    x, y = (torch.tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(network)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    fastsam.compare_ranks(optimizer)  # optional with DDP: the first step compares as well
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64 * size):
            mine = batch[rank::size].to(device)

            def closure(mine=mine):
                loss = F.cross_entropy(model(x[mine]), y[mine])
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        scheduler.step()
    with torch.no_grad():
        accuracy = 100 * (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    if rank == 0:
        print(f"{size} processes: loss {loss.item():.4f}, test accuracy {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        main(*map(int, sys.argv[1:]))
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort Python at exit; see docs/distributed.md
