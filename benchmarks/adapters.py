"""A training step of another package's model, with its own experts and with ours.

    python benchmarks/adapters.py transformers qwen3-30b-a3b olmoe-1b-7b --batch 1 4 --out adapters.jsonl
    python benchmarks/adapters.py torchtitan qwen3-30b-a3b deepseek-v2-lite --out adapters.jsonl
    python benchmarks/adapters.py transformers tiny --device cpu      # checks the script, not the speed

Models have the layers of the published ones, but few of them, a small vocabulary and random weights in bfloat16. All
variants of a model share its weights and take turns, in a new order each time. The columns:
    step ms    forward, backward and a step of AdamW, by the host's clock; medians.
    moe ms     forward and backward of one MoE layer alone, by the device's clock; medians. transformers: of the
               experts, with the routing given.
    saved GiB  of PyTorch's allocator, by the end of the forward: what the backward reads.
    peak GiB   of PyTorch's allocator, over a step, weights and optimizer included.
    bound      how much faster than the model's own variant the step would be if all of its MoE layers took no time.
transformers' models run eagerly, its default; TorchTitan's are compiled as its trainer compiles them. `--sonicmoe`
registers SonicMoE's layer with transformers, where its package is installed; it compiles for minutes first.
"""

import argparse
import contextlib
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PERCENTS = (0, 50, 100)
# width, hidden width of an expert, experts, chosen, heads, key-value heads, shared experts
SHAPES = {
    "qwen3-30b-a3b": (2048, 768, 128, 8, 32, 4, 0),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 16, 16, 0),
    "deepseek-v2-lite": (2048, 1408, 64, 6, 16, 16, 2),
    "tiny": (64, 32, 8, 2, 4, 2, 0),
}
VOCAB = 8192


class Variant:
    """One way to run the experts of a model.

    Args:
        name: of the row.
        use: gives the model these experts.
        around: entered around every forward.
    """

    def __init__(self, name: str, use: Callable[[], None], around: Callable[[], Any] = contextlib.nullcontext):
        self.name, self.use, self.around = name, use, around


