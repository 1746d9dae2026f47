"""Train the same model with different load balancing at equal tokens, and compare.

    python benchmarks/balance.py --flavor 500M --steps 400 --arms all --out balance.json
    python benchmarks/balance.py --flavor 500M --steps 1200 --arms quantile sign_0.001 --seeds 0 1 2 --out long.json

An arm is one of the names in ARMS, or settings of its own: "NAME:rule=quantile,average=0.5,lr=1e-3".
All arms of a seed start from the same weights and read the same batches. The text is every .py and
.md file of this Python's library and packages, whole files held out for validation, shuffled and
tokenized once. Each GPU trains one arm after another in one process, so that compilation is paid
once; a machine without a GPU trains one arm at a time. On a GPU a step is that of a job: compiled
blocks, bfloat16 copies of the weights, and a CUDA graph. Arms with backend=torchtitan train as
TorchTitan itself does: autocast, its optimizer and its clipping, no graph.

A run's results:
    val_loss          mean over the validation tokens (1M by default)
    maxvio_global     MaxVio over all validation tokens: mean of the layers, and the worst layer
    maxvio            of each step: mean of the layers, and the worst layer
    ep2_worst         of each step: tokens of the fuller half of the experts over half of all tokens,
                      in the worst layer, as two expert-parallel ranks would get them
    entropy           of the router's scores in units of ln E, mean of the layers, by step
    dead_experts      experts without a token in the validation text, over all layers
    tokens_per_s      of the second half of the steps
    curve             with --val_every: (step, seconds of training up to it, loss of 8 validation batches); the seconds
                      begin with the first step's compilation, hence count from the value of step 5 on
    floor             with --floor: MaxVio with weights frozen and the bias solved on half of the
                      validation text, on the other half: over all of it, and in batches of a step.
                      "other_half": both halves are windows in random order, mostly of the same files.
                      "other_files": the halves have no file in common, but for one that lies across the middle
An arm with steps of its own has neither curve nor floor.
"""

import argparse
import gc
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.optimizer import build_optimizers as build_stock_optimizers
from torchtitan.config import JobConfig
from torchtitan.models.llama4.infra.parallelize import apply_compile

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from momoe_titan.components.compute_weights import ComputeWeights  # noqa: E402
from momoe_titan.components.cuda_graph import CapturedStep  # noqa: E402
from momoe_titan.components.load_balancer import ExpertLoadBalancer  # noqa: E402
from momoe_titan.components.optimizer import build_momoe_optimizers  # noqa: E402
from momoe_titan.components.training_step import CLIP_EPS  # noqa: E402
from momoe_titan.kernels.quantile import count_margins  # noqa: E402
from momoe_titan.model import MomoeLlama, flavors  # noqa: E402
from momoe_titan.model.moe import BalancedMoE  # noqa: E402
from momoe_titan.model.router import Float32Linear  # noqa: E402
from momoe_titan.moe.balancing import quantile_delta  # noqa: E402
from momoe_titan.moe.expert_stats import accumulate_margins, want_entropy  # noqa: E402
from momoe_titan.moe.load_balancer import LoadBalancer  # noqa: E402
from momoe_titan.moe.router import route_tokens  # noqa: E402

