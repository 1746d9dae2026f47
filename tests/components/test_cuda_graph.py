"""Forward and backward from CUDA graphs: what is captured when, and that nothing but the time changes."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchtitan.config import JobConfig

import momoe_titan.register  # noqa: F401 - the model of the jobs below
from momoe_titan.components import cuda_graph
from momoe_titan.components.cuda_graph import (
    CALLS_BEFORE_CAPTURE,
    CapturedStep,
    StepFromGraph,
    reason_against,
    would_capture,
)
from momoe_titan.config.reading import read_job
from momoe_titan.config.section import Momoe
from tests.support.tiny import SEQ, VOCAB, build, tiny_args


class FakeGraph:
    """Repeats on the same memory what was run while it was captured, as a CUDA graph does."""

    capturing: "FakeGraph | None" = None
    work = ()  # of the last body: (function that computes loss and gradients, the tensors that they go to)

    def replay(self):
        compute, targets = self.work
        for target, value in zip(targets, compute(), strict=True):
            target.copy_(value)

    def pool(self):
        return 1


@contextlib.contextmanager
def fake_capture(graph, pool=None, capture_error_mode=None):
    FakeGraph.capturing = graph
    try:
        yield
    finally:
        FakeGraph.capturing = None


class Job:
    """Trains two weights on batches; counts how often the host ran the body."""

    def __init__(self, monkeypatch, fails=False, stages=()):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", fake_capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        reserved = itertools.count(0, 2**20)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
        self.model = nn.Linear(3, 2)
        self.fails, self.on_host = fails, 0
        self.step = CapturedStep(self.body, [self.model], stages=stages)

    def body(self, inputs, labels, num_tokens):
        self.on_host += 1
        weights = list(self.model.parameters())
        added_to = [w.grad for w in weights]

        def compute():
            loss = ((self.model(inputs["input"]) - labels) ** 2).sum() / num_tokens
            gradients = torch.autograd.grad(loss, weights)
            added = [g if a is None else a + g for g, a in zip(gradients, added_to, strict=True)]
            return loss.detach(), *added

        loss, *gradients = compute()
        if FakeGraph.capturing is not None and self.fails:
            weights[0].grad = torch.full_like(weights[0], float("nan"))
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if FakeGraph.capturing is None:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad.copy_(gradient)
        else:  # nothing is computed yet
            for weight in weights:
                weight.grad = torch.full_like(weight, float("nan")) if weight.grad is None else weight.grad
            FakeGraph.capturing.work = compute, [loss, *(w.grad for w in weights)]
        return loss

    def run(self, call, rows=4):
        """The loss of a batch and the weights' gradients, which the caller may change."""
        torch.manual_seed(call)
        batch = torch.randn(rows, 3), torch.randn(rows, 2), torch.tensor(float(rows))
        loss = self.step({"input": batch[0]}, *batch[1:])
        want = ((self.model(batch[0]) - batch[1]) ** 2).sum() / batch[2]
        torch.testing.assert_close(loss, want.detach())
        return loss, torch.autograd.grad(want, list(self.model.parameters()))

    def optimizer_step(self, want):
        for weight, gradient in zip(self.model.parameters(), want, strict=True):
            torch.testing.assert_close(weight.grad, gradient)
            weight.data -= 0.1 * weight.grad
            weight.grad.zero_()  # a replay must not depend on what became of its gradients
            weight.grad = None


def test_replays_after_a_few_calls(monkeypatch):
    job = Job(monkeypatch)
    losses = []
    for call in range(CALLS_BEFORE_CAPTURE + 4):
        loss, want = job.run(call)
        losses.append(loss)
        job.optimizer_step(want)
    assert job.on_host == CALLS_BEFORE_CAPTURE + 1
    assert len({float(loss) for loss in losses}) == len(losses)  # tensors of their own, which no replay changes
    for free, captured in ((2**20, 1), (2**20 - 1, 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**40))
        job.step.make_room()
        job.optimizer_step(job.run(90)[1])
        assert job.on_host == CALLS_BEFORE_CAPTURE + captured  # anew at once, where memory was scarce


