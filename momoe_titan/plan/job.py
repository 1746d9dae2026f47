"""Two training steps of a job on fake tensors, through TorchTitan's own trainer."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torchtitan.train as titan
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.config import JobConfig, TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims, utils as dist_utils
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from momoe_titan.kernels import autograd
from momoe_titan.model.activation_checkpoint import compiles_model
from momoe_titan.model.args import AUTO
from momoe_titan.model.moe import MomoeExperts

from .cost import StepCost
from .memory import MemoryPlan, Moment
from .trace import as_on_gpu, GRADIENTS, MemoryTrace, Place

H100 = (9, 0)
PARAMETERS = "parameters"
OPTIMIZER = "optimizer state"
# Names of modules and the part that their memory counts as; the innermost one counts.
_PARTS = {
    "tok_embeddings": "embedding",
    "output": "logits",
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


class FakeTrainer(titan.Trainer):
    """TorchTitan's trainer, its constructor aside: what has no memory on the GPU is left out.

    Args:
        config: of the job.
        dims: its parallel dimensions.
    """

    def __init__(self, config: JobConfig, dims: ParallelDims):
        self.job_config = config
        self.device = torch.device("cpu")
        self.parallel_dims = dims
        self.train_spec = get_train_spec(config.model.name)
        self.tokenizer = None
        self.model_args = copy.deepcopy(self.train_spec.model_args[config.model.flavor])
        self.model_args.update_from_config(config)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = self.train_spec.model_cls(self.model_args)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.loss_fn = self.train_spec.build_loss_fn(config, parallel_dims=dims)
        self.model_parts = [self.train_spec.parallelize_fn(model, dims, config)]
        batch = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
        accumulated = max(config.training.global_batch_size, batch) // batch
        self.gradient_accumulation_steps = min(accumulated, 2)  # a third microbatch is like the second
        self.train_context = dist_utils.get_train_context(
            dims.tp_enabled and not config.parallelism.disable_loss_parallel
        )
        self.maybe_enable_amp = dist_utils.maybe_enable_amp(dims, config.training.mixed_precision_param, "cpu")
        self.step = 0
        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        self.lr_schedulers = SimpleNamespace(schedulers=[scheduler], step=lambda: None)
        self.checkpointer = SimpleNamespace(maybe_wait_for_staging=lambda: None)
        self.metrics_processor = SimpleNamespace(should_log=lambda step: False)

    def allocate(self) -> None:
        """Parameters and optimizer; under a FakeTensorMode, where the constructor must not run."""
        self.model_parts[0].to_empty(device="cpu").train()
        self.optimizers = self.train_spec.build_optimizers_fn(
            self.model_parts, self.job_config.optimizer, self.parallel_dims
        )

    def batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        shape = (self.job_config.training.local_batch_size, self.job_config.training.seq_len)
        while True:
            yield {"input": torch.empty(shape, dtype=torch.int64)}, torch.empty(shape, dtype=torch.int64)


def trace_job(
    config: JobConfig, world_size: int = 1, capability: tuple[int, int] = H100, cost: StepCost | None = None
) -> MemoryPlan:
    """The memory of this job's steps on the first of `world_size` ranks; `cost` takes their work.

    Whatever the job's save_percent is, the plan knows the memory at all. Needs TorchTitan to have
    been imported as for a machine without GPU (`momoe_titan.train.describe_cpu`). Starts a process
    group of its own.

    Raises:
        ValueError: a job that the model refuses, or with more than one pipeline stage.
    """
    if (degree := config.parallelism.pipeline_parallel_degree) > 1:
        raise ValueError(f"parallelism.pipeline_parallel_degree is {degree}: pipeline stages are not planned yet")
    config = copy.deepcopy(config)
    notes = []
    traced = compiles_model(config) and config.parallelism.expert_parallel_degree == 1  # the experts' op too
    if config.compile.enable:
        config.compile.enable = False
        notes.append("compile.enable: planned as without torch.compile, but with dz beside z")
    config.checkpoint.enable = False
    ep = config.parallelism.expert_parallel_degree
    sheds = ep > 1 and hasattr(config, "momoe") and config.momoe.save_percent == AUTO
    if hasattr(config, "momoe"):
        config.momoe.save_percent = [100.0]
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
        notes.append("activation_checkpoint.mode = 'memory_budget': planned as 'none'")
    with mock.patch.object(autograd, "_is_last_use", lambda *args: False) if traced else contextlib.nullcontext():
        dims = _parallel_dims(config, world_size)
        plan = trace_training(config, dims, capability, cost)
        if sheds and plan.layers:
            tokens, rows = (trace_training(config, dims, capability, shares=shares) for shares in ((ep, 1), (ep, ep)))
            plan = plan.with_growth(tokens, rows, ep)
    return dataclasses.replace(plan, notes=notes)


def trace_training(
    config: JobConfig,
    dims: ParallelDims,
    capability: tuple[int, int],
    cost: StepCost | None = None,
    shares: tuple[int, int] = (1, 1),
) -> MemoryPlan:
    """The memory of a training step of this job as it is configured; `shares` of `as_on_gpu`."""
    with as_on_gpu(capability, shares):
        trainer = FakeTrainer(config, dims)
        model = trainer.model_parts[0]
        places = _places(model)
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryTrace(places.get, cost) as trace:
            trainer.allocate()
            for tensor in [*model.parameters(), *model.buffers()]:
                trace.relabel(tensor, PARAMETERS)
            kept, layer_kept = _watch_phases(trainer, trace)
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
    layers = [places[m].layer for m in model.modules() if isinstance(m, MomoeExperts)]
    return MemoryPlan(
        layers=layers,
        moments=moments,
        kept=kept,
        num_parameters=trainer.num_parameters,
        layer_kept={layer: layer_kept.get(layer, 0) for layer in layers},
        events=events,
    )


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
        raise ValueError(f"[parallelism] does not fit {world_size} ranks: {e}") from e
    dims.build_mesh()
    return dims


def _watch_phases(trainer: FakeTrainer, trace: MemoryTrace) -> tuple[dict[str, int], dict[str | None, int]]:
    """Let the trace know what the trainer does; what is alive after the last loss, by part and by layer."""
    kept, layer_kept = {}, {}
    loss_fn = trainer.loss_fn

    def forward(*args):
        trace.phase = "forward"

    def loss(*args):
        trace.phase = "loss"
        with trace.within(Place("loss")):
            out = loss_fn(*args)
        for found, now in ((kept, trace.parts()), (layer_kept, trace.by_layer())):
            found.clear()
            found.update(now)
        trace.phase = "clip"  # what comes after the backward
        return out

    def optimizer(*args):
        trace.phase = "optimizer"

    trainer.model_parts[0].register_forward_pre_hook(forward)
    trainer.loss_fn = loss
    trainer.optimizers.register_step_pre_hook(optimizer)
    return kept, layer_kept


def _places(model: nn.Module) -> dict[nn.Module, Place]:
    found = {}
    for name, module in model.named_modules():
        names = name.split(".")
        part = next((_PARTS[n] for n in reversed(names) if n in _PARTS), None)
        if part is not None:
            layer = names[names.index("layers") + 1] if "layers" in names[:-1] else None
            found[module] = Place(part, layer)
    return found
