"""Runs forward and backward from CUDA graphs: the host starts one graph in place of thousands of kernels."""

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from momoe_titan.components.adamw import local
from momoe_titan.components.compute_weights import ComputeWeights
from momoe_titan.config.compile import compiles_model
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.section import STOCK_BACKEND, Momoe
from momoe_titan.model.experts import MomoeExperts
from momoe_titan.model.parallel.gathered import job_gathers_tokens
from momoe_titan.model.parallel.peer_memory import one_sequence
from momoe_titan.model.parallel.pipeline import stages_of
from momoe_titan.moe.expert_stats import prepare_capture

Body = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
CALLS_BEFORE_CAPTURE = 3  # the first compile kernels, and allocate what is allocated once
PIPELINE_SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS")  # the others' backward comes in two parts


def reason_against(config: JobConfig, dims: ParallelDims, model_parts: Sequence[nn.Module]) -> str | None:
    """Why the forward and the backward of this job cannot be captured, or None where they can."""
    momoe = config.momoe  # pyright: ignore[reportAttributeAccessIssue] - of job.custom_config_module
    checkpointing, degrees = config.activation_checkpoint, config.parallelism
    several = dims.world_size > 1
    divided = [dims.fsdp_enabled, dims.tp_enabled, dims.pp_enabled] if several else []
    scheduled = degrees.pipeline_parallel_schedule in PIPELINE_SCHEDULES and not degrees.pipeline_parallel_schedule_csv
    for applies, reason in (
        (several and not any(divided), "of jobs on several GPUs, those with DDP have none"),
        (several and _dispatches(model_parts), "expert parallelism waits for the number of rows that arrive"),
        (several and dims.cp_enabled, "there is context parallelism"),
        (sum(divided) > 1, "there are two of FSDP, tensor and pipeline parallelism"),
        (several and dims.pp_enabled and not scheduled, f"the pipeline's schedule is none of {PIPELINE_SCHEDULES}"),
        (config.training.enable_cpu_offload, "training.enable_cpu_offload waits for the GPU"),
        (momoe.backend in (STOCK_BACKEND, "torch"), f'momoe.backend = "{momoe.backend}" waits for the GPU'),
        (momoe.check_ids, "momoe.check_ids waits for the GPU"),
        (
            # Under expert parallelism the blocks that checkpointing wraps are not compiled.
            (checkpointing.mode != "none" and checkpointing.preserve_rng_state)
            and (not compiles_model(config) or degrees.expert_parallel_degree > 1),
            "activation_checkpoint.preserve_rng_state reads the random generator's state in every block",
        ),
        (config.optimizer.early_step_in_backward, "optimizer.early_step_in_backward steps inside the backward"),
        (bool(config.model.converters), f"model.converters = {config.model.converters} may wait for the GPU"),
        (
            getattr(getattr(model_parts[0], "model_args", None), "attn_type", "sdpa") != "sdpa",
            "the attention's masks are built on the host",
        ),
    ):
        if applies:
            return reason
    return None


def _dispatches(model_parts: Sequence[nn.Module]) -> bool:
    """Whether an MoE layer sends tokens to some of the ranks."""
    return any(getattr(module, "dispatcher", None) is not None for part in model_parts for module in part.modules())


def would_capture(config: JobConfig, world_size: int) -> bool:
    """Whether the steps of a job on so many ranks run from CUDA graphs on GPUs, as far as its configuration says."""
    if config.model.name != MODEL_NAME or not getattr(config, "momoe", Momoe()).cuda_graphs:
        return False
    degrees = config.parallelism
    others = degrees.tensor_parallel_degree * degrees.context_parallel_degree * degrees.pipeline_parallel_degree
    shards = degrees.data_parallel_shard_degree
    if shards < 0:  # the ranks that are left
        shards = world_size // (others * degrees.data_parallel_replicate_degree)
    dims: Any = SimpleNamespace(
        world_size=world_size,
        fsdp_enabled=shards > 1 or degrees.context_parallel_degree > 1,
        tp_enabled=degrees.tensor_parallel_degree > 1,
        cp_enabled=degrees.context_parallel_degree > 1,
        pp_enabled=degrees.pipeline_parallel_degree > 1,
    )
    waits = degrees.expert_parallel_degree > 1 and not job_gathers_tokens(config)
    return not waits and reason_against(config, dims, [nn.Module()]) is None


@dataclass
class _Captured:
    """A graph, the tensors that it reads, and those that it writes. The next replay overwrites all of them."""

    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    received: list[Tensor]  # what a pipeline's stages receive into, which they replace after a validation

    def replay(self, batch: dict[str, Tensor]) -> Tensor:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()


