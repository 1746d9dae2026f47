"""For experimental.custom_import: the flavor "tiny", and jobs that write down the data that they train on.

Each rank appends a line to the file `rank-N` of the folder MOMOE_TITAN_RECORD for every batch that its step takes: the
step, how often each token is in the batch, and the loader's position behind it.
"""

import json
import os
from pathlib import Path

from momoe_titan.components.trainer import Trainer
from tests.support import tiny_flavor  # noqa: F401
from tests.support.text_data import tokens_in

_batches = Trainer.batch_generator


def _recorded(trainer, data_iterable):
    rank = os.environ["RANK"]
    with open(Path(os.environ["MOMOE_TITAN_RECORD"]) / f"rank-{rank}", "a") as file:
        for inputs, labels in _batches(trainer, data_iterable):
            counts = tokens_in([(inputs["input"].tolist(), labels.tolist())])
            state = trainer.dataloader.state_dict()[f"dp_rank_{rank}"].decode()
            file.write(json.dumps([trainer.step, counts, state]) + "\n")
            file.flush()
            yield inputs, labels


Trainer.batch_generator = _recorded