ARMS = {
    "none": {"rate": 0.0},
    "sign_0.001": {"rule": "sign", "rate": 0.001},
    "sign_0.01": {"rule": "sign", "rate": 0.01},
    "proportional_0.03": {"rule": "proportional", "rate": 0.03},
    "quantile": {"rule": "quantile"},
    "quantile_1": {"rule": "quantile", "coupled": 0},
    "quantile_0.5": {"rule": "quantile", "average": 0.5, "coupled": 0},
    "quantile_0.1": {"rule": "quantile", "average": 0.1, "coupled": 0},
    "aux_0.01": {"rate": 0.0, "aux": 0.01, "scope": "global"},
    "sign_0.001_sequence_1e-4": {"rule": "sign", "rate": 0.001, "aux": 1e-4, "scope": "sequence"},
}
# Not part of "all": what the collapse comes from, and which cheap change helps.
OTHER_ARMS = {
    "quantile_not_following": {"rule": "quantile", "follow": 0},
    "none_centred": {"rate": 0.0, "router_norm": "centred"},
    "quantile_centred": {"rule": "quantile", "router_norm": "centred", "follow": 0},
    "none_init_0.1": {"rate": 0.0, "router_init_scale": 0.1},
    "none_warmup_400": {"rate": 0.0, "warmup": 400},
    "none_gate_lr_0.1": {"rate": 0.0, "gate_lr_scale": 0.1},
    "quantile_gate_lr_0.1": {"rule": "quantile", "gate_lr_scale": 0.1},
    "quantile_z_1e-3": {"rule": "quantile", "z": 1e-3},
    "quantile_aux_0.001": {"rule": "quantile", "aux": 0.001, "scope": "global"},
}
DEFAULTS = {
    "rule": "sign",
    "rate": 1.0,
    "average": 1.0,
    "aux": 0.0,
    "scope": "global",
    "z": 0.0,
    "score": "",
    "lr": 0.0,
    "warmup": -1,
    "follow": 1,  # 0: the bias is not corrected for the gate's step; 2: it is by the share of the average
    "router_norm": "none",
    "router_init_scale": 1.0,
    "gate_lr_scale": 1.0,
    "backend": "auto",
    "coupled": 1,  # the average follows the schedule
    "steps": 0,  # 0: those of --steps
    "seed": -1,  # -1: each of --seeds
}
# lr and kind of schedule of train_configs/, with a shorter warm-up for 1.4B; batch is in sequences
JOBS = {
    "500M": {"lr": 1e-3, "warmup": 100, "decay": "linear", "batch": 16, "seq_len": 2048},
    "1.4B": {"lr": 1.2e-3, "warmup": 100, "decay": "cosine", "batch": 16, "seq_len": 2048},
    "debugmodel": {"lr": 3e-3, "warmup": 10, "decay": "linear", "batch": 8, "seq_len": 256},
}
ONE_PROCESS = SimpleNamespace(
    fsdp_enabled=False,
    dp_replicate_enabled=False,
    tp_enabled=False,
    cp_enabled=False,
    ep_enabled=False,
    pp_enabled=False,
    get_optional_mesh=lambda name: None,
)


# ---- text ----------------------------------------------------------------------------------------


def text_files(limit_bytes: float) -> tuple[list[str], list[str]]:
    """Paths for training and for validation: .py and .md files of the library and the packages."""
    found: dict[str, int] = {}
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for folder, _, names in os.walk(root):
            for name in names:
                if name.endswith((".py", ".md")):
                    path = os.path.join(folder, name)
                    found[path] = os.path.getsize(path)
    paths = sorted(found)
    random.Random(0).shuffle(paths)
    total, chosen = 0, []
    for path in paths:
        if 200 < found[path] < 2_000_000:
            total += found[path]
            chosen.append(path)
        if total > limit_bytes:
            break
    held_out = {p for p in chosen if hashlib.sha256(p.encode()).digest()[0] < 13}  # 5%
    return [p for p in chosen if p not in held_out], [p for p in chosen if p in held_out]


