"""Worker that measures what a large matrix product reaches here, for the floor under an update's time."""

from __future__ import annotations

import statistics
import time

import torch
from worker import Session

from hydra_ppo.compute.products import linear

SIZE = 2048
CALLS = 5


def main() -> None:
    """Multiply until told to stop: in each turn every kernel takes `CALLS` turns of its own."""
    session = Session()
    first, second = (torch.rand(SIZE, SIZE).to(session.torch_dtype) for _ in range(2))
    kernels = {"torch.matmul": lambda x, weight: torch.matmul(x, weight.T), "products.linear": linear}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    while True:
        session.begin()
        with torch.no_grad():
            for _ in range(CALLS):
                for name, kernel in kernels.items():
                    begun = time.perf_counter()
                    kernel(first, second)
                    seconds[name].append(time.perf_counter() - begun)
        session.end(rates={name: SIZE**3 / statistics.median(found[-CALLS:]) for name, found in seconds.items()})


if __name__ == "__main__":
    main()
