"""Imports, as on a machine without a GPU, what the commands of this package import: see tests/support/commands.py."""

import gc
from pathlib import Path

from momoe_titan.train import describe_cpu

with describe_cpu():
    import PIL.Image
    import torch.utils.tensorboard  # noqa: F401
    import torchtitan.train  # noqa: F401
    from torchtitan.config import ConfigManager

    import momoe_titan.components.trainer  # noqa: F401
    import momoe_titan.plan.__main__  # noqa: F401
    import momoe_titan.register  # noqa: F401

from tests.support.command_lines import read_sources_once

read_sources_once()
TOKENIZER = Path(__file__).parents[2] / "momoe_titan/assets/tokenizer"
ConfigManager().parse_args(["--job.custom_config_module=momoe_titan.job_config", f"--model.hf_assets_path={TOKENIZER}"])
PIL.Image.init()  # TensorBoard's writer needs it
gc.freeze()  # what lives as long as the process is not looked through