def read_text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def make_tokenizer(paths: list[str], vocab_size: int, sample_bytes: int) -> Tokenizer:
    """Byte-level BPE trained on the first of these files; id 0 stands between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=32,
    )
    sample, size = [], 0
    for path in paths:
        sample.append(read_text(path)[:50_000])
        size += len(sample[-1])
        if size > sample_bytes:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


_tokenizer: Tokenizer | None = None


def _load_tokenizer(file: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_file(file)


def _tokenize(paths: list[str]) -> np.ndarray:
    assert _tokenizer is not None
    ids: list[int] = []
    for path in paths:
        ids += _tokenizer.encode(read_text(path)).ids
        ids.append(0)
    return np.array(ids, dtype=np.uint16)


def prepare_text(folder: Path, vocab_size: int, limit_mb: float, processes: int) -> None:
    """Write train.bin and val.bin, uint16 tokens of whole files in random order, unless they are there."""
    if (folder / "val.bin").exists():
        return
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    train, val = text_files(limit_mb * 1e6)
    file = str(folder / "tokenizer.json")
    if vocab_size < 4096:
        file = str(ROOT / "momoe_titan/assets/tokenizer/tokenizer.json")
    else:
        make_tokenizer(train, vocab_size, 20_000_000).save(file)
    print(f"{len(train)} + {len(val)} files; tokenizer after {time.perf_counter() - start:.0f} s", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _load_tokenizer, (file,)) as pool:
        for name, paths in (("train", train), ("val", val)):
            parts = pool.imap(_tokenize, [paths[i : i + 64] for i in range(0, len(paths), 64)])
            with open(folder / f"{name}.tmp", "wb") as out:
                for part in parts:
                    out.write(part.tobytes())
            os.replace(folder / f"{name}.tmp", folder / f"{name}.bin")
    sizes = [(folder / f"{name}.bin").stat().st_size // 2 for name in ("train", "val")]
    print(f"{sizes[0]:,} + {sizes[1]:,} tokens after {time.perf_counter() - start:.0f} s", flush=True)


class Batches:
    """Windows of a token file in an order that the seed alone decides."""

    def __init__(self, file: Path, batch: int, seq_len: int, seed: int, device: torch.device):
        self.tokens = np.memmap(file, dtype=np.uint16, mode="r")
        self.windows = (len(self.tokens) - 1) // seq_len
        self.order = np.random.default_rng(seed).permutation(self.windows)
        self.batch, self.seq_len, self.device = batch, seq_len, device
        if self.windows < batch:
            raise ValueError(f"{file} has {self.windows} windows of {seq_len} tokens, fewer than a batch of {batch}")

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.order[(step * self.batch + np.arange(self.batch)) % self.windows]
        length = self.seq_len
        text = np.stack([self.tokens[i * length : i * length + length + 1] for i in rows]).astype(np.int64)
        both = torch.from_numpy(text)
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


# ---- one run -------------------------------------------------------------------------------------


class CentredGate(Float32Linear):
    """A gate that sees its tokens without what they have in common."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().forward(x_TD - x_TD.detach().mean(dim=0, keepdim=True))


def build_model(flavor: str, arm: dict, job: dict, seed: int, device: torch.device, compiled: bool) -> MomoeLlama:
    args = flavors[flavor]
    args.max_seq_len = job["seq_len"]
    args.save_percent, args.backend = [100.0], arm["backend"]
    args.load_balance_rule, args.load_balance_rate = arm["rule"], arm["rate"]
    args.load_balance_average = arm["average"]
    args.aux_loss_weight, args.aux_loss_scope = arm["aux"], arm["scope"]
    args.router_z_loss_weight = arm["z"]
    args.moe_args.score_func = arm["score"] or args.moe_args.score_func
    with torch.device("meta"):
        model = MomoeLlama(args)
        if arm["router_norm"] == "centred":
            for moe in moe_layers(model):
                moe.router.gate = CentredGate(args.dim, args.moe_args.num_experts, bias=False)
    model.to_empty(device=device)
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        for moe in moe_layers(model):
            moe.router.gate.weight.mul_(arm["router_init_scale"])
    if compiled and arm["backend"] == "torchtitan":
        apply_compile(model, JobConfig().compile, ep_enabled=False)  # as TorchTitan compiles its MoE layers
    elif compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True)
    return model.train()


def moe_layers(model: torch.nn.Module) -> list[BalancedMoE]:
    return [module for module in model.modules() if isinstance(module, BalancedMoE)]


def build_optimizers(model: MomoeLlama, arm: dict, lr: float):
    config = JobConfig().optimizer
    config.lr, config.beta1, config.beta2, config.eps, config.weight_decay = lr, 0.9, 0.95, 1e-8, 0.1
    config.implementation = "fused"
    if arm["backend"] == "torchtitan":
        optimizers = build_stock_optimizers([model], config, ONE_PROCESS)
        optimizers.load_balancer = ExpertLoadBalancer([model])
        optimizers.register_step_pre_hook(optimizers.load_balancer)
    else:
        optimizers = build_momoe_optimizers([model], config, ONE_PROCESS)
    if arm["follow"] != 1:
        optimizers._optimizer_step_post_hooks.clear()
    if arm["follow"] == 2:
        balancer = optimizers.load_balancer
        optimizers.register_step_post_hook(lambda *_: follow_by_share(balancer))
    gates = {id(moe.router.gate.weight) for moe in moe_layers(model)}
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            group["lr_scale"] = 1.0
            if arm["gate_lr_scale"] != 1.0:
                of_gates = [p for p in group["params"] if id(p) in gates]
                group["params"] = [p for p in group["params"] if id(p) not in gates]
                other = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group({**other, "params": of_gates, "lr_scale": arm["gate_lr_scale"]})
    return optimizers


