"""A test module's scenarios, run by two gloo processes together."""

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2


def results_of_ranks(module: str, folder: Path) -> list[dict[str, Any]]:
    """For each rank by name what the functions of the rank give that are the module's `SCENARIOS`."""
    torch.multiprocessing.spawn(_rank, (module, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def _rank(rank: int, module: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for name, scenario in importlib.import_module(module).SCENARIOS.items():
        results[name] = scenario(rank)
        dist.barrier()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
