"""The training command for a rank that shares its GPU with others: see one_gpu.py.

    python -m tests.support.one_gpu_job OPTION ...

TorchTitan reads the options of the process as it is imported: these are a job's and nothing else.
"""

import faulthandler
from unittest import mock

import torch
from torch.distributed import Backend

from momoe_titan import train
from momoe_titan.model.parallel import peer_memory

SECONDS = 85


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.cuda.set_device(0)
    Backend.default_device_backend_map["cuda"] = "gloo"  # NCCL takes no two ranks of one device
    with train.one_gloo_thread(), mock.patch.object(peer_memory, "_on_one_host", lambda group: True):
        status = train.main()
    train.end_process(status)


if __name__ == "__main__":
    main()
