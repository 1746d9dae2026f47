"""Our experts, router and load balancing in the MoE models of TorchTitan 0.2.2: its model converter "momoe".

    [model]
    name = "qwen3"
    converters = ["momoe"]
    [experimental]
    custom_import = "momoe_titan.register"

The parameters of a converted model are those of the model: names, shapes, layout. So are its persistent buffers.
"""

import dataclasses
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.moe import GroupedExperts, MoE
from torchtitan.tools.logging import logger

from momoe_titan.config.checks.converter import check_converter, dispatches
from momoe_titan.config.section import Momoe
from momoe_titan.kernels import momoe_grouped_mlp, momoe_mlp
from momoe_titan.kernels.activations import LIMIT
from momoe_titan.kernels.router import float32_product
from momoe_titan.model.experts import SavingExperts
from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.parallel.collectives import local_weight
from momoe_titan.model.parallel.expert import spread_experts
from momoe_titan.model.router import MomoeRouter
from momoe_titan.moe.balancing import QUANTILE
from momoe_titan.moe.expert_stats import count_experts, record_counts
from momoe_titan.save_percent import AUTO, check_num_layers, parse_save_percent

# attribute of a job's configuration, and of the model and its pipeline stages: a `ConvertedModel`
CONVERTED = "_converted_by_momoe_titan"
# what `model.parallel.expert.ExpertParallel` gives experts beside a choice, in its order
OF_DISPATCH = ("num_rows", "usual_rows", "outlet")


@dataclasses.dataclass
class ConvertedModel:
    """What the metrics and checks read of a model's arguments, of a converted model.

    Attributes:
        moe_layer_ids: indices of its MoE layers, those of all pipeline stages.
        moe_args: of its first MoE layer.
        the others: fields of [momoe], or, in a job without that section, what the model itself says.
    """

    moe_layer_ids: list[int]
    moe_args: MoEArgs
    backend: str
    load_balance_rate: float
    load_balance_rule: str
    load_balance_average: float
    aux_loss_weight: float
    aux_loss_scope: str
    router_z_loss_weight: float
    check_ids: bool


class _Experts(Protocol):
    """Stock experts, by which a converted layer finds its own class."""

    num_experts: int
    use_grouped_mm: bool


class ConvertedExperts(SavingExperts, GroupedExperts):
    """TorchTitan's SwiGLU experts, run by our kernels.

    Args:
        stock: whose parameters these experts take over.
        save_percent, backend, check_ids: of `momoe_mlp`.

    Attributes:
        scores_on_input: of `momoe_mlp`, for tokens; without effect on rows.
    """

    scores_on_input = False

    def __init__(self, stock: _Experts, save_percent: float, backend: str, check_ids: bool):
        nn.Module.__init__(self)  # the base class would make parameters
        self.num_experts, self.use_grouped_mm = stock.num_experts, stock.use_grouped_mm
        assert isinstance(stock, nn.Module)
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.hidden_dim = self._hidden_dim()
        self.save_percent, self.backend, self.check_ids = save_percent, backend, check_ids

    def _hidden_dim(self) -> int:
        return self.w2.shape[2]

    def _weights(self) -> tuple[Any, torch.Tensor, dict[str, Any]]:
        """What of `momoe_mlp` describes the experts: w1, w2, and options; views, with nothing copied."""
        gate, down, up = (local_weight(w) for w in (self.w1, self.w2, self.w3))
        return (up.mT, gate.mT), down.mT, {}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - takes what the base class takes, and more
        self, x: torch.Tensor, *choice: Any
    ) -> Any:
        """Experts on tokens, or on rows as TorchTitan's expert parallelism hands them over.

        Args:
            x: (T, D) tokens, or (R, D) rows sorted by expert.
            *choice: the chosen experts (T, K) and their scores (T, K); or the number of rows of each expert (E), rows
                beyond their sum being padding. Our expert parallelism adds `OF_DISPATCH` of `momoe_mlp` to the scores.

        Returns:
            Of tokens (out (T, D), tokens per expert (E)), of rows out (R, D); in the dtype of x.
        """
        w1, w2, options = self._weights()
        save_percent, on_saved = self.what_is_saved()
        options |= {"backend": self.backend, "on_saved": on_saved}
        if len(choice) == 1:
            counts_E = choice[0].to(torch.int64)
            return momoe_grouped_mlp(x, w1, w2, counts_E, None, save_percent, **options).to(x.dtype)
        ids_TK, scores_TK, *of_dispatch = choice
        options |= dict(zip(OF_DISPATCH, of_dispatch, strict=False)) | {"scores_on_input": self.scores_on_input}
        out_TD, counts_E = momoe_mlp(x, w1, w2, ids_TK, scores_TK, save_percent, check_ids=self.check_ids, **options)
        return out_TD.to(x.dtype), counts_E