def test_a_second_microbatch_adds_to_the_gradients(monkeypatch):
    job = Job(monkeypatch)
    for call in range(CALLS_BEFORE_CAPTURE + 3):
        gradients = [job.run(10 * call + i)[1] for i in range(3)]
        job.optimizer_step([sum(of_weight) for of_weight in zip(*gradients, strict=True)])
    assert job.on_host == 3 * CALLS_BEFORE_CAPTURE + 2 and len(job.step._graphs) == 2


def test_what_a_graph_cannot_know_has_graphs_of_its_own(monkeypatch):
    job = Job(monkeypatch)
    for call in range(CALLS_BEFORE_CAPTURE + 1):
        job.optimizer_step(job.run(call)[1])
    for change in (
        lambda: None,
        lambda: setattr(job.model.weight, "data", job.model.weight.data.clone()),  # another address
    ):
        change()
        before = job.on_host
        for call in range(2):
            job.optimizer_step(job.run(call, rows=5)[1])
        assert job.on_host == before + 2
    job.step.ready = lambda: False
    before = job.on_host
    job.optimizer_step(job.run(0)[1])
    assert job.on_host == before + 1


def test_goes_on_without_a_graph_that_cannot_be_captured(monkeypatch, caplog):
    job = Job(monkeypatch, fails=True)
    monkeypatch.setattr(cuda_graph.logger, "propagate", True)
    for call in range(CALLS_BEFORE_CAPTURE + 3):
        job.optimizer_step(job.run(call)[1])
    assert job.on_host == CALLS_BEFORE_CAPTURE + 4  # the failed capture among them
    (line,) = (r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage())
    assert "operation not permitted" in line and "more" not in line


def test_a_pipeline_sets_itself_up_again_after_a_validation(monkeypatch):
    """The step after it runs on the host with all its microbatches; then the graphs go on, with buffers still there."""

    def received(stage):
        stage.args_recv_info = {0: (SimpleNamespace(),), 1: (SimpleNamespace(buffer=torch.ones(2)),)}
        stage.grad_recv_info = {0: (SimpleNamespace(buffer=None), SimpleNamespace(buffer=torch.ones(3)))}
        return [stage.args_recv_info[1][0].buffer, stage.grad_recv_info[0][1].buffer]

    stage = SimpleNamespace()
    kept = received(stage)
    job = Job(monkeypatch, stages=[stage])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))

    def step(call):
        gradients = [job.run(10 * call + i)[1] for i in range(2)]
        job.optimizer_step([sum(of_weight) for of_weight in zip(*gradients, strict=True)])

    for call in range(2):
        step(call)
    job.step.make_room()  # before any graph
    for call in range(CALLS_BEFORE_CAPTURE):
        step(call)
    assert len(job.step._graphs) == 2
    before = job.on_host
    job.step.make_room()
    received(stage)
    for call in range(3):
        step(call)
        assert job.on_host == before + 2
    assert len(job.step._graphs) == 2
    for graph in job.step._graphs.values():
        assert all(a is b for a, b in zip(graph.received, kept, strict=True))


def test_a_pipeline_whose_capture_fails_cannot_go_on(monkeypatch):
    job = Job(monkeypatch, fails=True, stages=[SimpleNamespace(args_recv_info={}, grad_recv_info={})])
    for call in range(CALLS_BEFORE_CAPTURE):
        job.optimizer_step(job.run(call)[1])
    with pytest.raises(RuntimeError) as failure:
        job.run(0)
    assert "momoe.cuda_graphs = false" in "".join(failure.value.__notes__)


@pytest.mark.parametrize("scarce", [(False, False), (True, False), (False, True)])
def test_all_ranks_release_their_graphs_or_none(monkeypatch, scarce):
    """One that captured anew while others replay might wait for them."""
    sent = []
    monkeypatch.setattr(cuda_graph.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda_graph.dist, "get_world_size", lambda: 2)
    for other in scarce[::-1]:

        def maximum(tensor, op, other=other):
            sent.append(float(tensor))
            tensor.fill_(max(float(tensor), float(other)))

        monkeypatch.setattr(cuda_graph.dist, "all_reduce", maximum)
        job = Job(monkeypatch)
        for call in range(CALLS_BEFORE_CAPTURE + 1):
            job.optimizer_step(job.run(call)[1])
        free = 0 if scarce[len(sent)] else 2**40
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**40))
        job.step.make_room()
        assert bool(job.step._graphs) is not any(scarce)
    assert sent == [float(mine) for mine in scarce]


