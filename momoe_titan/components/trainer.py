"""A training run from its configuration to its last checkpoint, by TorchTitan's trainer."""

import os
import sys
import warnings
from unittest import mock

import torch
from torchtitan import train as titan
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.components.checkpoint import CheckpointError, CheckpointManager
from momoe_titan.config.checks.job import check_job
from momoe_titan.config.checks.surroundings import check_cpu, check_datasets, check_folders, check_tokenizer
from momoe_titan.config.command_line import was_given
from momoe_titan.config.flavor import MODEL_NAME, configured_args
from momoe_titan.data.errors import DataError
from momoe_titan.data.tokenizer import build_tokenizer, resolve_assets_path
from momoe_titan.model.hugging_face.config import saved_dtype, write_hf_config


def prepare_cpu_job(config: JobConfig, args: list[str]) -> None:
    """Adapt a configuration to the CPU, in place.

    Mixed precision becomes float32 unless `training.mixed_precision_param` was
    given: bfloat16 saves no memory worth having there and is slower.

    Raises:
        ValueError: the job asks for something that only a GPU has.
    """
    check_cpu(config)
    if not was_given("training.mixed_precision_param", args):
        config.training.mixed_precision_param = "float32"
    logger.info(
        "No GPU: training on the CPU with "
        f"{torch.get_num_threads()} threads per process, "
        f"{config.training.mixed_precision_param} arithmetic"
    )
    # Every process of the job is on the one device "cpu:0".
    os.environ["LOCAL_RANK"] = "0"
    # TorchTitan turns autocast on with float32 too, which is the same as off.
    warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype")


def check_config(config: JobConfig) -> None:
    """Refuse a job that would fail later, before anything is built.

    Also resolves `model.hf_assets_path` where it names a folder of this package.

    Raises:
        ValueError: names the field and its value.
    """
    config.model.hf_assets_path = resolve_assets_path(config.model.hf_assets_path)
    model_args = check_job(config)
    check_folders(config)
    num_tokens = build_tokenizer(config).get_vocab_size()
    check_tokenizer(config, num_tokens, getattr(model_args, "vocab_size", num_tokens))
    check_datasets(config)


def complete_hf_folder(config: JobConfig) -> None:
    """Give the last checkpoint, if it was saved in Hugging Face's format, the config.json and the
    tokenizer that transformers needs; TorchTitan writes the weights alone.

    A run that was at its end before has saved nothing: its last checkpoint stays what it is, and a
    warning says so.
    """
    checkpoint = config.checkpoint
    if not (checkpoint.enable and checkpoint.last_save_in_hf and config.model.name == MODEL_NAME):
        return
    folder = os.path.join(config.job.dump_folder, checkpoint.folder, f"step-{config.training.steps}")
    if os.environ["RANK"] == "0" and os.path.isdir(folder):
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            logger.warning(
                f"checkpoint.last_save_in_hf is true, but {folder!r} is of an earlier run and not in "
                "Hugging Face's format: this run saved nothing. python -m momoe_titan.export converts it"
            )
            return
        write_hf_config(folder, configured_args(config), config.model.hf_assets_path, saved_dtype(folder))


def train(args: list[str]) -> None:
    """Read the configuration, check it, train. Ends the process with status 2 where the configuration is unusable.

    Args:
        args: Those of the process, which TorchTitan reads by itself.
    """
    accepted: list[JobConfig] = []

    class Trainer(titan.Trainer):
        """TorchTitan's, for a job that has been checked."""

        def __init__(self, job_config: JobConfig):
            if not torch.cuda.is_available():
                prepare_cpu_job(job_config, args)
            check_config(job_config)
            accepted.append(job_config)
            super().__init__(job_config)

    try:
        # TorchTitan's train spec names no checkpoint manager: the trainer takes the one of its module.
        with mock.patch.object(titan, "CheckpointManager", CheckpointManager):
            titan.main(Trainer)
        complete_hf_folder(accepted[0])
    except (ValueError, OSError) as e:  # OSError: the configuration file itself
        if accepted and not isinstance(e, (DataError, CheckpointError)):
            raise
        # The message says which field to change; a traceback would bury it.
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
