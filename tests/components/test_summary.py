"""The commands of the closing summary."""

import shlex

import pytest

from momoe_titan.components.summary import train_command


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
