"""The table of model sizes that `model.flavor` chooses from."""

import copy
from collections import UserDict

from torchtitan.models.moe import MoEArgs

from momoe_titan.model.args import MomoeLlamaArgs

# For flavors whose Hugging Face format has no place for a bias. Of 0.01, 0.03 and 0.1 the largest whose loss was
# within the scatter of two runs (docs/balancing.md).
AUX_LOSS_WEIGHT = 0.03


class _Flavors(UserDict):
    """A dict that returns copies, because a job writes its settings into the arguments that it gets."""

    def __getitem__(self, flavor: str) -> MomoeLlamaArgs:
        return copy.deepcopy(super().__getitem__(flavor))


def _sigmoid_moe(num_experts: int, top_k: int, num_shared_experts: int) -> MoEArgs:
    # Sigmoid scores, so that the bias of loss-free balancing moves on the scale of the scores
    # whatever the number of experts (arXiv 2408.15664, section 4.1).
    return MoEArgs(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        score_func="sigmoid",
        route_norm=True,
        score_before_experts=False,
    )


def _softmax_moe(num_experts: int, top_k: int) -> MoEArgs:
    return MoEArgs(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
    )


flavors = _Flavors(
    {
        # 4.9M parameters: for tests, and to see a loss fall on two CPU cores
        "debugmodel": MomoeLlamaArgs(
            dim=256,
            n_layers=4,
            n_heads=4,
            n_kv_heads=2,
            vocab_size=2048,
            rope_theta=10000,
            n_dense_layers=1,
            dense_hidden_dim=512,
            moe_hidden_dim=128,
            moe_args=_sigmoid_moe(num_experts=8, top_k=2, num_shared_experts=1),
        ),
        # 537M in total, 140M active per token
        "500M": MomoeLlamaArgs(
            dim=768,
            n_layers=12,
            n_heads=12,
            n_kv_heads=4,
            vocab_size=32768,
            rope_theta=10000,
            moe_hidden_dim=512,
            moe_args=_sigmoid_moe(num_experts=32, top_k=4, num_shared_experts=1),
        ),
        # the MoE layer of SonicMoE's 1.4B model (arXiv 2512.14080): D=768, F=256, E=128, K=8
        "1.4B": MomoeLlamaArgs(
            dim=768,
            n_layers=18,
            n_heads=12,
            n_kv_heads=4,
            vocab_size=32768,
            rope_theta=10000,
            moe_hidden_dim=256,
            moe_args=_sigmoid_moe(num_experts=128, top_k=8, num_shared_experts=0),
        ),
        # the MoE layer of SonicMoE's 7B model: D=1536, F=256, E=128, K=8
        "7B": MomoeLlamaArgs(
            dim=1536,
            n_layers=44,
            n_heads=12,
            n_kv_heads=4,
            vocab_size=32768,
            rope_theta=10000,
            moe_hidden_dim=256,
            moe_args=_sigmoid_moe(num_experts=128, top_k=8, num_shared_experts=0),
        ),
        # Qwen3-30B-A3B
        "30B": MomoeLlamaArgs(
            dim=2048,
            n_layers=48,
            n_heads=32,
            n_kv_heads=4,
            head_dim=128,
            qk_norm="per_head",
            vocab_size=151936,
            norm_eps=1e-6,
            rope_theta=1000000,
            moe_hidden_dim=768,
            moe_args=_softmax_moe(num_experts=128, top_k=8),
            load_balance_rate=0.0,
            aux_loss_weight=AUX_LOSS_WEIGHT,
        ),
        "mixtral-8x7b": MomoeLlamaArgs(
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            vocab_size=32000,
            rope_theta=1000000,
            moe_hidden_dim=14336,
            moe_args=_softmax_moe(num_experts=8, top_k=2),
            load_balance_rate=0.0,
            aux_loss_weight=AUX_LOSS_WEIGHT,
        ),
        # whatever the Hugging Face folder of the job holds
        "hf": MomoeLlamaArgs(from_hf=True),
    }
)
