"""Plans a job: traces two of its training steps on fake tensors, with TorchTitan's own trainer."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train as titan
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from momoe_titan.components.cuda_graph import would_capture
from momoe_titan.components.loss import Loss, LossInModel
from momoe_titan.components.training_step import TrainingStep
from momoe_titan.config.checks import job as checks
from momoe_titan.config.compile import compiles_model
from momoe_titan.config.flavor import configured_args
from momoe_titan.config.machine import Machine, checking_for
from momoe_titan.config.section import STOCK_BACKEND, Momoe
from momoe_titan.kernels import versions
from momoe_titan.kernels.gpu import Load, PlannedGpu
from momoe_titan.kernels.multi_tensor import plan_traffic
from momoe_titan.memory.plan import MemoryPlan, Moment
from momoe_titan.model.experts import SavingExperts
from momoe_titan.model.model import MomoeLlama
from momoe_titan.model.parallel.fsdp import staging_bytes
from momoe_titan.model.parallel.gathered import job_gathers_tokens, staging_of_job
from momoe_titan.plan.cost import StepCost
from momoe_titan.plan.on_gpu import EvenSizes, as_on_gpu
from momoe_titan.plan.trace import GRADIENTS, MemoryTrace, Place
from momoe_titan.save_percent import AUTO

H100 = (9, 0)
PARAMETERS = "parameters"
NARROW_WEIGHTS = "narrow copies of the weights"
OPTIMIZER = "optimizer state"
BUCKETS = "gradient buckets of DDP"
DDP_BUCKET_BYTES = 100 << 20  # what TorchTitan's apply_ddp asks for
# Names of modules and the part that their memory counts as; the innermost one counts.
_PARTS = {
    "tok_embeddings": "embedding",
    "output": "output and loss",
    "attention": "attention",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared experts",
    "feed_forward": "dense feed-forward",
    "moe": "MoE, outside the experts",
    "layers": "residual stream",
}


class FakeTrainer(TrainingStep, LossInModel, titan.Trainer):
    """TorchTitan's trainer with another constructor, which leaves out everything that takes no GPU memory.

    Args:
        config: of the job.
        dims: the parallel dimensions of the job.
        load: the tokens and rows that the rank receives with expert parallelism.

    Attributes:
        on_phase: called with "clip" before the gradients are clipped.
    """

    def __init__(self, config: JobConfig, dims: ParallelDims, load: Load):
        self.job_config = config
        self.device = torch.device("cpu")
        self.parallel_dims = dims
        self.train_spec = get_train_spec(config.model.name)
        self.tokenizer = None
        self.model_args = configured_args(config)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = self.train_spec.model_cls(self.model_args)
        build_model_converters(config, dims).convert(model)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.loss_fn = self.train_spec.build_loss_fn(config, parallel_dims=dims)
        self.buckets: GradientBuckets | None = None
        seen_dims = dims
        if dims.dp_replicate_enabled and not dims.fsdp_enabled:
            # DistributedDataParallel, which takes no fake tensors; nothing composes with it, so that no other is left.
            group = dims.get_mesh("dp_replicate").get_group()
            self.buckets = GradientBuckets(group, DDP_BUCKET_BYTES)
            seen_dims = ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1)
        self.model_parts = [self.train_spec.parallelize_fn(model, seen_dims, config)]
        for module in self.model_parts[0].modules():
            if (dispatcher := getattr(module, "dispatcher", None)) is not None:
                dispatcher.exchange_sizes = EvenSizes(dispatcher.num_experts, dispatcher.group.size(), load)
        batch = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
        accumulated = max(config.training.global_batch_size, batch) // batch
        self.gradient_accumulation_steps = min(accumulated, 2)  # a third microbatch is like the second
        self.train_context = dist_utils.get_train_context(
            dims.tp_enabled and not config.parallelism.disable_loss_parallel
        )
        self.maybe_enable_amp = dist_utils.maybe_enable_amp(dims, config.training.mixed_precision_param, "cpu")
        self.step = 0
        self.microbatches_left = 0
        self.on_phase: Callable[[str], None] = lambda phase: None
        # What is neither needed nor has memory on the GPU.
        scheduler: Any = SimpleNamespace(get_last_lr=lambda: [0.0])
        lr_schedulers: Any = SimpleNamespace(schedulers=[scheduler], step=lambda: None)
        self.lr_schedulers = lr_schedulers
        checkpointer: Any = SimpleNamespace(maybe_wait_for_staging=lambda: None)
        self.checkpointer = checkpointer
        metrics_processor: Any = SimpleNamespace(should_log=lambda step: False, finish_log=lambda: None)
        self.metrics_processor = metrics_processor

    def allocate(self) -> None:
        """Parameters and optimizer; under a FakeTensorMode, where the constructor must not run."""
        model = self.model_parts[0]
        with shared_parameters(model):
            model.to_empty(device="cpu").train()
        if self.buckets is not None:
            self.buckets.allocate(model)
        self.optimizers = self.train_spec.build_optimizers_fn(
            self.model_parts, self.job_config.optimizer, self.parallel_dims
        )
        self.set_up_precision()

    def train_step(self, data_iterator: Any) -> None:
        self.microbatches_left = self.gradient_accumulation_steps
        super().train_step(data_iterator)

    def forward_backward_step(self, **batch) -> torch.Tensor:
        loss = super().forward_backward_step(**batch)
        self.microbatches_left -= 1
        if self.microbatches_left == 0:
            self.on_phase("clip")  # what TorchTitan does next
        return loss

    def batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        shape = (self.job_config.training.local_batch_size, self.job_config.training.seq_len)
        while True:
            yield {"input": torch.empty(shape, dtype=torch.int64)}, torch.empty(shape, dtype=torch.int64)


class CompiledCrossEntropy(torch.autograd.Function):
    """What a cross entropy of whole logits does to memory where torch.compile fuses it.

    Between forward and backward nothing is kept but the logits themselves, and the backward writes one gradient of
    their dtype. Without torch.compile there are float32 copies of the logits, of their softmax and of both gradients.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        plan_traffic([logits], [])
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (logits,) = ctx.saved_tensors
        grad = torch.empty_like(logits)
        plan_traffic([logits], [grad])
        return grad


