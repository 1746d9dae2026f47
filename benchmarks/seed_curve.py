"""Train one MoE layer to reproduce its input, and write the loss of every step as JSON.

    python benchmarks/seed_curve.py --out seed_curve.json                 # on a GPU
    python benchmarks/seed_curve.py --device cpu --batch 1 --seq_len 256 --dim 64 --hidden 64

The defaults are those of the test in the first MoMoE release: 4 x 8192 normal tokens of width 1024; 32 experts of
hidden width 512, of which 6 are chosen, 1 of them shared; 200 steps of AdamW at 1e-3. The loss starts near 1 and falls
toward 0.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from momoe_titan.moe.layers import MoE


def train(
    *,
    batch: int = 4,
    seq_len: int = 8192,
    dim: int = 1024,
    hidden: int = 512,
    experts: int = 32,
    chosen: int = 6,
    shared: int = 1,
    steps: int = 200,
    lr: float = 1e-3,
    save_percent: float = 0,
    seed: int = 0,
    backend: str = "auto",
    device: str | None = None,
) -> list[float]:
    """The losses of all steps, each before the step's update."""
    torch.manual_seed(seed)
    moe = MoE(dim, hidden, experts, chosen, shared, save_percent=save_percent, backend=backend, device=device)
    x_BSD = torch.randn(batch, seq_len, dim, device=moe.biases_N.device, dtype=moe.momoe.Wl1_ND2H.dtype)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=lr)
    moe.register_bias_update(optimizer)
    losses = []
    for _ in range(steps):
        loss = (moe(x_BSD).float() - x_BSD.float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in train.__kwdefaults__.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=float if name == "save_percent" else kind, default=default)
    parser.add_argument("--out", default=None, help="JSON file to write")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    on_gpu = torch.cuda.is_available() and arguments["device"] != "cpu"
    start = time.perf_counter()
    losses = train(**arguments)
    result = {
        "settings": arguments,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start, 2),
        "losses": losses,
    }
    for step in sorted({*range(0, len(losses), max(1, len(losses) // 20)), len(losses) - 1}):
        print(f"step {step + 1:4d}  loss {losses[step]:.5f}")
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