class CapturedStep:
    """Forward and backward of a microbatch: calls `body` a few times, and then replays a CUDA graph of it.

    A graph repeats the captured work on the same addresses. Hence there is one graph for each shape of the batch, each
    save_percent of the layers, and each set of addresses of parameters, buffers and gradients. The first microbatch of
    a step makes gradients, and a later one adds to them: these are two graphs. All graphs share one pool of memory,
    which keeps the activations' memory between steps too; `release` gives it back. After a capture that fails, with a
    warning, `body` is called throughout.

    FSDP's collectives are captured with the rest, on its own streams, and so are the buffers that it gathers weights
    in; so are those of tensor parallelism. No rank takes part in a collective while it captures. All ranks capture in
    the same calls: they see the same shapes and release together (`make_room`). NCCL may have them meet in a capture,
    and copies between GPUs use their staging buffers in turn, which has to be the same turn on all ranks. A capture
    that fails leaves FSDP's modules, or a pipeline's stages, somewhere in the middle of a step; there the error is
    raised.

    Of a pipeline the whole schedule is captured, with what the stages send each other. The schedule sets itself up in
    its first step, and after a validation in its next one, where the ranks talk about shapes: this step runs without a
    graph.

    Args:
        body: called with the inputs by name, the labels and the number of valid tokens; gives the loss and makes or
            adds the gradients.
        model_parts: whose parameters get the gradients.
        ready: says whether a graph may be captured now.
        stages: those of a pipeline that this rank has.

    Raises:
        RuntimeError: from a call, where a capture fails with FSDP or in a pipeline.
    """

    def __init__(
        self,
        body: Body,
        model_parts: Sequence[nn.Module],
        ready: Callable[[], bool] = lambda: True,
        stages: Sequence[PipelineStage] = (),
    ):
        self.body, self.ready, self.stages = body, ready, stages
        self.parameters = [p for part in model_parts for p in part.parameters()]
        self.buffers = [b for part in model_parts for b in part.buffers()]
        self.experts = [m for part in model_parts for m in part.modules() if isinstance(m, MomoeExperts)]
        self.sharded = [m for part in model_parts for m in part.modules() if isinstance(m, FSDPModule)]
        self.failed = False
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Captured] = {}
        self._num_bytes = 0  # of the pool
        self._steps_to_wait = 0  # until the next step after which a pipeline is set up for training
        prepare_capture(self.parameters[0].device)

    def __call__(self, inputs: dict[str, Tensor], labels: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss, a tensor of its own. Gradients are made or added to, as by `body`."""
        if self.failed or self._sets_up_stages() or not self.ready():
            return self.body(inputs, labels, num_tokens)
        for module in self.sharded:
            module.reshard()  # what a validation has gathered: a graph gathers for itself
        batch = {**inputs, "labels": labels, "num_tokens": num_tokens}
        key = self._key(batch)
        found = self._graphs.get(key)
        if found is None:
            if self._is_too_early(batch):
                return self.body(inputs, labels, num_tokens)
            found = self._capture(key, batch)
        return self.body(inputs, labels, num_tokens) if found is None else found.replay(batch)

    def make_room(self) -> None:
        """Call on all ranks before something other than training runs: `release`, unless as much memory again is free.

        All ranks release their graphs, or none: NCCL may have them meet while they capture.
        """
        self._steps_to_wait = 2 if self.stages else 0
        scarce = bool(self._graphs) and torch.cuda.mem_get_info()[0] < self._num_bytes
        if dist.is_initialized() and dist.get_world_size() > 1:
            anywhere = torch.full((), float(scarce), device=self.parameters[0].device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
            scarce = bool(anywhere)
        if scarce:
            self.release()

    def release(self) -> None:
        """Give the graphs' memory back; the next call captures again."""
        if self._graphs:
            torch.cuda.synchronize()  # a graph must not end while it runs
            self._graphs.clear()
            self._num_bytes = 0

    def _sets_up_stages(self) -> bool:
        """Whether this call belongs to a pipeline's first step after something other than training."""
        if self._steps_to_wait and all(p.grad is None for p in self.parameters):  # a step begins
            self._steps_to_wait -= 1
        return self._steps_to_wait > 0

    def _is_too_early(self, batch: dict[str, Tensor]) -> bool:
        """Whether the kernels of such a call may not all be compiled yet. Counts the call.

        A later microbatch is captured only when the first one has a graph, whose gradients keep their addresses.
        """
        is_first = all(p.grad is None for p in self.parameters)
        kind = (*self._work(batch), is_first)
        calls = self._calls.get(kind, 0)
        self._calls[kind] = calls + 1
        return calls < CALLS_BEFORE_CAPTURE or not (is_first or self._graphs)

    def _work(self, batch: dict[str, Tensor]) -> tuple[Hashable, ...]:
        shapes = tuple((name, t.shape, t.dtype) for name, t in batch.items())
        return shapes, tuple(layer.save_percent for layer in self.experts)

    @torch.no_grad()
    def _key(self, batch: dict[str, Tensor]) -> Hashable:
        return (
            self._work(batch),
            tuple(local(p).data_ptr() for p in self.parameters),
            tuple(local(b).data_ptr() for b in self.buffers),
            tuple(0 if p.grad is None else local(p.grad).data_ptr() for p in self.parameters),
        )

    def _capture(self, key: Hashable, batch: dict[str, Tensor]) -> _Captured | None:
        static = {name: t.clone() for name, t in batch.items()}
        inputs = dict(static)
        labels, num_tokens = inputs.pop("labels"), inputs.pop("num_tokens")
        before = [(p, p.grad) for p in self.parameters]
        received = self._received()
        if not self._graphs:
            gc.collect()  # a backward kept by a circle of references would bring its stream into the capture
        pool = next((captured.graph.pool() for captured in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: threads that load data may use the GPU's API meanwhile.
            with one_sequence(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                reserved = torch.cuda.memory_reserved()
                loss = self.body(inputs, labels, num_tokens).detach()
        except RuntimeError as error:
            if self.sharded or self.stages:
                error.add_note("a CUDA graph could not be captured; momoe.cuda_graphs = false trains without")
                raise
            self.failed = True
            self.release()
            for parameter, gradient in before:
                parameter.grad = gradient
            logger.warning(f"CUDA graphs are off from here on, since capturing one failed: {_first_line(error)}")
            return None
        self._num_bytes += torch.cuda.memory_reserved() - reserved
        captured = _Captured(graph, static, loss, [(p, p.grad) for p in self.parameters], received)
        self._graphs[key] = captured
        return captured

    def _received(self) -> list[Tensor]:
        infos = [i for s in self.stages for by_chunk in (s.args_recv_info, s.grad_recv_info) for i in by_chunk.values()]
        buffers = [getattr(info, "buffer", None) for of_chunk in infos for info in of_chunk]  # none of the first stage
        return [buffer for buffer in buffers if buffer is not None]


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class StepFromGraph:
    """Mixin for TorchTitan's trainer: runs forward and backward from CUDA graphs, where `momoe.cuda_graphs` says so.

    Attributes:
        captured: what runs them, from `set_up_cuda_graphs` on. None where the job runs without graphs.
    """

    job_config: JobConfig
    parallel_dims: ParallelDims
    model_parts: list[nn.Module]
    pp_schedule: Any
    captured: CapturedStep | None = None

    def set_up_cuda_graphs(self) -> None:
        """To be called when model, optimizers and validator are built. Where the job asks for graphs and cannot have
        them on a GPU, a line says why."""
        config = self.job_config
        wanted = config.model.name == MODEL_NAME and getattr(config, "momoe", Momoe()).cuda_graphs
        if not wanted or not torch.cuda.is_available():
            return
        reason = reason_against(config, self.parallel_dims, self.model_parts)
        if reason is not None:
            logger.info(f"CUDA graphs are off: {reason}")
            return
        choices = [part.auto_save_percent for part in self.model_parts if hasattr(part, "auto_save_percent")]

        def memory_is_measured() -> bool:
            return all(choice.steps_left == 0 for choice in choices)  # pyright: ignore - no part of the model

        stages = stages_of(self.pp_schedule) if self.parallel_dims.pp_enabled else []
        self.captured = CapturedStep(self._forward_backward, self.model_parts, memory_is_measured, stages)
        weights: ComputeWeights | None = getattr(self, "weights", None)
        if weights is not None:  # their gradients are made first, before the parameters get them
            self.captured.parameters += weights.copies.values()
        if (validator := getattr(self, "validator", None)) is not None:
            validator.before_validation = self.captured.make_room

    def close(self) -> None:
        """As the class behind this one. NCCL would wait for ever for the end of graphs that hold its collectives."""
        if self.captured is not None:
            self.captured.release()
        super().close()  # pyright: ignore[reportAttributeAccessIssue] - a mixin

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """Make the gradients of a microbatch, or add them. Gives its loss."""
        run = self._forward_backward if self.captured is None else self.captured
        return run(input_dict, labels, global_valid_tokens)

    def _forward_backward(self, inputs: dict[str, Tensor], labels: Tensor, num_tokens: Tensor) -> Tensor:
        step: Any = super().forward_backward_step  # pyright: ignore[reportAttributeAccessIssue] - a mixin
        return step(input_dict=inputs, labels=labels, global_valid_tokens=num_tokens)