def as_compiled(loss_fn: Loss) -> Loss:
    """A loss with the memory that `loss_fn` has under torch.compile; of sharded logits, that without."""

    def compiled(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        whole = pred.dim() > 1 and not isinstance(pred, DTensor)
        return CompiledCrossEntropy.apply(pred) if whole else loss_fn(pred, labels)

    return compiled


class GradientBuckets:
    """What DistributedDataParallel holds beside a model and its gradients: buckets into which these are copied, and
    which are reduced when full. It stands in for its reducer, which takes no fake tensors.

    Args:
        group: of the ranks with a copy of the model.
        max_bytes: of a bucket; one that holds less takes another gradient, whatever its size.
    """

    def __init__(self, group: dist.ProcessGroup, max_bytes: int):
        self.group, self.max_bytes = group, max_bytes
        self.tensors: list[torch.Tensor] = []

    def allocate(self, model: nn.Module) -> None:
        parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        members: list[list[nn.Parameter]] = []
        room = 0
        for p in parameters:
            if room <= 0 or p.dtype != members[-1][0].dtype:
                room = self.max_bytes
                members.append([])
            members[-1].append(p)
            room -= p.nbytes
        for bucket in members:
            tensor = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype)
            self.tensors.append(tensor)
            self._reduce_when_full(tensor, bucket)

    def _reduce_when_full(self, tensor: torch.Tensor, bucket: list[nn.Parameter]) -> None:
        missing = len(bucket)

        def arrived(parameter: nn.Parameter) -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                missing = len(bucket)
                dist.all_reduce(tensor, group=self.group)

        for p in bucket:
            p.register_post_accumulate_grad_hook(arrived)


