"""What `make test-ray` launches: a rank that trains a little with the others over gloo, and fails or waits as it is told.

python ranks.py OUTPUT [fail RANK CODE | kill RANK | leave RANK CODE | wait | deaf]
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def train(steps: int) -> torch.Tensor:
    """Average gradients over ranks, as a data-parallel run does; the same on every rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = torch.randn(8, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows[rank::world]).pow(2).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main(output: Path, *order: str) -> None:
    rank = int(os.environ["RANK"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    print("I am", *(f"{name}={os.environ[name]}" for name in names), flush=True)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    weights = train(20)
    torch.save(weights, output / f"{rank}.pt")
    (output / f"{rank}.pid").write_text(str(os.getpid()))
    for part in range(5):
        print(f"\r{part * 25}%", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr, flush=True)
    if order[:1] == ("fail",) and rank == int(order[1]):
        print("bad input", file=sys.stderr)
        sys.exit(int(order[2]))
    if order[:1] == ("kill",) and rank == int(order[1]):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if order[:1] in (("fail",), ("kill",)):
        dist.all_reduce(torch.zeros(1))  # which never comes
    if order[:1] == ("leave",) and rank == int(order[1]):
        sys.exit(int(order[2]))
    if order[:1] == ("wait",):
        print("waiting", flush=True)
        while not stop:
            time.sleep(0.1)
        print("stopped as asked", flush=True)
        (output / f"{rank}.stopped").touch()
    if order[:1] in (("deaf",), ("leave",)):
        print("waiting", flush=True)
        while True:
            time.sleep(600)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
