"""What a user hears about a configuration file that cannot be used."""

import re
from pathlib import Path

import pytest

from momoe_titan.config.checks.folders_and_data import check_datasets
from momoe_titan.config.flavor import flavor_args, import_custom_module
from momoe_titan.config.reading import check_file, read_job
from momoe_titan.config.suggestions import did_you_mean

DEBUG_MODEL = Path(__file__).parents[2] / "train_configs" / "debug_model.toml"


@pytest.fixture
def refused(tmp_path):
    """The message on debug_model.toml with a part of it replaced."""

    def refused(old: str, new: str, *options: str) -> str:
        text = DEBUG_MODEL.read_text()
        assert old in text
        file = tmp_path / "job.toml"
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError) as caught:
            read_job([f"--job.config_file={file}", *options])
        return str(caught.value).replace(str(file), "job.toml")

    return refused


def line_of(start: str) -> int:
    return next(i for i, line in enumerate(DEBUG_MODEL.read_text().splitlines(), 1) if line.startswith(start))


@pytest.mark.parametrize(
    "start, wrong, message",
    [
        ("seq_len", "seqlen", "[training] has no field 'seqlen'; did you mean 'seq_len'?"),
        ("save_percent", "save_percentage", "[momoe] has no field 'save_percentage'; did you mean 'save_percent'?"),
        ("[momoe]", "[momo]", "there is no section [momo]; did you mean 'momoe'?"),
        ("warmup_steps", "zzz", "[lr_scheduler] has no field 'zzz'"),
        (
            "[metrics]",
            "[metrics.tensorboard]",
            "[metrics] has no field 'tensorboard'; did you mean 'enable_tensorboard'?",
        ),
        ("[job]", "lr = 3\n[job]", "there is no section [lr]; lr is a field of [optimizer]"),
        ("[job]", "comm = 3\n[job]", "comm is 3, must be a section [comm]"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(refused, start, wrong, message):
    assert refused(f"\n{start}", f"\n{wrong}") == f"job.toml, line {line_of(start)}: {message}"


def test_a_file_that_is_no_toml_is_named_with_the_line(refused):
    number = line_of("max_norm")
    message = refused("\nmax_norm = 1.0", "\nmax_norm = ")
    assert message.startswith("job.config_file 'job.toml' is no TOML: ") and f"(at line {number}, column" in message


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "debug_model.toml").write_text("")
    with pytest.raises(ValueError, match="debug_modle.toml': there is no such file; did you mean 'debug_model.toml'"):
        check_file(["--job.config_file", str(tmp_path / "debug_modle.toml")])
    with pytest.raises(ValueError, match="cannot be read: .* directory"):
        check_file(["--job.config_file", str(tmp_path)])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read: 'utf-8' codec"):
        check_file(["--job.config-file", str(tmp_path / "binary.toml")])


def test_messages_name_no_file_that_only_torchtitan_has(refused):
    messages = [
        refused('hf_assets_path = "momoe_titan/assets/tokenizer"', 'hf_assets_path = "old/tokenizer.model"'),
        refused('custom_config_module = "momoe_titan.job_config"', 'custom_config_module = "no.such"'),
        refused("\n[momoe]", "\n[momo]"),
    ]
    assert messages[0] == "model.hf_assets_path is 'old/tokenizer.model', must be a folder with a tokenizer.json"
    assert messages[1] == "job.custom_config_module 'no.such': No module named 'no'"
    assert not any("run_train.sh" in message or "scripts/" in message for message in messages)


def test_fields_of_another_section_module_are_known(tmp_path, monkeypatch):
    (tmp_path / "own_section.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from momoe_titan.config.section import Momoe\n"
        "@dataclass\nclass Own:\n    size: int = 3\n"
        "@dataclass\nclass JobConfig:\n    own: Own = field(default_factory=Own)\n"
        "    momoe: Momoe = field(default_factory=Momoe)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "job.toml"
    file.write_text('[job]\ncustom_config_module = "own_section"\n[own]\nsize = 4\n[momoe]\nsave_percent = 50\n')
    config = read_job([f"--job.config_file={file}"])
    assert config.own.size == 4 and config.momoe.save_percent == [50.0]
    file.write_text('[job]\ncustom_config_module = "own_section"\n[own]\nsiez = 4\n')
    with pytest.raises(ValueError, match="line 4: \\[own\\] has no field 'siez'; did you mean 'size'"):
        read_job([f"--job.config_file={file}"])


@pytest.mark.parametrize(
    "option, hint",
    [
        ("--model.name=momoe_lama", "did you mean 'momoe_llama'?"),
        ("--model.flavor=debugmodl", "did you mean 'debugmodel'?"),
        ("--training.dataset=python_stdlb", "did you mean 'python_stdlib'?"),
        ("--validation.dataset=python_stdlib_validaton", "did you mean 'python_stdlib_validation'?"),
    ],
)
def test_a_wrong_name_gets_the_next_right_one(option, hint):
    config = read_job([f"--job.config_file={DEBUG_MODEL}", option])
    import_custom_module(config)
    with pytest.raises(ValueError, match=hint.replace("?", "\\?$")):
        flavor_args(config)
        check_datasets(config)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--training.dataset=c4", "--momoe.data_packing=best_fit"], "momoe.data_packing .* training.dataset 'c4'"),
        (["--training.dataloader.num_workers=-1"], "training.dataloader.num_workers is -1, must be at least 0"),
        (["--training.dataloader.prefetch_factor=0"], "training.dataloader.prefetch_factor is 0, must be at least 1"),
        (["--validation.dataloader.prefetch_factor=0"], "validation.dataloader.prefetch_factor is 0"),
    ],
)
def test_options_that_the_data_does_not_have_are_refused(options, message):
    config = read_job([f"--job.config_file={DEBUG_MODEL}", *options])
    import_custom_module(config)
    with pytest.raises(ValueError, match=message):
        check_datasets(config)


def test_a_job_that_names_no_data_is_refused(tmp_path, monkeypatch):
    """TorchTitan's default is a folder of its clone."""
    monkeypatch.chdir(tmp_path)
    text = DEBUG_MODEL.read_text()
    (tmp_path / "job.toml").write_text(re.sub('^dataset = "python_stdlib".*$', "", text, flags=re.MULTILINE))
    config = read_job([f"--job.config_file={tmp_path}/job.toml", "--momoe.data_packing=concatenate"])
    import_custom_module(config)
    with pytest.raises(ValueError, match="training.dataset is 'c4_test', TorchTitan's default, whose text 'tests/"):
        check_datasets(config)
    (tmp_path / "tests/assets/c4_test").mkdir(parents=True)
    check_datasets(config)


def test_sources_beside_another_dataset_are_refused(tmp_path):
    (tmp_path / "job.toml").write_text(DEBUG_MODEL.read_text() + '\n[[momoe.data]]\npath = "a"\n')
    for option in ("--training.dataset=python_stdlib", "--training.dataset=local --training.dataset_path=b"):
        config = read_job([f"--job.config_file={tmp_path}/job.toml", *option.split()])
        import_custom_module(config)
        with pytest.raises(ValueError, match=r"training.dataset is .* \[\[momoe.data\]\] names the data"):
            check_datasets(config)


def test_nothing_is_suggested_where_nothing_is_close():
    assert did_you_mean("zzz", ["save_percent"]) == ""


@pytest.mark.parametrize("file", sorted(DEBUG_MODEL.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_every_configuration_says_how_to_launch_it(file):
    header = file.read_text().partition("\n\n[")[0]
    assert f"-m momoe_titan.train --job.config_file train_configs/{file.name}" in header.replace(" \\\n#     ", " ")
    assert "torchtitan.train" not in header