@pytest.mark.parametrize(
    "section, field, value, says",
    [
        ("momoe", "backend", "torchtitan", "backend"),
        ("momoe", "check_ids", True, "check_ids"),
        ("optimizer", "early_step_in_backward", True, "early_step"),
        ("model", "converters", ["float8"], "converters"),
        ("activation_checkpoint", "mode", "full", "preserve_rng_state"),
        ("training", "enable_cpu_offload", True, "cpu_offload"),
        (None, None, None, None),
    ],
)
def test_says_why_not(section, field, value, says):
    config = job_with_graphs()
    if section:
        setattr(getattr(config, section), field, value)
    for dims in (SimpleNamespace(world_size=1), several_ranks()):
        reason = reason_against(config, dims, [nn.Linear(1, 1)])
        assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    "kinds, says",
    [
        ({"fsdp": True, "dp_replicate": True}, None),
        ({"fsdp": False, "dp_replicate": True}, "DDP"),
        ({"fsdp": False, "tp": True}, None),
        ({"fsdp": False, "pp": True}, None),
        ({"ep": True}, None),
        ({"tp": True}, "two of"),
        ({"cp": True}, "context parallelism"),
        ({"pp": True}, "two of"),
        ({"fsdp": False, "pp": True, "tp": True}, "two of"),
    ],
)
def test_says_which_parallelism_has_none(kinds, says):
    reason = reason_against(job_with_graphs(), several_ranks(**kinds), [nn.Linear(1, 1)])
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    "name, value, captured",
    [
        ("pipeline_parallel_schedule", "GPipe", True),
        ("pipeline_parallel_schedule", "Interleaved1F1B", True),
        ("pipeline_parallel_schedule", "ZBVZeroBubble", False),
        ("pipeline_parallel_schedule_csv", "schedule.csv", False),
    ],
)
def test_says_which_schedules_have_none(name, value, captured):
    config, dims = job_with_graphs(), several_ranks(fsdp=False, pp=True)
    setattr(config.parallelism, name, value)
    reason = reason_against(config, dims, [nn.Linear(1, 1)])
    assert reason is None if captured else "schedule" in reason


def test_a_layer_that_sends_to_chosen_ranks_has_none():
    layer = nn.Linear(1, 1)
    layer.dispatcher = object()
    dims = several_ranks(ep=True)
    assert "expert parallelism" in reason_against(job_with_graphs(), dims, [nn.Sequential(layer)])


DDP = ["--parallelism.data_parallel_replicate_degree"]
EP = ["--parallelism.expert_parallel_degree", "2"]


@pytest.mark.parametrize(
    "options, ranks, captured",
    [
        ([], 1, True),
        ([], 2, True),
        (["--momoe.no-cuda_graphs"], 1, False),
        (["--momoe.backend", "torchtitan"], 1, False),
        (EP, 2, True),
        ([*EP, "--momoe.expert_dispatch", "chosen_ranks"], 2, False),
        ([*EP, "--activation_checkpoint.mode", "full"], 2, False),  # wraps blocks that are not compiled
        (["--activation_checkpoint.mode", "full"], 2, True),
        ([*DDP, "2", "--parallelism.data_parallel_shard_degree", "1"], 2, False),
        (["--parallelism.tensor_parallel_degree", "2"], 2, True),
        (["--parallelism.tensor_parallel_degree", "2"], 4, False),
        (["--parallelism.pipeline_parallel_degree", "2"], 2, True),
        (["--parallelism.context_parallel_degree", "2"], 2, False),
    ],
)
def test_a_plan_knows_whether_steps_run_from_graphs(options, ranks, captured):
    assert would_capture(read_job(["--job.config_file", "train_configs/500m.toml", *options]), ranks) == captured


def test_graphs_end_before_the_job_does():
    """While a graph holds a collective, the end of its process group waits for ever."""
    order = []

    class Behind:
        def close(self):
            order.append("closed")

    class Trainer(StepFromGraph, Behind):
        captured = SimpleNamespace(release=lambda: order.append("released"))

    Trainer().close()
    assert order == ["released", "closed"]


