"""A rank of the tests of tensor parallelism: `rank_worker.py FOLDER`, started as torchrun does, runs every check.

The folder has the model, a calibration, and what one process made of them (`test_tensor_parallel.py`). Each rank leaves
there what went wrong, by check.
"""

import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import rank_model_checks
import rank_store_checks
import torch.distributed as dist
from ranks import RANKS, Run

from hf_seqkv.errors import SeqKVWarning

CHECKS = {
    name.removeprefix("check_"): check
    for module in (rank_model_checks, rank_store_checks)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main(folder: Path) -> None:
    warnings.simplefilter("error", SeqKVWarning)
    place = {"rank": int(os.environ["RANK"]), "world_size": RANKS, "init_method": f"file://{folder / 'meeting'}"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **place)
    run = Run(folder)
    for name, check in CHECKS.items():
        try:
            check(run)
        except (Exception, pytest.fail.Exception):
            (folder / f"{name}.{run.rank}").write_text(traceback.format_exc())
        else:
            (folder / f"{name}.{run.rank}.passed").touch()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