class Case:
    """A model, its variants, one MoE layer of it, and what a forward of each is."""

    model: nn.Module
    variants: list[Variant]
    num_moe_layers: int

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def moe(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The output of one layer, and what has a gradient there."""
        raise NotImplementedError


def sonicmoe_experts(self, hidden_states, top_k_index, top_k_weights):
    """SonicMoE as transformers calls an experts module, for SwiGLU in transformers' own layout."""
    functional = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    num_tokens, num_chosen = top_k_index.shape
    tokens = torch.arange(num_tokens, device=hidden_states.device, dtype=torch.int32).repeat_interleave(num_chosen)
    stream = torch.cuda.current_stream().cuda_stream if hidden_states.is_cuda else 0
    return functional.moe_general_routing_inputs(
        hidden_states, top_k_weights.flatten(), tokens, top_k_index.flatten().int(),
        self.gate_up_proj.permute(1, 2, 0), None, self.down_proj.permute(1, 2, 0), None,
        self.down_proj.shape[0], stream, swiglu, not torch.is_grad_enabled(), concat_layout=True,
    )[0]  # fmt: skip


class OfTransformers(Case):
    def __init__(self, shape: str, layers: int, device: str, dtype: torch.dtype, sonicmoe: bool = False):
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        from momoe_titan.adapters.transformers import save_percent

        dim, hidden, experts, chosen, heads, kv_heads, _ = SHAPES[shape]
        sizes = {
            "vocab_size": VOCAB, "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "num_experts": experts, "num_experts_per_tok": chosen,
        }  # fmt: skip
        if shape.startswith("olmoe"):
            config = AutoConfig.for_model("olmoe", **sizes, intermediate_size=hidden)
        else:
            config = AutoConfig.for_model(
                "qwen3_moe", **sizes, moe_intermediate_size=hidden, head_dim=128, norm_topk_prob=True
            )
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model = model.train()
        self.experts = [module for module in model.modules() if hasattr(module, "_apply_gate")]
        self.num_moe_layers, self.chosen, self.num_experts = len(self.experts), chosen, experts
        self.routing: tuple[torch.Tensor, torch.Tensor] | None = None

        def use(name: str) -> Callable[[], None]:
            return lambda: model.set_experts_implementation(name)

        self.variants = [Variant("grouped_mm", use("grouped_mm"))]
        for percent in PERCENTS:
            around = (lambda p: lambda: save_percent(p))(percent)
            self.variants.append(Variant(f"momoe {percent}", use("momoe"), around))
        if sonicmoe:
            ALL_EXPERTS_FUNCTIONS.register("sonicmoe", sonicmoe_experts)
            self.variants.append(Variant("sonicmoe", use("sonicmoe")))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=rows, labels=rows, use_cache=False).loss

    def moe(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x_TD = x_BLD.flatten(0, 1)
        if self.routing is None or self.routing[0].shape[0] != x_TD.shape[0]:
            logits_TE = torch.randn(x_TD.shape[0], self.num_experts, device=x_TD.device)
            scores_TK, ids_TK = logits_TE.softmax(-1).topk(self.chosen)
            self.routing = ids_TK, scores_TK.to(x_TD.dtype).requires_grad_()
        experts, (ids_TK, scores_TK) = self.experts[0], self.routing
        return experts(x_TD, ids_TK, scores_TK), [x_BLD, scores_TK, *experts.parameters()]


class OfTorchTitan(Case):
    def __init__(self, shape: str, layers: int, device: str, dtype: torch.dtype):
        import copy
        import dataclasses

        from torchtitan.config import ConfigManager
        from torchtitan.config.job_config import Compile
        from torchtitan.models.llama4.infra.parallelize import apply_compile
        from torchtitan.protocols.train_spec import get_train_spec
        from torchtitan.tools.utils import set_default_dtype

        import momoe_titan.register  # noqa: F401 - with its converter
        from momoe_titan.adapters.torchtitan import ConvertedMoE, model_settings, moe_layers

        dim, hidden, experts, chosen, *_ = SHAPES[shape]
        name, flavor = ("deepseek_v3", "16B") if shape.startswith("deepseek") else ("qwen3", "30B-A3B")
        spec = get_train_spec(name)
        args = copy.deepcopy(spec.model_args[flavor])
        dense = getattr(args, "n_dense_layers", 0)
        fields = {"n_layers": layers + dense, "vocab_size": VOCAB, "max_seq_len": 4096}
        if name == "deepseek_v3":
            fields |= {"attn_type": "sdpa", "attn_mask_type": "causal"}
        if shape == "tiny":
            fields |= {"dim": dim, "moe_inter_dim": hidden, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
        args = dataclasses.replace(args, **fields)
        args.moe_impl = "standard"
        grouped_mm = device == "cuda"
        args.moe_args = dataclasses.replace(
            args.moe_args, num_experts=experts, top_k=chosen, use_grouped_mm=grouped_mm, load_balance_coeff=None
        )
        with torch.device(device), set_default_dtype(dtype):
            model = spec.model_cls(args)
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device(device))
        self.model = model.train()
        blocks = moe_layers(model)
        settings = model_settings(ConfigManager().parse_args([f"--model.name={name}"]), blocks)
        stock = {i: block.moe for i, block in blocks.items()}
        ours = {i: ConvertedMoE(moe, settings, 0.0, 0.0) for i, moe in stock.items()}
        if device == "cuda":
            apply_compile(model, Compile(enable=True), False)
            for i, moe in ours.items():
                moe.router = torch.compile(moe.router, fullgraph=True)
                moe.shared_experts = stock[i].shared_experts  # compiled with the stock layer
        self.blocks, self.num_moe_layers = blocks, len(blocks)

        def use(layers_of: dict[int, nn.Module], percent: float = 0.0) -> Callable[[], None]:
            def put() -> None:
                for i, moe in layers_of.items():
                    moe.experts.save_percent = float(percent)  # without effect on stock layers
                    blocks[i].moe = moe

            return put

        # TorchTitan counts tokens by an operation that the CPU has for no integers.
        self.variants = [Variant("torchtitan", use(stock))] if device == "cuda" else []
        self.variants += [Variant(f"momoe {percent}", use(ours, percent)) for percent in PERCENTS]

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(rows)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows.flatten())

    def moe(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        layer = next(iter(self.blocks.values())).moe
        return layer(x_BLD), [x_BLD, *layer.parameters()]


def timed(run: Callable[[], Any], device: str) -> float:
    """Milliseconds until the device has ended what `run` starts."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


def timed_on_device(run: Callable[[], Any], device: str, calls: int = 3) -> float:
    """Milliseconds of the device for one call, after a first one in which the host gets ahead of it."""
    if device != "cuda":
        return timed(run, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(case: Case, rows: torch.Tensor, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant; each is run `rounds` times, in turns with the others, after two runs that warm it up.

    The order of a turn is a new one each time.
    """
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-5, fused=device == "cuda")
    dim = next(p for p in case.model.parameters() if p.dim() == 2).shape[1]
    dtype = next(case.model.parameters()).dtype
    x_BLD, dout = (torch.randn(*rows.shape, dim, device=device, dtype=dtype) for _ in range(2))
    x_BLD.requires_grad_()

    def step(variant: Variant) -> None:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        with variant.around():
            loss = case.loss(rows)
        saved[variant.name] = (torch.cuda.memory_allocated() - before) / 2**30 if device == "cuda" else 0.0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def moe(variant: Variant) -> None:
        with variant.around():
            out, leaves = case.moe(x_BLD)
        torch.autograd.grad(out, leaves, dout.view_as(out), allow_unused=True)

    times: dict[str, tuple[list[float], list[float]]] = {v.name: ([], []) for v in case.variants}
    saved: dict[str, float] = {}
    peaks: dict[str, float] = {}
    shuffled = random.Random(0)  # a GPU at its limit of power is slower after the variant that draws most
    for turn in range(rounds + 2):
        for variant in shuffled.sample(case.variants, len(case.variants)):
            variant.use()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps, moes = times[variant.name]
            in_step = timed(lambda v=variant: step(v), device)
            peaks[variant.name] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            in_moe = timed_on_device(lambda v=variant: moe(v), device)
            if turn > 1:
                steps.append(in_step)
                moes.append(in_moe)
    base_step, base_moe = (statistics.median(times[case.variants[0].name][i]) for i in (0, 1))
    for variant in case.variants:
        in_step, in_moe = map(statistics.median, times[variant.name])
        yield {
            "variant": variant.name,
            "step ms": round(in_step, 2),
            "moe ms": round(in_moe, 3),
            "saved GiB": round(saved[variant.name], 2),
            "peak GiB": round(peaks[variant.name], 2),
            "step speed-up": round(base_step / in_step, 3),
            "moe speed-up": round(base_moe / in_moe, 3),
            "bound": round(base_step / max(base_step - case.num_moe_layers * base_moe, 1e-3), 3),
            "tokens/s": round(1e3 * rows.numel() / in_step),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=("transformers", "torchtitan"))
    parser.add_argument("shapes", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="sequences of a step; one run for each")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each variant")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sonicmoe", action="store_true", help="transformers: measure SonicMoE's layer too")
    parser.add_argument("--out", type=Path, help="file for one JSON line per variant")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.sonicmoe and options.package != "transformers":
        parser.error("--sonicmoe: SonicMoE is registered with transformers only")
    for shape in options.shapes:
        torch.manual_seed(0)
        if options.package == "transformers":
            case = OfTransformers(shape, options.layers, options.device, dtype, options.sonicmoe)
        else:
            case = OfTorchTitan(shape, options.layers, options.device, dtype)
        for batch in options.batch:
            rows = torch.randint(0, VOCAB, (batch, options.length), device=options.device)
            sizes = {"package": options.package, "shape": shape, "layers": options.layers, "tokens": rows.numel()}
            for row in measure(case, rows, options.device, options.rounds):
                print(json.dumps(sizes | row), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(sizes | row) + "\n")
        del case
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
