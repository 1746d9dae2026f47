"""Two agents of torchrun on one machine, as two machines would have them: the same losses as one agent gives.

    python -m tests.trust.agents --steps 20            # two GPUs, one for each agent
    python -m tests.trust.agents --steps 20 --tiny --processes 2   # CPUs, a small model

Parameters divided over all ranks (FSDP), over those of a machine and copied to the other (HSDP), and experts divided
(EP). Then one agent is killed with its job and started again: torchrun begins again at the last checkpoint, and the
losses stay those of the job that nothing has happened to. Exit status 1 where anything differs.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.commands import free_port
from tests.trust import jobs

SAME = "--debug.deterministic", "--debug.seed=7", "--metrics.log_freq=1", "--compile.no-enable"
CHECKPOINTS = "--checkpoint.enable", "--checkpoint.interval=5", "--checkpoint.no-last_save_model_only"
(VARIABLE,) = re.findall(r"^export (\w+)=(\d)$", (jobs.ROOT / "docs/parallelism.md").read_text(), re.M)


def layouts(ranks: int) -> dict[str, tuple[str, ...]]:
    shard = "--parallelism.data_parallel_shard_degree"
    return {
        "FSDP": (f"{shard}={ranks}",),
        "HSDP": ("--parallelism.data_parallel_replicate_degree=2", f"{shard}={ranks // 2}"),
        "EP": (f"{shard}={ranks}", f"--parallelism.expert_parallel_degree={ranks}"),
    }


def descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


class Agent:
    """One of two that meet at a port, or of one; with a GPU of its own for each process, if there are any."""

    def __init__(self, out: Path, number: int, agents: int, processes: int, port: int, options: list[str]):
        out.mkdir(parents=True, exist_ok=True)
        meeting = "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--max_restarts", "3"
        nodes = "--nnodes", str(agents), "--nproc_per_node", str(processes)
        job = jobs.command(out / "job", *SAME, *options)[1:]
        env = os.environ | dict([VARIABLE])
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(number * processes + i) for i in range(processes))
        self.log = out / f"agent-{number}.txt"
        with open(self.log, "a") as log:
            line = [sys.executable, "-m", "torch.distributed.run", *nodes, *meeting, *job]
            self.process = subprocess.Popen(
                line, cwd=jobs.ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def lose_power(self) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a model small enough for CPUs")
    parser.add_argument("--processes", type=int, default=1, help="of each agent")
    parser.add_argument("--only", nargs="+", default=["FSDP", "HSDP", "EP", "killed"])
    parser.add_argument("--seconds", type=float, default=600, help="what has not ended by then has failed")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    out, begin = args.out or Path(tempfile.mkdtemp()), time.monotonic()
    each = args.processes
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    common = [f"--training.steps={args.steps}", *(jobs.TINY if args.tiny else ()), "--validation.no-enable"]
    running: dict[str, list[Agent]] = {}

    def start(name: str, agents: int, options: list[str]) -> tuple:
        place = out / name.replace(" ", "-"), agents, 2 * each // agents, free_port(), [*common, *options]
        running[name] = [Agent(place[0], 0, *place[1:])]
        while agents > 1 and not listens(place[3]) and running[name][0].process.poll() is None:
            time.sleep(0.1)  # the first has the meeting point, so that the second can be killed
        running[name] += [Agent(place[0], number, *place[1:]) for number in range(1, agents)]
        return place

    if "killed" in args.only:
        place = start("killed", 2, [*layouts(2 * each)["FSDP"], *CHECKPOINTS])
    for name, layout in layouts(2 * each).items():
        if name in args.only or (name == "FSDP" and "killed" in args.only):
            start(f"{name} by one", 1, list(layout))
            start(f"{name} by two", 2, list(layout))
    if "killed" in args.only:
        agents, saved = running["killed"], place[0] / "job/checkpoint/step-5/.metadata"
        while not saved.exists() and time.monotonic() - begin < args.seconds and agents[0].process.poll() is None:
            time.sleep(0.05)
        agents[1].lose_power()
        agents[1] = Agent(place[0], 1, *place[1:])
    failed, losses = 0, {}
    for name, agents in running.items():
        for agent in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.process.wait(max(0.1, args.seconds - (time.monotonic() - begin)))
            status = agent.process.poll()
            agent.lose_power()
            if status != 0:
                failed += 1
                print(f"{name}: {agent.log.name} ended with {status}\n{agent.log.read_text()[-1500:]}")
        losses[name] = jobs.scalars(out / name.replace(" ", "-"))
    for name, of_job in losses.items():
        kind = "FSDP by one" if name == "killed" else name.replace("by two", "by one")
        other = [step for step in range(1, args.steps + 1) if of_job.get(step) != losses[kind].get(step)]
        failed += bool(other) or len(of_job) != args.steps
        starts = sum(agent.log.read_text().count("Training starts at step") for agent in running[name])
        said = f"other at {len(other)} steps, first {other[0]}" if other else f"equal to the bit ({kind})"
        print(f"{name}: {len(of_job)} steps, {starts} starts, last loss {of_job.get(args.steps, 0):.6f}, {said}")
    print(f"{failed} failed, {time.monotonic() - begin:.0f} s; logs in {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