@pytest.mark.parametrize(
    "gpu, reason, stages", [(True, None, ["a stage"]), (True, None, []), (True, "", []), (False, None, [])]
)
def test_what_is_captured_is_told_of_all_that_it_has_to_know(monkeypatch, gpu, reason, stages):
    """Copies of weights, which get their gradients first, stages, and choices of memory that are not final yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cuda_graph, "reason_against", lambda *args: reason)
    monkeypatch.setattr(cuda_graph, "stages_of", lambda schedule: schedule)

    class Trainer(StepFromGraph):
        job_config, pp_schedule = JobConfig(), stages
        parallel_dims = SimpleNamespace(pp_enabled=bool(stages))
        model_parts = [nn.Linear(3, 2), nn.Linear(3, 2)]
        weights = SimpleNamespace(copies={"a": torch.ones(1), "b": torch.ones(1)})
        validator = SimpleNamespace(before_validation=None)

    trainer = Trainer()
    trainer.job_config.model.name, trainer.job_config.momoe = "momoe_llama", Momoe(cuda_graphs=True)
    trainer.model_parts[1].auto_save_percent = choice = SimpleNamespace(steps_left=2)
    trainer.set_up_cuda_graphs()
    if not gpu or reason is not None:
        assert trainer.captured is None and trainer.validator.before_validation is None
        return
    captured = trainer.captured
    assert trainer.validator.before_validation == captured.make_room and captured.stages == stages
    known = {id(tensor) for tensor in captured.parameters}
    assert known == {id(t) for part in trainer.model_parts for t in part.parameters()} | {
        id(t) for t in trainer.weights.copies.values()
    }
    assert not captured.ready()
    choice.steps_left = 0
    assert captured.ready()


def test_a_step_runs_from_its_graph_only_where_there_is_one():
    class Behind:
        def forward_backward_step(self, *, input_dict, labels, global_valid_tokens):
            return "plain", input_dict, labels, global_valid_tokens

    class Trainer(StepFromGraph, Behind):
        captured = None

    trainer, arguments = Trainer(), ({}, torch.ones(1), torch.ones(()))
    given = dict(zip(("input_dict", "labels", "global_valid_tokens"), arguments, strict=True))
    assert trainer.forward_backward_step(**given) == ("plain", *arguments)
    trainer.captured = lambda *args: ("from the graph", *args)
    assert trainer.forward_backward_step(**given) == ("from the graph", *arguments)


def job_with_graphs():
    config = JobConfig()
    config.momoe = SimpleNamespace(backend="auto", check_ids=False)
    config.activation_checkpoint.mode = "none"
    return config


def several_ranks(**kinds):
    kinds = {"fsdp": True, "dp_replicate": False, "ep": False, "tp": False, "cp": False, "pp": False, **kinds}
    return SimpleNamespace(world_size=2, **{f"{kind}_enabled": value for kind, value in kinds.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_the_plain_step_on_a_gpu(compiled):
    """Losses, gradients, counts and entropy of two microbatches a step, over steps, a release and a switch."""
    from momoe_titan.moe.expert_stats import want_entropy

    results = []
    for captures in (False, True):
        torch._dynamo.reset()
        model = build(tiny_args(dim=64, moe_hidden_dim=64), device="cuda").bfloat16()
        if compiled:
            for block in model.layers.values():
                block.compile(fullgraph=True)

        def body(inputs, labels, num_tokens, model=model):
            logits = model(inputs["input"]).float()
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_tokens
            )
            loss.backward()
            return loss.detach()

        step = CapturedStep(body, [model]) if captures else body
        seen = []
        torch.manual_seed(0)
        for number in range(10):
            want_entropy(number % 2 == 0)
            for _ in range(2):
                tokens = torch.randint(VOCAB, (2, SEQ + 1), device="cuda")
                seen.append(step({"input": tokens[:, :-1]}, tokens[:, 1:], torch.tensor(2.0 * SEQ, device="cuda")))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
            if captures and number == 6:
                assert len(step._graphs) == 2
                step.release()
        want_entropy(False)
        routers = [block.moe.router for block in model.layers.values() if block.moe_enabled]
        counts = [block.moe.tokens_per_expert for block in model.layers.values() if block.moe_enabled]
        results.append((seen, [r.entropy_and_tokens for r in routers], counts))
        if captures:
            assert not step.failed
    for plain, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-3)
    assert results[0][1][0][1] == 5 * 2 * 2 * SEQ
