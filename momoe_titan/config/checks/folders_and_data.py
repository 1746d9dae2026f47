"""Checks what a job needs on this machine: writable folders, a tokenizer that fits the model, data, a device."""

import os
import tempfile

from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from momoe_titan.config.section import OWN_DATASETS
from momoe_titan.config.suggestions import did_you_mean

TITAN_DEFAULT = "c4_test"  # the dataset of a job that names none


def check_folders(job_config: JobConfig) -> None:
    """Refuse a job that could not write its logs or checkpoints. Makes `job.dump_folder` where it is missing.

    Raises:
        ValueError: names the field and the folder.
    """
    folder, checkpoint = job_config.job.dump_folder, job_config.checkpoint
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"job.dump_folder {folder!r} cannot be written: {e}") from e
    if checkpoint.enable and not checkpoint.load_only:
        # The folder itself is not made here: a run without it is a new one.
        parent = checkpoints = os.path.join(folder, checkpoint.folder)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as e:
            raise ValueError(f"checkpoint.folder {checkpoints!r} cannot be written: {e}") from e


def check_tokenizer(job_config: JobConfig, num_ids: int, num_embedded: int) -> None:
    """Refuse a tokenizer with ids that the model does not embed.

    Args:
        num_ids: one more than the tokenizer's largest id.
        num_embedded: rows of the model's embedding.

    Raises:
        ValueError: names the tokenizer's folder, and what to set.
    """
    if num_ids > num_embedded:
        raise ValueError(
            f"model.hf_assets_path {job_config.model.hf_assets_path!r} has a tokenizer with ids up to "
            f"{num_ids - 1}, but the model embeds {num_embedded}; set momoe.vocab_size to {num_ids} or more"
        )


def check_datasets(job_config: JobConfig) -> None:
    """Refuse data sets that neither TorchTitan nor this package knows, and options that these do not have.

    Raises:
        ValueError: names the field and its value.
    """
    training, momoe = job_config.training, job_config.momoe  # pyright: ignore[reportAttributeAccessIssue] - custom
    if momoe.data and (training.dataset.lower() != "local" or training.dataset_path):
        raise ValueError(
            f"training.dataset is {training.dataset!r} and training.dataset_path {training.dataset_path!r}, "
            "must be 'local' and left out: [[momoe.data]] names the data"
        )
    sections = {"training": training} | ({"validation": job_config.validation} if job_config.validation.enable else {})
    for section, config in sections.items():
        field, name = f"{section}.dataset", config.dataset
        if name.lower() not in DATASETS:
            names = ", ".join(map(repr, DATASETS))
            raise ValueError(f"{field} {name!r} is none of {names}{did_you_mean(name.lower(), DATASETS)}")
        path = config.dataset_path or DATASETS[name.lower()].path
        if name.lower() == TITAN_DEFAULT and not os.path.exists(path):
            raise ValueError(
                f"{field} is {name!r}, TorchTitan's default, whose text {path!r} comes with TorchTitan's clone alone; "
                "name your data, or 'python_stdlib'"
            )
        if name.lower() not in OWN_DATASETS and momoe.data_packing != "concatenate":
            raise ValueError(
                f"momoe.data_packing is {momoe.data_packing!r}, must be 'concatenate' with {field} {name!r}, which "
                "TorchTitan reads"
            )
        if (workers := config.dataloader.num_workers) < 0:
            raise ValueError(f"{section}.dataloader.num_workers is {workers}, must be at least 0")
        if (ahead := config.dataloader.prefetch_factor) is not None and ahead < 1:
            raise ValueError(f"{section}.dataloader.prefetch_factor is {ahead}, must be at least 1, or left out")


def check_cpu(job_config: JobConfig) -> None:
    """Refuse a job that asks for something only a GPU has, on a machine without one.

    Raises:
        ValueError: names the field.
    """
    parallelism, profiling = job_config.parallelism, job_config.profiling
    for field, given in (
        ("training.enable_cpu_offload", job_config.training.enable_cpu_offload),
        ("profiling.enable_memory_snapshot", profiling.enable_memory_snapshot),
        ("profiling.enable_profiling", profiling.enable_profiling),
        ("parallelism.enable_async_tensor_parallel", parallelism.enable_async_tensor_parallel),
    ):
        if given:
            raise ValueError(f"{field} is true, but this machine has no GPU")
    if (degree := parallelism.context_parallel_degree) > 1:
        raise ValueError(
            f"parallelism.context_parallel_degree is {degree}, but this machine has no GPU: "
            "torch's ring attention has no kernel for a CPU"
        )
    if job_config.checkpoint.async_mode == "async_with_pinned_mem":
        raise ValueError(
            "checkpoint.async_mode is 'async_with_pinned_mem', but this machine has no GPU; 'async' works here"
        )
