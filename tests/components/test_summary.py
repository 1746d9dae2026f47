"""The commands of the closing summary."""

import shlex

import pytest
from torchtitan.config import JobConfig

from momoe_titan.components import summary
from momoe_titan.components.summary import data_line, next_commands, train_command
from momoe_titan.config.section import DataSource, Momoe


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--job.config_file", "a.toml"], "--job.config_file a.toml --training.steps 240"),
        (["--job.config_file=a.toml"], "--job.config_file=a.toml --training.steps=240"),
        (["--training.steps", "120", "--job.config_file", "a.toml"], "--job.config_file a.toml --training.steps 240"),
        (["--checkpoint.enable", "--training.steps=120"], "--checkpoint.enable --training.steps 240"),
    ],
)
def test_a_new_option_is_written_as_the_others_are(args, expected, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    command = shlex.split(train_command(args, ("--training.steps", "240")))
    assert shlex.join(command[command.index("momoe_titan.train") + 1 :]) == expected


def test_the_data_that_is_named_is_the_jobs():
    """Also where a command line takes other data than the configuration file."""
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "local", "texts/*.jsonl"
    assert data_line(config) == "Training on local (texts/*.jsonl)"
    config.validation.enable, config.validation.dataset = True, "python_stdlib_validation"
    assert data_line(config).endswith("; validating on python_stdlib_validation")
    config.momoe = Momoe(data=[DataSource(path=["a", "b"]), DataSource(dataset="python_stdlib")])
    assert data_line(config).startswith("Training on local (a, b), python_stdlib; ")


@pytest.mark.parametrize("module, extra", [("plotly", "dashboard"), ("safetensors", "hf"), (None, None)])
def test_commands_name_what_they_need_and_lack(module, extra, tmp_path, monkeypatch):
    (tmp_path / "checkpoint/step-7").mkdir(parents=True)
    monkeypatch.setattr(summary, "find_spec", lambda name: name != module)
    monkeypatch.setattr(summary, "find_fault", lambda *args, **options: None)
    monkeypatch.setattr(summary, "saved_steps", lambda folder: [3, 7])
    config = JobConfig()
    config.model.name, config.job.dump_folder = "momoe_llama", str(tmp_path)
    config.checkpoint.enable = config.metrics.enable_tensorboard = True
    lines = next_commands(config, ["--job.config_file=a.toml"])
    (export,) = (line for line in lines if line.startswith("  export "))
    assert f"{tmp_path}/checkpoint {tmp_path}/hf-step-7 --job.config_file=a.toml" in export
    needs = [line for line in lines if "(needs " in line]
    assert len(needs) == (extra is not None) and all(
        f"-m pip install 'momoe_titan[{extra}]')" in line for line in needs
    )
