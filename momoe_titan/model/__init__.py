"""The llama-MoE model for TorchTitan. `momoe_titan.register` makes the job's train spec of it."""

from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.experts import MomoeExperts
from momoe_titan.model.flavors import flavors
from momoe_titan.model.hugging_face.weights import MomoeStateDictAdapter
from momoe_titan.model.model import MomoeLlama
from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.parallel.parallelize import parallelize_momoe_llama
from momoe_titan.model.router import MomoeRouter
from momoe_titan.model.stock_moe import StockMoE

__all__ = [
    "MomoeExperts",
    "MomoeLlama",
    "MomoeLlamaArgs",
    "MomoeMoE",
    "MomoeRouter",
    "MomoeStateDictAdapter",
    "StockMoE",
    "flavors",
    "parallelize_momoe_llama",
]
