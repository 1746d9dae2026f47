"""Checks the Hugging Face folder of a job that starts from published weights, and keeps the weights' routing."""

from collections.abc import Sequence
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.components.checkpoint import checkpoint_to_load
from momoe_titan.config.command_line import was_given
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.hugging_face import folder_to_load
from momoe_titan.model.flavors import AUX_LOSS_WEIGHT, flavors
from momoe_titan.model.hugging_face.config import holds_no_bias
from momoe_titan.model.hugging_face.files import check_hf_files


def keep_published_routing(config: JobConfig, args: Sequence[str]) -> None:
    """Leave the balancing bias alone, in place, where the Hugging Face format of the job's model cannot hold it.

    Only where the job gives no rate or rule of its own, and loads published weights or has the flavor "hf": what is
    trained would not be what transformers computes from the export. A model that begins with random weights gets an
    auxiliary loss instead, as the flavors of such formats have, unless the job gives it a weight.

    Args:
        config: of the job.
        args: the options of the process.
    """
    section: Any = getattr(config, "momoe", None)
    flavor = flavors.get(config.model.flavor)
    loads = _loads_hf(config)
    if section is None or config.model.name != MODEL_NAME or not (loads or (flavor is not None and flavor.from_hf)):
        return
    given = any(was_given(f"momoe.load_balance_{field}", args) for field in ("rate", "rule"))
    if given or not (name := holds_no_bias(folder_to_load(config))):
        return
    section.load_balance_rate = 0.0
    of, instead = "the weights that this job starts from", "momoe.aux_loss_weight balances without"
    if not loads:
        of = 'the model that the flavor "hf" names here'
        if not was_given("momoe.aux_loss_weight", args):
            section.aux_loss_weight = AUX_LOSS_WEIGHT
        instead = f"momoe.aux_loss_weight is {section.aux_loss_weight} and balances without"
    logger.warning(
        f"LOAD BALANCING BY A BIAS IS OFF, because {name!r}, the format of {of}, "
        f"cannot hold the bias: momoe.load_balance_rate = 0.001 turns it on, {instead}"
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