@torch.no_grad()
def follow_by_share(balancer: LoadBalancer) -> None:
    """Correct the biases for the gates' step as far as the average goes the whole way to the solved bias."""
    biases = [layer.expert_bias for layer in balancer.solved]
    before = [bias.clone() for bias in biases]
    balancer.follow_gates()
    for bias, old in zip(biases, before, strict=True):
        bias.copy_(torch.lerp(old, bias, balancer.average_factor()))


class Step:
    """Forward, backward, clipping and update of a model, on a GPU as a job does them.

    Args:
        model: from `build_model`.
        optimizers: from `build_optimizers`.
        arm: its settings.
        compiled: whether the blocks are.
    """

    def __init__(self, model: MomoeLlama, optimizers, arm: dict, device: torch.device, compiled: bool):
        self.model, self.optimizers, self.device = model, optimizers, device
        self.parameters = list(model.parameters())
        self.loss = torch.compile(cross_entropy) if compiled else cross_entropy
        self.is_stock = arm["backend"] == "torchtitan"
        self.weights: ComputeWeights | None = None
        self.captured: CapturedStep | None = None
        if compiled and not self.is_stock:
            self.weights = ComputeWeights([model], torch.bfloat16, sums_in_parameters_dtype=False)
            for optimizer in optimizers:
                optimizer.copies = self.weights.copies
            self.captured = CapturedStep(self._forward_backward, [model])
            self.captured.parameters += self.weights.copies.values()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss."""
        cast = self.weights or torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with cast:
            return self.loss(self.model(tokens), labels)

    def _forward_backward(self, inputs: dict, labels: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        loss = self.loss(self.model(inputs["tokens"]), labels)
        loss.backward()
        return loss.detach()

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Train one step. Gives its loss, on the device."""
        if self.captured is None or self.weights is None:
            loss = self.forward(tokens, labels)
            loss.backward()
            loss = loss.detach()
        else:
            with self.weights:
                loss = self.captured({"tokens": tokens}, labels, labels.new_ones(()))
        self._clip()
        self.optimizers.step()
        if self.weights is not None:
            self.weights.written = all(optimizer.wrote_copies for optimizer in self.optimizers)
        self.optimizers.zero_grad()
        return loss

    def _clip(self) -> None:
        if self.is_stock or not all(hasattr(optimizer, "clip_coefficient") for optimizer in self.optimizers):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            return
        guard = self.optimizers.non_finite_guard  # as `components.training_step` clips
        guard.norm = norm = guard.compute_norm(self.parameters, self.device)
        for optimizer in self.optimizers:
            optimizer.clip_coefficient = (1.0 / (norm + CLIP_EPS)).clamp(max=1.0)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))


def lr_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """Of the step with this number, from 1."""
    if step <= warmup:
        return step / max(1, warmup)
    if decay == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    falling = int(0.3 * steps)
    return 1.0 if step < steps - falling else 0.1 + 0.9 * (steps - step) / max(1, falling)


def maxvio(counts_LE: torch.Tensor) -> torch.Tensor:
    counts_LE = counts_LE.double()
    return counts_LE.amax(dim=-1) / counts_LE.mean(dim=-1).clamp(min=1e-9) - 1


def fuller_half(counts_LE: torch.Tensor) -> torch.Tensor:
    half_LE = counts_LE.double().unflatten(-1, (2, -1)).sum(dim=-1)
    return half_LE.amax(dim=-1) / half_LE.mean(dim=-1).clamp(min=1e-9)


