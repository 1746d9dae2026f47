"""Every TOML file is read by TorchTitan and builds the model that its comments promise."""

import importlib
from pathlib import Path

import pytest
import torch
from torchtitan.config import ConfigManager

from momoe_titan.model import MomoeLlama, flavors

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_configs"

# file: (flavor, parameters, of which active per token, MoE layers, whether it runs offline)
# mixtral-8x7b and 30B have to the parameter what Mixtral 8x7B and Qwen3-30B-A3B have.
TABLE = {
    "debug_model": ("debugmodel", 4_890_880, 3_121_408, 3, True),
    "500m": ("500M", 536_660_736, 140_299_008, 12, True),
    "1.4b": ("1.4B", 1_439_395_584, 165_375_744, 18, False),
    "7b": ("7B", 7_030_052_352, 801_510_912, 44, False),
    "30b": ("30B", 30_532_122_624, 3_353_032_704, 48, False),
    "mixtral_8x7b": ("mixtral-8x7b", 46_702_792_704, 12_879_925_248, 32, False),
}


def read(stem, *args):
    return ConfigManager().parse_args([f"--job.config_file={CONFIGS / stem}.toml", *args])


def test_every_file_and_flavor_is_in_the_table():
    # finetune_hf has the shape of the weights that it starts from
    assert {path.stem for path in CONFIGS.glob("*.toml")} == {*TABLE, "finetune_hf"}
    assert {row[0] for row in TABLE.values()} == set(flavors) - {"hf"}  # has no shape of its own


@pytest.mark.parametrize("stem", TABLE)
def test_file_builds_the_model_that_it_states(stem):
    flavor, parameters, active, moe_layers, _ = TABLE[stem]
    config = read(stem)
    assert config.model.name == "momoe_llama" and config.model.flavor == flavor
    assert config.job.custom_config_module == "momoe_titan.job_config"
    assert config.experimental.custom_import == "momoe_titan.register"
    args = flavors[flavor]
    args.update_from_config(config)
    with torch.device("meta"):
        model = MomoeLlama(args)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts.w" in name)
    assert sum(sizes.values()) == parameters
    idle = routed * (args.moe_args.num_experts - args.moe_args.top_k) // args.moe_args.num_experts
    assert parameters - idle == active
    assert sum(name.endswith(".moe.experts.w1") for name in sizes) == moe_layers
    assert args.get_nparams_and_flops(model, config.training.seq_len)[0] == parameters


@pytest.mark.parametrize("stem", TABLE)
def test_file_is_complete_and_consistent(stem):
    from torchtitan.hf_datasets.text_datasets import DATASETS

    config = read(stem)
    importlib.import_module(config.experimental.custom_import)  # as a job does: it adds the datasets
    offline = TABLE[stem][4]
    for dataset in (config.training.dataset, config.validation.dataset):
        assert dataset in DATASETS
        assert dataset.startswith("python_stdlib") == offline
    if offline:
        assert (ROOT / config.model.hf_assets_path / "tokenizer.json").is_file()
    training = config.training
    if training.global_batch_size > 0:
        assert training.global_batch_size % training.local_batch_size == 0
    assert config.lr_scheduler.warmup_steps < training.steps
    assert config.validation.seq_len == training.seq_len
    assert config.metrics.enable_tensorboard
    assert config.job.dump_folder == f"./outputs/{stem}"
    text = (CONFIGS / f"{stem}.toml").read_text()
    for section in (
        "job",
        "experimental",
        "model",
        "momoe",
        "optimizer",
        "lr_scheduler",
        "training",
        "parallelism",
        "activation_checkpoint",
        "compile",
        "checkpoint",
        "metrics",
        "validation",
    ):
        assert f"\n[{section}]\n" in text


@pytest.mark.parametrize("stem", ["500m", "30b"])
def test_save_percent_on_the_command_line_wins(stem):
    moe_layers = TABLE[stem][3]
    args = flavors[TABLE[stem][0]]
    args.update_from_config(read(stem, "--momoe.save_percent", "37"))
    assert args.save_percent == [37.0]
    args.update_from_config(read(stem, "--momoe.save_percent", *["0"] * (moe_layers - 1), "100"))
    assert args.save_percent == [0.0] * (moe_layers - 1) + [100.0]
    with pytest.raises(ValueError, match="momoe.save_percent"):
        args.update_from_config(read(stem, "--momoe.save_percent", "0", "50"))