class ConvertedGptOssExperts(ConvertedExperts, GptOssGroupedExperts):
    """gpt-oss's experts, which have biases and an activation of their own, run by our kernels."""

    def __init__(self, stock: GptOssGroupedExperts, save_percent: float, backend: str, check_ids: bool):
        if stock.swiglu_limit != LIMIT:
            raise ValueError(
                f"swiglu_limit of the model is {stock.swiglu_limit}, must be {LIMIT}, which the kernels have"
            )
        super().__init__(stock, save_percent, backend, check_ids)
        self.swiglu_limit = stock.swiglu_limit

    def _hidden_dim(self) -> int:
        return self.mlp2_weight.shape[2]

    def _weights(self) -> tuple[Any, torch.Tensor, dict[str, Any]]:
        w1, bias1, w2, bias2 = map(local_weight, (self.mlp1_weight, self.mlp1_bias, self.mlp2_weight, self.mlp2_bias))
        options = {"activation": "clamped_swiglu", "order": "interleaved_gate_up", "bias1": bias1, "bias2": bias2}
        return w1.mT, w2.mT, options

    def init_weights(self, init_std: float) -> None:
        GptOssGroupedExperts.init_weights(self, init_std)


class _Float32Gate(nn.Module):
    """A router's matrix, multiplied in float32. No `nn.Linear`, which another converter would quantise."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.in_features = weight.shape[1]

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TE = float32_product(x_TD, local_weight(self.weight))
        return out_TE if self.bias is None else out_TE + local_weight(self.bias).float()


def converted_router(stock: Any) -> MomoeRouter:
    """Our router with the parameters and settings of a `TokenChoiceTopKRouter` of TorchTitan's.

    Its logits are float32, and of equal experts the one with the lowest id wins.
    """
    args = MoEArgs(
        num_experts=stock.num_experts,
        top_k=stock.top_k,
        score_func=stock.score_func,
        route_norm=stock.route_norm,
        route_scale=stock.route_scale,
        gate_bias=stock.gate.bias is not None,
        num_expert_groups=stock.num_expert_groups,
        num_limited_groups=stock.num_limited_groups,
        _debug_force_load_balance=stock._debug_force_load_balance,
    )
    weight = stock.gate.weight
    with torch.device(weight.device):
        router = MomoeRouter(weight.shape[1], args)
    router.gate = _Float32Gate(weight, stock.gate.bias)  # pyright: ignore[reportAttributeAccessIssue] - has all of it
    return router


class ConvertedMoE(MomoeMoE):
    """An MoE layer of TorchTitan with our experts and router, and with exact counts of tokens.

    Differs from `MomoeMoE` in its state: the parameters and persistent buffers are those of the stock layer. A
    layer without a bias in its state keeps balancing off.

    Args:
        stock: the layer whose parts this one takes over.
        settings: of the job's layers.
        save_percent: of this layer.
        rate: how far an optimizer step moves the bias; 0 where balancing is off.
    """

    def __init__(self, stock: MoE, settings: ConvertedModel, save_percent: float, rate: float):
        nn.Module.__init__(self)  # the base class would make parameters
        of_gpt_oss = isinstance(stock.experts, GptOssGroupedExperts)
        experts_class: Any = ConvertedGptOssExperts if of_gpt_oss else ConvertedExperts
        experts = experts_class(stock.experts, save_percent, settings.backend, settings.check_ids)
        experts.scores_on_input = stock.score_before_experts
        self.experts = experts
        self.router = converted_router(stock.router)
        self.reorderer = stock.reorderer
        self.shared_experts = stock.shared_experts
        self.score_before_experts = stock.score_before_experts
        self.tp_mesh = self.gatherer = self.dispatcher = None
        has_bias = stock.expert_bias is not None
        self.load_balance_coeff = rate if has_bias and rate else None
        self.load_balance_rule = settings.load_balance_rule
        self.load_balance_average = settings.load_balance_average
        device = self.router.gate.weight.device
        bias_E = torch.zeros(self.num_experts, device=device) if stock.expert_bias is None else stock.expert_bias
        self.register_buffer("expert_bias", bias_E.to(torch.float32), persistent=has_bias)  # gpt-oss's is bfloat16
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        self._set_up_router(settings)

    def _set_up_router(self, settings: ConvertedModel) -> None:
        router = self.router
        with torch.device(router.gate.weight.device):
            if self.load_balance_coeff and self.load_balance_rule == QUANTILE and router.top_k < router.num_experts:
                router.count_margins()
            router.aux_loss_weight, router.aux_loss_scope = settings.aux_loss_weight, settings.aux_loss_scope
            router.z_loss_weight = settings.router_z_loss_weight
            if settings.aux_loss_weight and settings.aux_loss_scope == "global":
                router.record_shares()

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> out (B, L, D)."""
        ours = self.gatherer is not None or self.dispatcher is not None
        if ours or not isinstance(next(self.experts.parameters(recurse=False)), DTensor):
            return super().forward(x_BLD)
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])  # TorchTitan's expert parallelism
        scores_TK, ids_TK = self.router(x_TD, self.expert_bias, x_BLD.shape[0])
        counts_E = count_experts(ids_TK, self.num_experts)
        out_TD = self._through_rows(x_TD, ids_TK, scores_TK, counts_E)
        record_counts(self, self.tokens_per_expert, counts_E)
        if self.shared_experts is not None:
            out_TD = self.shared_experts(x_TD) + out_TD
        return out_TD.view(x_BLD.shape)

    def _through_rows(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        """Rows sorted by expert to the experts and back, as TorchTitan's expert parallelism sends them."""
        order_R = ids_TK.reshape(-1).argsort(stable=True)
        rows_RD = x_TD[order_R // ids_TK.shape[1]]
        if self.score_before_experts:
            rows_RD = (rows_RD.float() * scores_TK.reshape(-1, 1)[order_R]).to(x_TD.dtype)
        rows_RD = self.experts(rows_RD, counts_E)
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        out_TKD = rows_RD[back_R].view(*ids_TK.shape, -1)
        if self.score_before_experts:
            return out_TKD.sum(dim=1)
        return torch.bmm(scores_TK[:, None], out_TKD.float())[:, 0].to(x_TD.dtype)


class DenseDims(ParallelDims):
    """Parallel dimensions without the expert parallelism of TorchTitan's layers; the ranks of each are as they were.

    Args:
        dims: of the job.
    """

    def __init__(self, dims: ParallelDims):
        vars(self).update(vars(dims))

    @property
    def ep_enabled(self) -> bool:
        return False


def apply_own_dispatch(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> ParallelDims:
    """Spread the experts of a converted model over its expert-parallel ranks, if the job names our dispatch.

    Returns:
        What TorchTitan's parallelization of the model is to be called with.
    """
    if not (parallel_dims.ep_enabled and dispatches(job_config)):
        return parallel_dims
    dispatch: str = job_config.momoe.expert_dispatch  # pyright: ignore[reportAttributeAccessIssue] - of the section
    mesh = parallel_dims.get_mesh("ep")
    for module in model.modules():
        if isinstance(module, ConvertedMoE):
            spread_experts(module, mesh, mesh, dispatch)
    logger.info(f"Expert parallelism by momoe.expert_dispatch = {dispatch!r}")
    return DenseDims(parallel_dims)


class MomoeConverter:
    """TorchTitan's `ModelConverter` "momoe".

    Raises:
        ValueError: a job or a model with which it cannot work; names the field.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        check_converter(job_config)
        self.job_config = job_config

    def convert(self, model: nn.Module) -> None:
        """Replace the MoE layers of a whole model, before any parallelism is applied."""
        layers = moe_layers(model)
        settings = model_settings(self.job_config, layers)
        section: Any = getattr(self.job_config, "momoe", Momoe())
        given = parse_save_percent(section.save_percent, "momoe.save_percent")
        percents = [0.0] if given == AUTO else given  # "auto" is chosen when the layers are parallelised
        check_num_layers(percents, len(layers), "momoe.save_percent")
        percents = percents * (len(layers) if len(percents) == 1 else 1)
        if others := [i for i in section.load_balance_off_layers if i not in layers]:
            raise ValueError(f"momoe.load_balance_off_layers names {others}, but the MoE layers are {list(layers)}")
        for (layer_id, block), percent in zip(layers.items(), percents, strict=True):
            rate = 0.0 if layer_id in section.load_balance_off_layers else settings.load_balance_rate
            block.moe = ConvertedMoE(block.moe, settings, percent, rate)
        vars(self.job_config)[CONVERTED] = vars(model)[CONVERTED] = settings
        logger.info(f"Our experts and routers in {len(layers)} MoE layers, by the model converter 'momoe'")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing: load balancing is a hook of the optimizer that `momoe_titan.register` builds."""


def moe_layers(model: nn.Module) -> dict[int, Any]:
    """The blocks of a model that have an MoE layer, by their index.

    Raises:
        ValueError: there are none, or some of another kind.
    """
    blocks: Any = model.get_submodule("layers").named_children()
    layers = {int(name): block for name, block in blocks if isinstance(getattr(block, "moe", None), MoE)}
    if not layers:
        raise ValueError("model.converters names 'momoe', but model.flavor has no MoE layers of TorchTitan's")
    known = (GroupedExperts, GptOssGroupedExperts)
    for block in layers.values():
        if type(block.moe.experts) not in known:
            raise ValueError(
                f"model.converters names 'momoe', but model.name has experts of another kind, "
                f"{type(block.moe.experts).__name__}"
            )
    return layers


def model_settings(job_config: JobConfig, layers: dict[int, Any]) -> ConvertedModel:
    """What the job says of these layers, and where it has no section [momoe], what the layers say themselves."""
    moe: MoE = next(iter(layers.values())).moe
    section: Any = getattr(job_config, "momoe", None)
    rate, rule = moe.load_balance_coeff or 0.0, "sign"
    if section is not None:
        if moe.load_balance_coeff is None and section.load_balance_rate:
            logger.warning(
                "Load balancing stays off: the model has load_balance_coeff = None, and no bias in its state"
            )
        rate = section.load_balance_rate if moe.load_balance_coeff is not None else 0.0
        rule = section.load_balance_rule
    section = section or Momoe()
    return ConvertedModel(
        moe_layer_ids=list(layers),
        moe_args=MoEArgs(num_experts=moe.router.num_experts, top_k=moe.router.top_k),
        backend=section.backend,
        load_balance_rate=rate,
        load_balance_rule=rule,
        load_balance_average=section.load_balance_average,
        aux_loss_weight=section.aux_loss_weight,
        aux_loss_scope=section.aux_loss_scope,
        router_z_loss_weight=section.router_z_loss_weight,
        check_ids=section.check_ids,
    )
