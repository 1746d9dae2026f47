"""Target of `experimental.custom_import`: makes `model.name = "momoe_llama"` known to TorchTitan."""

from torchtitan.protocols import train_spec as _train_spec

from momoe_titan.model import get_train_spec, MomoeLlama

MODEL_NAME = "momoe_llama"


def register() -> None:
    """Register the train spec, once; another call changes nothing.

    Raises:
        ValueError: the name is taken by another model.
    """
    taken = _train_spec._extra_train_specs.get(MODEL_NAME)
    if taken is None or taken.model_cls is not MomoeLlama:
        _train_spec.register_train_spec(MODEL_NAME, get_train_spec())


register()
