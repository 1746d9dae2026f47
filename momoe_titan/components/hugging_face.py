"""Checks the Hugging Face folder of a job that starts from published weights, and keeps the weights' routing."""

from collections.abc import Sequence
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.components.checkpoint import checkpoint_to_load
from momoe_titan.config.command_line import was_given
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.hugging_face import folder_to_load
from momoe_titan.model.hugging_face.config import holds_no_bias
from momoe_titan.model.hugging_face.files import check_hf_files


def keep_published_routing(config: JobConfig, args: Sequence[str]) -> None:
    """Leave the balancing bias alone, in place, where the format of the job's published weights cannot hold it.

    Only where the job gives no rate or rule of its own: what is trained would not be what transformers computes from
    the export.

    Args:
        config: of the job.
        args: the options of the process.
    """
    section: Any = getattr(config, "momoe", None)
    if section is None or not _loads_hf(config) or not (name := holds_no_bias(folder_to_load(config))):
        return
    if not any(was_given(f"momoe.load_balance_{field}", args) for field in ("rate", "rule")):
        section.load_balance_rate = 0.0
        logger.warning(
            f"LOAD BALANCING BY A BIAS IS OFF, because {name!r}, the format of the weights that this job starts from, "
            "cannot hold the bias: momoe.load_balance_rate = 0.001 turns it on, momoe.aux_loss_weight balances without"
        )


def check_hf_weights(config: JobConfig, model_args: Any) -> None:
    """Refuse a Hugging Face folder whose files do not hold the weights that the job would load from it.

    Raises:
        ValueError: names the file, the tensor, its shape, and the one that config.json means.
    """
    if _loads_hf(config) and checkpoint_to_load(config) is None:  # a run that resumes needs the folder no more
        try:
            check_hf_files(folder_to_load(config), model_args)
        except ValueError as e:
            raise ValueError(f"checkpoint.initial_load_in_hf is true, but {e}") from e


def _loads_hf(config: JobConfig) -> bool:
    checkpoint = config.checkpoint
    return checkpoint.enable and checkpoint.initial_load_in_hf and config.model.name == MODEL_NAME
