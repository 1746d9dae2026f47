"""Target of `job.custom_config_module`: adds the section `[momoe]` to TorchTitan's configuration."""

from momoe_titan.config.section import JobConfig, Momoe

__all__ = ["JobConfig", "Momoe"]
