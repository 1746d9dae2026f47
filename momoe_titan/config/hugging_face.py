"""The folder of a job's Hugging Face weights, and which Hugging Face formats can store the balancing bias."""

from torchtitan.config import JobConfig

FORMATS_WITH_BIAS = ("glm4_moe",)  # formats, by transformers' `model_type`, that have a place for the balancing bias


def folder_to_load(job_config: JobConfig) -> str:
    """The Hugging Face folder that TorchTitan's checkpoint manager loads a job's weights from."""
    checkpoint = job_config.checkpoint
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path:
        return checkpoint.initial_load_path
    return job_config.model.hf_assets_path
