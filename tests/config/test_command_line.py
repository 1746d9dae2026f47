"""What is known of a job's options before TorchTitan reads them."""

import sys

import pytest

from momoe_titan.config.command_line import SECTION_OPTION, missing_section_option, program, take_log_level, was_given


def test_was_given(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("[training]\nsteps = 3\n")
    for spelling in ([f"--job.config_file={file}"], ["--job.config-file", str(file)]):
        assert was_given("training.steps", spelling)
        assert not was_given("training.seq_len", spelling)
    assert was_given("training.seq_len", ["--training.seq-len=8"])
    assert was_given("training.seq_len", ["--training.seq_len", "8"])
    assert not was_given("training.seq_len", ["--job.config_file", "/no/such/file"])


def test_the_section_is_added_once(tmp_path):
    own = tmp_path / "job.toml"
    own.write_text('[job]\ncustom_config_module = "own"\n')
    assert missing_section_option(["--training.steps=3"]) == [SECTION_OPTION]
    for given in (["--job.custom-config-module=own"], [SECTION_OPTION], ["--job.config_file", str(own)]):
        assert missing_section_option(given) == []


def test_a_program_is_named_as_short_as_it_can_be(tmp_path, monkeypatch):
    """By its name where PATH leads to it; else by its path, from here where it is below here."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "torchrun").write_text("")
    (bin / "torchrun").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert program("torchrun") == ".venv/bin/torchrun"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program("torchrun") == str(bin / "torchrun")
    monkeypatch.setenv("PATH", str(bin))
    assert program("torchrun") == "torchrun"


@pytest.mark.parametrize("given", [["--log_level=ERROR"], ["--log-level", "error"], ["--log_level", "error"]])
def test_the_log_level_is_taken_out_of_the_options(given):
    others = ["--checkpoint.enable", "--training.steps=3"]
    for place in range(3):
        args = [*others[:place], *given, *others[place:]]
        assert take_log_level(args) == "error" and args == others
    assert take_log_level(others) == "info"
    for wrong in (["--log_level"], ["--log_level", "loud"]):
        with pytest.raises(ValueError, match="--log_level is .*, must be one of"):
            take_log_level(wrong)