@contextmanager
def shared_parameters(model: nn.Module) -> Iterator[None]:
    """Keep what is one parameter of several modules one, such as tied embeddings, where the block replaces parameters.

    `to_empty` gives each of these modules a parameter of its own. A trainer ties them again when it initialises the
    weights, which a plan leaves out.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    yield
    for first, *others in names.values():
        for other in others:
            module, _, name = other.rpartition(".")
            setattr(model.get_submodule(module), name, model.get_parameter(first))


def check_job(config: JobConfig, world_size: int) -> None:
    """Refuse what training on so many ranks, each with a GPU, refuses; but for validation, which is not planned.

    Raises:
        ValueError: names the field and its value.
    """
    config = copy.deepcopy(config)
    config.validation.enable = False
    with checking_for(Machine(world_size, has_gpu=True)):
        checks.check_job(config)


def trace_job(
    config: JobConfig, world_size: int = 1, capability: tuple[int, int] = H100, cost: StepCost | None = None
) -> MemoryPlan:
    """The memory of this job's steps on the first of `world_size` ranks; `cost` takes their work.

    Whatever the job's save_percent is, the plan knows the memory at all. Needs TorchTitan to have
    been imported as for a machine without GPU (`momoe_titan.train.describe_cpu`). Starts a process
    group of its own.

    Raises:
        ValueError: a job that training refuses, with more than one pipeline stage, or with
            training.enable_cpu_offload.
    """
    check_job(config, world_size)
    if (degree := config.parallelism.pipeline_parallel_degree) > 1:
        raise ValueError(f"parallelism.pipeline_parallel_degree is {degree}: pipeline stages are not planned yet")
    if config.training.enable_cpu_offload:
        raise ValueError("training.enable_cpu_offload is True: what is kept on the host is not planned")
    captures = would_capture(config, world_size)
    config = copy.deepcopy(config)
    momoe: Any = getattr(config, "momoe", None)
    notes = []
    ep = config.parallelism.expert_parallel_degree
    gpu = PlannedGpu(capability, compiled=compiles_model(config) and ep == 1)  # with the experts' op in its graphs
    fuses_loss = config.compile.enable and "loss" in config.compile.components
    if config.compile.enable:
        config.compile.enable = False
        notes.append(
            "compile.enable: planned as without torch.compile, but for two things: the loss is planned compiled, and "
            "the gradient of the pre-activations has memory of its own"
        )
    config.checkpoint.enable = config.validation.enable = False
    evicts = ep > 1 and momoe is not None and momoe.save_percent == AUTO and not job_gathers_tokens(config)
    if momoe is not None:
        momoe.save_percent = [100.0]
        momoe.check_ids = False  # reads the ids, of which fake ones have none
    if momoe is not None and momoe.document_mask:
        momoe.document_mask = False
        notes.append("momoe.document_mask: planned as without it, which takes as much memory and more time")
    if capability[0] == H100[0] and getattr(momoe, "backend", STOCK_BACKEND) != STOCK_BACKEND:
        notes += portable_kernels_note()
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
        notes.append("activation_checkpoint.mode = 'memory_budget': planned as 'none'")
    with checking_for(Machine(world_size, has_gpu=True)):
        dims = _parallel_dims(config, world_size)
        plan = trace_training(config, dims, gpu, cost, fuses_loss)
        if evicts and plan.layers:
            loads = Load(tokens=ep), Load(tokens=ep, rows=ep)
            gpus = [dataclasses.replace(gpu, load=load) for load in loads]
            tokens, rows = (trace_training(config, dims, loaded, None, fuses_loss) for loaded in gpus)
            plan = plan.with_growth(tokens, rows, ep)
    return dataclasses.replace(plan, notes=notes, from_graph=captures)


def portable_kernels_note() -> list[str]:
    """Why a plan for a Hopper GPU is one of portable kernels, if it is."""
    if versions.takes_hopper_kernels():
        return []
    release = f"Triton {triton.__version__}, {versions.ANY_RELEASE} not set"
    return [
        f"{release}: planned with the portable kernels; the Hopper kernels need Triton {versions.hopper_releases()}"
    ]


def trace_training(
    config: JobConfig, dims: ParallelDims, gpu: PlannedGpu, cost: StepCost | None = None, fuses_loss: bool = False
) -> MemoryPlan:
    """The memory of a training step of this job, as it is configured, on such a GPU.

    Its loss is planned `as_compiled` if `fuses_loss`.
    """
    with as_on_gpu(gpu):
        trainer = FakeTrainer(config, dims, gpu.load)
        if fuses_loss:
            trainer.loss_fn = as_compiled(trainer.loss_fn)
        model = trainer.model_parts[0]
        places = _places(model)
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryTrace(places.get, cost) as trace:
            trainer.allocate()
            for tensor in trainer.buckets.tensors if trainer.buckets else ():
                trace.relabel(tensor, BUCKETS)
            for tensor in [*model.parameters(), *model.buffers()]:
                trace.relabel(tensor, PARAMETERS)
            for tensor in trainer.weights.copies.values() if trainer.weights else ():
                trace.relabel(tensor, NARROW_WEIGHTS)
            kept, layer_kept, begun = _watch_phases(trainer, trace)
            batches = trainer.batches()
            for _ in range(2):  # the first makes the optimizer state
                trace.begin_step()
                if cost is not None:
                    cost.clear()
                    cost.num_microbatches = trainer.gradient_accumulation_steps
                trainer.train_step(batches)
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        trace.relabel(parameter.grad, GRADIENTS)
                for optimizer in trainer.optimizers:
                    for state in optimizer.state.values():
                        for tensor in state.values():
                            if isinstance(tensor, torch.Tensor):
                                trace.relabel(tensor, OPTIMIZER)
            moments = [Moment(phase, list(z), m.base, m.parts) for (phase, z), m in trace.moments.items()]
            events = list(trace.events)
    layers = [places[m].layer or "" for m in model.modules() if isinstance(m, SavingExperts)]
    return MemoryPlan(
        layers=layers,
        moments=moments,
        kept=kept,
        num_parameters=trainer.num_parameters,
        staging=_staging(model, dims, config) if isinstance(model, MomoeLlama) else 0,
        layer_kept={layer: layer_kept.get(layer, 0) for layer in layers},
        events=events,
        step=(begun["forward"], begun["clip"]),
    )


def _staging(model: MomoeLlama, dims: ParallelDims, config: JobConfig) -> int:
    stock = getattr(config, "momoe", Momoe()).backend == STOCK_BACKEND
    return staging_bytes(model, dims, config) + (0 if stock else staging_of_job(config, dims))


def _parallel_dims(config: JobConfig, world_size: int) -> ParallelDims:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("fake", rank=0, world_size=world_size)
    parallelism = config.parallelism
    try:
        dims = ParallelDims(
            dp_shard=parallelism.data_parallel_shard_degree,
            dp_replicate=parallelism.data_parallel_replicate_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=parallelism.expert_parallel_degree,
            etp=parallelism.expert_tensor_parallel_degree,
            world_size=world_size,
        )
    except AssertionError as e:
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise ValueError(f"[parallelism] does not fit {ranks}{': ' if str(e) else ''}{e}") from e
    dims.build_mesh()
    return dims


def _watch_phases(
    trainer: FakeTrainer, trace: MemoryTrace
) -> tuple[dict[str, int], dict[str | None, int], dict[str, int]]:
    """Let the trace know what the trainer does.

    Returns:
        What is alive after the last loss, by part and by layer; and at which event each phase of the last step has
        begun, "forward" that of its first microbatch.
    """
    kept, layer_kept, begun = {}, {}, {}
    loss_fn = trainer.loss_fn

    def forward(*args):
        first = begun.get("forward", 0)
        begin("forward")
        if trainer.microbatches_left < trainer.gradient_accumulation_steps:
            begun["forward"] = first

    def loss(*args):
        begin("loss")
        with trace.within(Place("loss")):
            out = loss_fn(*args)
        for found, now in ((kept, trace.parts()), (layer_kept, trace.by_layer())):
            found.clear()
            found.update(now)
        begin("backward")  # of which autograd has not begun yet
        return out

    def begin(phase):
        trace.phase = phase
        begun[phase] = len(trace.events)

    def output(module, args, kwargs):
        if "labels" in kwargs:  # the loss is computed in the model
            begin("loss")

    def optimizer(*args):
        begin("optimizer")

    trainer.model_parts[0].register_forward_pre_hook(forward)
    trainer.model_parts[0].get_submodule("output").register_forward_pre_hook(output, with_kwargs=True)
    trainer.loss_fn = loss
    trainer.on_phase = begin
    trainer.optimizers.register_step_pre_hook(optimizer)
    return kept, layer_kept, begun


def _places(model: nn.Module) -> dict[nn.Module, Place]:
    found = {}
    for name, module in model.named_modules():
        names = name.split(".")
        part = next((_PARTS[n] for n in reversed(names) if n in _PARTS), None)
        if part is not None:
            layer = names[names.index("layers") + 1] if "layers" in names[:-1] else None
            found[module] = Place(part, layer)
    return found
