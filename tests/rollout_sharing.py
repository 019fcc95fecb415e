"""Four ranks, two groups, no engine: `python -m tests.rollout_sharing FOLDER` writes what each rank finds to FOLDER."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from common.engines.shared_engine import SharedEngine
from common.rollout import SampleRequest

RANKS = 4
OWN_REQUESTS = (1, 3, 2, 0)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = SharedEngine(2)
    own = (
        SampleRequest(key=f"{rank}.{number}", prompt_token_ids=(1,), seed=number)
        for number in range(OWN_REQUESTS[rank])
    )
    found = {"name": group.name, "requests": [(is_own, request.key) for is_own, request in group.share(own)]}
    (Path(folder) / str(rank)).write_text(json.dumps(found))


if __name__ == "__main__":
    start_processes(work, (sys.argv[1],), nprocs=RANKS, start_method="fork")