class Run:
    """One arm from its first step to its results."""

    def __init__(self, options: argparse.Namespace, name: str, arm: dict, seed: int, device: torch.device):
        self.options, self.name, self.seed, self.device = options, name, seed, device
        self.arm = DEFAULTS | {"score": options.score} | arm
        job = JOBS[options.flavor]
        self.job = {**job, "batch": options.batch or job["batch"], "seq_len": options.seq_len or job["seq_len"]}
        self.lr = self.arm["lr"] or options.lr or job["lr"]
        self.steps = self.arm["steps"] or options.steps
        warmup = self.arm["warmup"] if self.arm["warmup"] >= 0 else options.warmup
        self.warmup = job["warmup"] if warmup < 0 else warmup
        shape = self.job["batch"], self.job["seq_len"]
        self.train_batches = Batches(options.data / "train.bin", *shape, seed, device)
        # Shuffled, so that both halves of `_floor` and all batches are of the same mix of files.
        self.val_batches = Batches(options.data / "val.bin", *shape, 0, device)
        wanted = max(1, round(options.val_tokens / (shape[0] * shape[1])))
        self.num_val = min(wanted, self.val_batches.windows // shape[0])
        self.model = build_model(options.flavor, self.arm, self.job, seed, device, options.compile)
        self.optimizers = build_optimizers(self.model, self.arm, self.lr)
        self.layers = moe_layers(self.model)
        self.step = Step(self.model, self.optimizers, self.arm, device, options.compile)

    def _synchronize(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train(self) -> dict:
        steps, start = self.steps, time.perf_counter()
        losses, counts, entropy, curve = [], [], {}, []
        half_time, validating, validated = start, 0.0, 0.0
        for step in range(1, steps + 1):
            factor = lr_factor(step, steps, self.warmup, self.job["decay"])
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * factor * group["lr_scale"]
            if self.arm["coupled"]:  # as `components.lr_schedule` does it
                share = 1.0 if step <= self.warmup else factor
                self.optimizers.load_balancer.average_factor = lambda share=share: share
            records = step % 50 == 0 or step == steps
            want_entropy(records)
            loss = self.step(*self.train_batches[step - 1])
            losses.append(loss)
            counts.append(self.optimizers.load_balancer.counts_LE)
            if records:
                sums = [moe.router.entropy_and_tokens for moe in self.layers]
                entropy[step] = statistics.fmean((s[0] / s[1]).item() for s in sums)
                for total in sums:
                    total.zero_()
            if self.options.val_every and not self.arm["steps"] and (step % self.options.val_every == 0 or step == 5):
                before = self._synchronize()
                loss_now, _ = self._count_validation(range(min(8, self.num_val)))
                self._restart()
                curve.append((step, round(before - start - validating, 3), round(loss_now.item(), 4)))
                print(f"{self.name} curve {curve[-1]}", flush=True)  # a run that is cut short has it in its log
                validating += self._synchronize() - before
            if step == steps // 2:
                half_time, validated = self._synchronize(), validating
            if step % 100 == 0 or step == 1:
                worst, mean = maxvio(counts[-1]).max().item(), maxvio(counts[-1]).mean().item()
                seconds = time.perf_counter() - start
                print(
                    f"{self.name} seed {self.seed} step {step} loss {loss.item():.3f} "
                    f"MaxVio {mean:.3f} worst {worst:.3f} {seconds:.0f} s",
                    flush=True,
                )
        seconds = self._synchronize() - half_time - (validating - validated)
        counts_SLE = torch.stack(counts)
        tokens = self.job["batch"] * self.job["seq_len"] * (steps - steps // 2)
        return {
            "loss": rounded(torch.stack(losses)),
            "maxvio": rounded(maxvio(counts_SLE).mean(dim=1)),
            "maxvio_worst_layer": rounded(maxvio(counts_SLE).amax(dim=1)),
            "ep2_worst": rounded(fuller_half(counts_SLE).amax(dim=1)),
            "entropy": {k: round(v, 4) for k, v in entropy.items()},
            "tokens_per_s": round(tokens / seconds),
            "bias_max": round(max(moe.expert_bias.abs().max().item() for moe in self.layers), 4),
            "curve": curve,
            "train_seconds": round(time.perf_counter() - start, 1),
        }

    def _count_validation(self, batches: range) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of these validation batches, and the tokens per expert of each (batches, L, E).

        Training forwards, because these count the tokens, and share the compiled graph.
        """
        losses, counts = [], []
        self._restart()
        for i in batches:
            losses.append(self.step.forward(*self.val_batches[i]).detach())
            counts.append(torch.stack([moe.tokens_per_expert for moe in self.layers]))
            for moe in self.layers:
                moe.tokens_per_expert.zero_()
        return torch.stack(losses).mean(), torch.stack(counts)

    def _restart(self) -> None:
        with torch.no_grad():
            for moe in self.layers:
                router = moe.router
                for total in (moe.tokens_per_expert, router.margins_EB, router.input_sum_C):
                    if total is not None:
                        total.zero_()

    def validate(self) -> dict:
        want_entropy(False)
        loss, counts_NLE = self._count_validation(range(self.num_val))
        total_LE = counts_NLE.sum(dim=0)
        results = {
            "val_loss": round(loss.item(), 5),
            "val_tokens": self.num_val * self.job["batch"] * self.job["seq_len"],
            "maxvio_global": round(maxvio(total_LE).mean().item(), 4),
            "maxvio_global_worst_layer": round(maxvio(total_LE).max().item(), 4),
            "maxvio_global_layers": rounded(maxvio(total_LE)),
            "maxvio_validation_batch": round(maxvio(counts_NLE).mean().item(), 4),
            "dead_experts": int((total_LE == 0).sum()),
        }
        if self.options.floor and not self.arm["steps"] and self.arm["rule"] == "quantile" and self.arm["rate"]:
            results["floor"] = self._floor()
        self._restart()
        return results

    def _floor(self) -> dict:
        found, batches = self._floor_of_halves("half"), self.val_batches
        windows = self.num_val * self.job["batch"]
        in_order, batches.order[:windows] = batches.order[:windows].copy(), np.sort(batches.order[:windows])
        found |= self._floor_of_halves("files")
        batches.order[:windows] = in_order
        return found

    def _floor_of_halves(self, name: str) -> dict:
        """Solve the biases on the first half of the validation batches, and look at both."""
        half = self.num_val // 2
        for _ in range(self.options.floor_rounds):
            self._count_validation(range(half))
            with torch.no_grad():
                margins = torch.stack([m for moe in self.layers if (m := moe.router.margins_EB) is not None]).long()
                bias_LE = torch.stack([moe.expert_bias for moe in self.layers])
                delta_LE = quantile_delta(margins, bias_LE, self.layers[0].router.top_k)
                for moe, delta_E in zip(self.layers, delta_LE, strict=True):
                    moe.expert_bias += delta_E
        found = {}
        for side, batches in (("solved", range(half)), ("other", range(half, 2 * half))):
            _, counts_NLE = self._count_validation(batches)
            found[f"{side}_{name}"] = round(maxvio(counts_NLE.sum(dim=0)).mean().item(), 4)
            if name == "half":  # batches of neighbouring windows are no batches of a step
                found[f"{side}_{name}_batch"] = round(maxvio(counts_NLE).mean().item(), 4)
        return found


def rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 4) for v in values.double().tolist()]


# ---- what the rule costs -------------------------------------------------------------------------


def milliseconds(call: Callable[..., object], *args, repeats: int = 50) -> float:
    for _ in range(5):
        call(*args)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call(*args)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def time_rule(flavor: str) -> None:
    """Print what counting costs a layer, for tokens that differ and for a layer that has collapsed,
    and what the optimizer hooks cost a step. Launches included, which a job hides behind its GPU."""
    arm, job = DEFAULTS | {"rule": "quantile"}, JOBS[flavor]
    model = build_model(flavor, arm, job, 0, torch.device("cuda"), compiled=False)
    layers, num_tokens = moe_layers(model), job["batch"] * job["seq_len"]
    router, bias_E = layers[0].router, layers[0].expert_bias
    x_TD = torch.randn(num_tokens, router.gate.in_features, device="cuda", dtype=torch.bfloat16)
    for name, spread in (("spread", 1.0), ("collapsed", 0.01)):
        logits_TE = spread * torch.randn(num_tokens, router.num_experts, device="cuda")
        logits_TE += torch.randn(router.num_experts, device="cuda")
        route = logits_TE, bias_E, router.top_k, router.score_func, True, 1.0
        _, ids_TK = route_tokens(*route)
        of_token = x_TD, logits_TE, bias_E, ids_TK, router.score_func
        counting = milliseconds(accumulate_margins, router.margins_EB, router.input_sum_C, *of_token)
        margins = milliseconds(count_margins, logits_TE, bias_E, ids_TK, router.margins_EB, router.score_func)
        routing = milliseconds(route_tokens, *route)
        print(
            f"{flavor} {name}: counting {1e3 * counting:.0f} us a layer, of which margins {1e3 * margins:.0f}; "
            f"routing {1e3 * routing:.0f}; {len(layers)} layers {len(layers) * counting:.2f} ms a step"
        )
    balancer = build_optimizers(model, arm, 1e-4).load_balancer
    hooks = milliseconds(lambda: (balancer(), balancer.follow_gates()))
    print(f"{flavor}: hooks {hooks:.2f} ms a step", flush=True)


def time_steps(flavor: str, turns: int = 8, steps: int = 10) -> None:
    """Print what a step takes with the rule and without balancing, in turns, as a job trains (see `Step`).

    The learning rate is 0, and both models route alike: the rule's own work is all they differ in.
    """
    job, device = JOBS[flavor], torch.device("cuda")
    arms = {"none": DEFAULTS | {"rate": 0.0}, "quantile": DEFAULTS | {"rule": "quantile"}}
    shape = job["batch"], job["seq_len"] + 1
    text = torch.randint(0, flavors[flavor].vocab_size, shape, device=device)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    models = {name: build_model(flavor, arm, job, 0, device, compiled=True) for name, arm in arms.items()}
    take = {
        name: Step(models[name], build_optimizers(models[name], arm, 0.0), arm, device, compiled=True)
        for name, arm in arms.items()
    }
    for _ in range(6):
        take["quantile"](*batch)
    for balanced, other in zip(moe_layers(models["quantile"]), moe_layers(models["none"]), strict=True):
        other.expert_bias.copy_(balanced.expert_bias)
    for _ in range(6):
        take["none"](*batch)
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            host = time.perf_counter()
            start.record()
            for _ in range(steps):
                take[name](*batch)
            end.record()
            host = time.perf_counter() - host
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / steps)
    differences = [b - a for a, b in zip(found["none"], found["quantile"], strict=True)]
    medians = {name: round(statistics.median(times), 3) for name, times in found.items()}
    from_graph = {name: bool(step.captured and step.captured._graphs) for name, step in take.items()}
    added = statistics.median(differences)
    print(
        f"{flavor}: ms a step {medians}, quantile - none: median {added:.3f} ({100 * added / medians['none']:.2f}%), "
        f"from {min(differences):.3f} to {max(differences):.3f}; "
        f"host {1e3 * host / steps:.1f} ms a step; from a graph: {from_graph}; all {found}",
        flush=True,
    )


# ---- all runs ------------------------------------------------------------------------------------


def parse_arm(spec: str) -> tuple[str, dict]:
    """(name, settings) of a name in ARMS or of "NAME:key=value,...".

    Raises:
        ValueError: an unknown name or key.
    """
    name, colon, settings = spec.partition(":")
    known = ARMS | OTHER_ARMS
    if not colon:
        if name not in known:
            raise ValueError(f"arm {name!r} is none of {sorted(known)}")
        return name, known[name]
    arm = {}
    for item in settings.split(","):
        key, _, value = item.partition("=")
        if key not in DEFAULTS:
            raise ValueError(f"arm {spec!r}: {key!r} is none of {sorted(DEFAULTS)}")
        arm[key] = type(DEFAULTS[key])(value)
    return name, arm


def jobs_of(options: argparse.Namespace) -> list[tuple[str, dict, int]]:
    arms = [parse_arm(name) for spec in options.arms for name in (ARMS if spec == "all" else [spec])]
    jobs = [(name, arm, arm.get("seed", seed)) for seed in options.seeds for name, arm in arms]
    return [job for i, job in enumerate(jobs) if job not in jobs[:i]]


def run_jobs(options: argparse.Namespace, jobs: list, out: Path, device: torch.device, deadline: float) -> None:
    """Train these one after another; a line of JSON each."""
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.specialize_float = True
    seconds_a_step, failed = 0.0, []
    for name, arm, seed in jobs:
        start, steps = time.time(), arm.get("steps") or options.steps
        if start + seconds_a_step * steps > deadline:
            print(f"NOT STARTED for want of time: {name} seed {seed}", flush=True)
            continue
        try:
            result = one_result(options, name, arm, seed, device)
        except Exception:  # the other arms go on
            traceback.print_exc()
            failed.append(f"{name} seed {seed}")
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        with open(out, "a") as file:
            file.write(json.dumps(result) + "\n")
        seconds_a_step = (time.time() - start) / steps
        print(summary(result), flush=True)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


def one_result(options: argparse.Namespace, name: str, arm: dict, seed: int, device: torch.device) -> dict:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(options, name, arm, seed, device)
    result = {"arm": name, "seed": seed, "settings": run.arm, "lr": run.lr, "warmup": run.warmup}
    result |= run.train() | run.validate()
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def summary(result: dict) -> str:
    steps = len(result["maxvio"])
    at = {s: result["maxvio"][s - 1] for s in (10, 40, 60, 100, 200, 400, 600, 900, 1200) if s <= steps}
    late = result["maxvio"][min(99, steps // 2) :]
    return (
        f"RESULT {result['arm']} seed {result['seed']} lr {result['lr']:g}: val_loss {result['val_loss']:.4f} "
        f"global {result['maxvio_global']:.3f} worst layer {result['maxvio_global_worst_layer']:.3f} "
        f"dead {result['dead_experts']} MaxVio {at} from step 100 mean {statistics.fmean(late):.3f} "
        f"max {max(late):.3f} {result['tokens_per_s']:,} tokens/s {result.get('floor', '')}"
    )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="500M", choices=sorted(JOBS))
    parser.add_argument("--arms", nargs="+", default=["all"], help='names, "all", or "NAME:key=value,..."')
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=0.0, help="0: the flavor's own")
    parser.add_argument("--warmup", type=int, default=-1, help="-1: the flavor's own")
    parser.add_argument("--score", default="", choices=["", "sigmoid", "softmax"], help="in place of the flavor's own")
    parser.add_argument("--batch", type=int, default=0, help="sequences a step; 0: the flavor's own")
    parser.add_argument("--seq_len", type=int, default=0, help="0: the flavor's own")
    parser.add_argument("--val_tokens", type=float, default=1_050_000)
    parser.add_argument("--val_every", type=int, default=0, help="steps between values of the curve; 0 leaves it out")
    parser.add_argument("--floor", action="store_true", help="measure what sampling alone leaves of MaxVio")
    parser.add_argument("--floor_rounds", type=int, default=8)
    parser.add_argument("--no_compile", dest="compile", action="store_false")
    parser.add_argument("--time_rule", action="store_true", help="time the rule quantile alone, and train nothing")
    parser.add_argument("--out", type=Path, default=Path("balance.json"), help="JSON file")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "momoe_titan_balance_text")
    parser.add_argument("--text_mb", type=float, default=400, help="text to read at most")
    parser.add_argument(
        "--time_limit", type=float, default=1e9, help="seconds; a run that would not fit is not started"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.compile = options.compile and torch.cuda.is_available()
    return options


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, start = parse_options(arguments), time.time()
    if options.time_rule:
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.specialize_float = True
        for flavor in ("500M", "1.4B"):
            time_rule(flavor)
            gc.collect()
            torch.cuda.empty_cache()
            time_steps(flavor)
        return
    jobs = jobs_of(options)
    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    if options.worker:
        index, count, deadline = options.worker.split("/")
        lines = options.out.with_suffix(f".{index}.jsonl")
        run_jobs(options, jobs[int(index) :: int(count)], lines, device, float(deadline))
        return
    prepare_text(options.data, flavors[options.flavor].vocab_size, options.text_mb, os.cpu_count() or 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    deadline, workers = start + options.time_limit, max(1, min(gpus, len(jobs)))
    parts = [options.out.with_suffix(f".{i}.jsonl") for i in range(workers)]
    for part in parts:
        part.unlink(missing_ok=True)
    codes: list[str | int | None] = [0]
    if workers == 1:
        try:
            run_jobs(options, jobs, parts[0], device, deadline)
        except SystemExit as failed:
            codes = [failed.code]
    else:
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *arguments, "--worker", f"{i}/{workers}/{deadline}"],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": visible[i]},
            )
            for i in range(workers)
        ]
        codes = [process.wait() for process in processes]
    runs = [json.loads(line) for part in parts if part.exists() for line in part.read_text().splitlines()]
    meta = {
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["benchmarks/balance.py", *arguments]),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "job": JOBS[options.flavor],
        "seconds": round(time.time() - start),
    }
    options.out.write_text(json.dumps({"meta": meta, "runs": runs}))
    for run in sorted(runs, key=lambda r: r["val_loss"]):
        print(summary(run))
    if any(codes):
        sys.exit(f"workers ended with {codes}; what they finished is in {options.out}")


if __name__ == "__main__":
    main()
