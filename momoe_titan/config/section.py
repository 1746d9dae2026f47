"""Defines the fields of the `[momoe]` section and their help texts.

TorchTitan merges the `JobConfig` below into its own when the TOML file says
`job.custom_config_module = "momoe_titan.job_config"`, so that the fields can be
set in the file, on the command line (`--momoe.save_percent 50`) and are listed
by `--help`.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from momoe_titan.config.field_types import check_types
from momoe_titan.save_percent import parse_save_percent

Backend = Literal["auto", "triton", "torch", "torchtitan"]
BalanceRule = Literal["sign", "proportional", "quantile"]
AuxLossScope = Literal["sequence", "batch", "global"]
Packing = Literal["concatenate", "interleave", "best_fit"]
MixedPrecision = Literal["weights", "autocast"]
ExpertDispatch = Literal["auto", "all_ranks", "chosen_ranks"]

STOCK_BACKEND: Backend = "torchtitan"
AUTOCAST: MixedPrecision = "autocast"
ALL_RANKS: ExpertDispatch = "all_ranks"
BACKENDS = get_args(Backend)
OUR_BACKENDS = tuple(backend for backend in BACKENDS if backend != STOCK_BACKEND)
BALANCE_RULES = get_args(BalanceRule)
AUX_LOSS_SCOPES = get_args(AuxLossScope)
OWN_DATASETS = ("local", "python_stdlib", "python_stdlib_validation")  # all others are TorchTitan's


@dataclass
class DataSource:
    """One of several datasets to train on: a table `[[momoe.data]]`."""

    path: str | list[str] = ""
    """
    A file, a folder or a pattern, as training.dataset_path names
    them, or a list of these; or token shards, which no list holds.
    """

    dataset: str = "local"
    """
    "local" for files at path, or "python_stdlib".
    """

    text_field: str = ""
    """
    Which field of a .jsonl or .parquet record holds the text; left
    out, it is momoe.data_text_field.
    """

    weight: float = 1.0
    """
    Share of this dataset's text in training, in any unit. A dataset
    that is shorter than its share is read several times.
    """


@dataclass
class Momoe:
    """Mixture-of-Experts layers by momoe_titan."""

    save_percent: float | list[float] | Literal["auto"] = 0.0
    """
    How much of the experts' pre-activations to keep for the backward,
    in percent: 0 keeps nothing and recomputes them (least memory),
    100 keeps all (fastest). One number for all MoE layers, or one
    number per MoE layer, first layer first (TOML `[0, 50, 100]`,
    command line `0 50 100`). Changes memory and time, never the
    result. "auto" takes as much as fits into memory_budget: chosen
    at the start by the plan (docs/memory_planning.md), corrected once by
    the memory measured in the first steps, kept in the dump folder
    for a resumed run.
    """

    memory_budget: float = 0.9
    """
    How much of a GPU's memory a run may take: up to 1 a share of it,
    above 1 GiB. Read by save_percent "auto" and by `python -m
    momoe_titan.plan`. Leave the rest for what they do not foresee,
    memory fragmentation above all.
    """

    backend: Backend = "auto"
    """
    What computes the experts: "triton" (our GPU kernels), "torch" (a
    loop over experts, any device), "auto" (triton on a CUDA device,
    torch otherwise), or "torchtitan" (TorchTitan's own MoE layer from
    the same initial weights, for comparison; save_percent then has no
    effect).
    """

    load_balance_rate: float = 1e-3
    """
    How far one optimizer step moves the bias that steers tokens
    toward experts with too few of them (u in arXiv 2408.15664). The
    rule "quantile" has no rate. 0 turns balancing off, whatever the
    rule.
    """

    load_balance_rule: BalanceRule = "quantile"
    """
    How the bias moves: "quantile" solves, once per optimizer step,
    for the bias that gives each expert its fair share of the step's
    tokens. "sign" moves it by the rate in the direction that evens
    out the load, "proportional" by the rate times the relative error
    of the load. docs/balancing.md says when to choose which.
    """

    load_balance_average: float = 1.0
    """
    For "quantile": the share of the way to the solved bias that one
    step goes, above 0 and up to 1. Below 1 the bias is an average
    over steps. After the warm-up the share falls with the learning
    rate: the slower the weights move, the longer the average.
    """

    load_balance_off_layers: list[int] = field(default_factory=list)
    """
    Layers, by their index in the model from 0, whose bias does not
    move.
    """

    aux_loss_weight: float = 0.0
    """
    Weight of an auxiliary load-balancing loss (Switch Transformer,
    arXiv 2101.03961), which reaches the gradients and not the logged
    loss. 0 leaves it out. Works with every load_balance_rule.
    """

    aux_loss_scope: AuxLossScope = "global"
    """
    Whose tokens the auxiliary loss evens out: those of each
    "sequence" (as in DeepSeek-V3), of a rank's "batch" (one
    microbatch), or of all ranks and microbatches of the last optimizer
    step ("global", as in Qwen3, but one step late).
    """

    router_z_loss_weight: float = 0.0
    """
    Weight of the router z-loss (ST-MoE, arXiv 2202.08906), which keeps
    the router's logits small. Reaches the gradients and not the logged
    loss. 0 leaves it out.
    """

    vocab_size: int = 0
    """
    Size of the vocabulary, for a tokenizer other than the one the
    flavor was made for. 0 keeps the flavor's own.
    """

    data_text_field: str = "text"
    """
    Which field of a .jsonl or .parquet record holds the text, for
    datasets named "local". Has no effect on .txt files.
    """

    data_streaming: bool = False
    """
    Without effect, kept for older configurations. Files are read once
    before the first step, and then from a memory-mapped cache; large
    data starts at once from token shards (`python -m
    momoe_titan.data.tokenize`).
    """

    data: list[DataSource] = field(default_factory=list)
    """
    Several datasets to mix, each a table `[[momoe.data]]` with the
    fields path, dataset, text_field and weight. Needs
    training.dataset = "local" without a training.dataset_path.
    """

    data_shuffle: bool = True
    """
    Shuffle the documents of the training data anew in each pass over
    them, by debug.seed. Validation keeps their order.
    """

    data_packing: Packing = "concatenate"
    """
    How documents fill sequences: "concatenate" puts one behind the
    other and cuts where a sequence is full. "interleave" cuts alike,
    but takes the next sequence from another document, so that a step
    sees many: for documents longer than a sequence and small batches.
    Validation concatenates then. "best_fit" chooses whole documents
    that fit and pads what is left, so that only documents longer than
    a sequence are cut.
    """

    document_mask: bool = False
    """
    Attention stays inside documents: a token does not attend to those
    that are packed before its own. By flex attention, which skips what
    is masked. Not with context parallelism.
    """

    loss_chunk_mib: float = 384
    """
    How many MiB of logits the loss holds at a time. Output layer, cross
    entropy and their gradients are computed for one chunk of tokens
    after the other, so that all logits never exist at once. 0 holds
    them all: TorchTitan's loss.
    """

    cuda_graphs: bool = False
    """
    Run the forward and the backward of a step from a CUDA graph, which
    the host starts by one call, with the Triton kernels, on one GPU, with
    FSDP or HSDP, or with tensor or pipeline parallelism alone. The kernels
    are the same. A job that cannot be captured runs without, and a line
    says why; where capturing fails with FSDP or in a pipeline, the job
    ends. The activations' memory stays reserved between steps, except
    where a validation may need it.
    """

    fsdp_copies: bool = False
    """
    Exchange FSDP's weights and gradients between the GPUs of a host by
    their copy engines and not by NCCL, which takes multiprocessors from
    the kernels beside it. Where a group of weights, mostly a block, has
    more than 256 MiB, NCCL does it, and so it does between hosts, with
    expert or pipeline parallelism, and where GPUs cannot read each
    other's memory; a line says so. The buffers, five of each size, are
    beside PyTorch's memory; the memory plan counts them.
    """

    mixed_precision: MixedPrecision = "weights"
    """
    How a job without FSDP computes in training.mixed_precision_param.
    "weights": as FSDP does, with weights and residuals in it, beside
    master weights and moments in training.dtype. "autocast": matrix
    products in it, weights and residuals in training.dtype. Jobs under
    DistributedDataParallel take autocast whatever this says.
    """

    expert_dispatch: ExpertDispatch = "auto"
    """
    Where expert parallelism sends a token. "chosen_ranks": to the ranks
    that own its experts; the host waits in every MoE layer to learn how
    many come. "all_ranks": to all, without a wait, in parts compiled as
    a whole; more is sent, and a rank has room for all tokens at once.
    "auto": "all_ranks" where it sends at most 1.3 times as much. For a
    model that the converter "momoe" has changed: TorchTitan's own.
    """

    check_ids: bool = False
    """
    Debugging: check in every step that the router chose existing
    experts. Costs a wait for the device in every MoE layer.
    """

    def __post_init__(self) -> None:
        """Make a list of `save_percent` unless it is "auto"; refuse a value that no job can have.

        Raises:
            ValueError: names the field, as written in TOML, and its value.
        """
        self.save_percent = parse_save_percent(self.save_percent, "momoe.save_percent")
        self.data = [_data_source(i, table) for i, table in enumerate(self.data)]
        check_types("momoe", self)
        infinity = float("inf")
        # Written so that NaN is refused too.
        for name, is_good, must in (
            (
                "memory_budget",
                0 < self.memory_budget < infinity,
                "above 0: up to 1 a share of a GPU's memory, above 1 GiB",
            ),
            ("load_balance_rate", 0 <= self.load_balance_rate < infinity, "a finite number of at least 0"),
            ("load_balance_average", 0 < self.load_balance_average <= 1, "above 0 and at most 1"),
            ("aux_loss_weight", 0 <= self.aux_loss_weight < infinity, "a finite number of at least 0"),
            ("router_z_loss_weight", 0 <= self.router_z_loss_weight < infinity, "a finite number of at least 0"),
            (
                "load_balance_off_layers",
                all(layer >= 0 for layer in self.load_balance_off_layers),
                "a list of layer indices from 0",
            ),
            ("vocab_size", self.vocab_size >= 0, "0 (the flavor's own) or a positive number of tokens"),
            ("loss_chunk_mib", 0 <= self.loss_chunk_mib < infinity, "0 (all logits at once) or a number of MiB"),
            ("data_text_field", self.data_text_field != "", "the name of a field"),
        ):
            if not is_good:
                raise ValueError(f"momoe.{name} is {getattr(self, name)!r}, must be {must}")


def _data_source(index: int, table: Any) -> DataSource:
    """One of `momoe.data`: TorchTitan hands over the table of a TOML file as it is."""
    name = f"momoe.data[{index}]"
    if isinstance(table, dict):
        known = [each.name for each in fields(DataSource)]
        if unknown := sorted(set(table) - set(known)):
            raise ValueError(f"{name} has no field {unknown[0]!r}, only {', '.join(known)}")
        table = DataSource(**table)
    if not isinstance(table, DataSource):
        raise ValueError(f"{name} is {table!r}, must be a table [[momoe.data]]")
    check_types(name, table)
    if table.dataset.lower() not in OWN_DATASETS:
        raise ValueError(f"{name}.dataset is {table.dataset!r}, must be one of {', '.join(map(repr, OWN_DATASETS))}")
    if table.dataset.lower() != "local" and not isinstance(table.path, str):
        raise ValueError(f"{name}.path is {table.path!r}, must be one folder, or left out, with {table.dataset!r}")
    if not 0 < table.weight < float("inf"):
        raise ValueError(f"{name}.weight is {table.weight!r}, must be a finite number above 0")
    return table


@dataclass
class JobConfig:
    """The section that TorchTitan adds to its own JobConfig."""

    momoe: Momoe = field(default_factory=Momoe)
