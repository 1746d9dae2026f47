"""Mutation testing of a seeded sample: small faults are put into the package, and the fast tests have to see them.

    python -m tests.trust.mutate sample --rooms moe data --count 50 --out mutants.json
    python -m tests.trust.mutate run mutants.json --processes 2 --seconds 3600

scripts/mutation.sh does both. cosmic-ray makes the faults (other operators, comparisons, numbers, constants; loops that
do not run); to these come statements that are left out and names that are swapped (max for min, int32 for int64). Half
of a sample is of the lines that were changed last, the rest of any line, one fault a line. Each process works in a copy
of the repository and forks once it has imported torch and TorchTitan, so that a fault costs no more than its tests.

Neither of the two well-kept tools runs this package by itself. mutmut 3 leaves out every decorated function and puts
all faults of a function beside it, where Triton's and torch's compilers, which read a function's source, do not find
it. cosmic-ray starts a new process for each fault (20 s to import torch and TorchTitan) and does not sample.
"""

import argparse
import ast
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "momoe_titan"
# room: (folders or files, tests behind the one that is named as the file is)
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "moe": (["moe"], ["tests/moe", "tests/model/test_moe.py"]),
    "components": (["components"], ["tests/components", "tests/model/test_fsdp.py"]),
    "data": (["data"], ["tests/data"]),
    "config": (["config", "save_percent.py"], ["tests/config", "tests/test_cli.py", "tests/model/test_model.py"]),
    "memory": (["memory"], ["tests/memory", "tests/plan/test_plan.py"]),
    "model/parallel": (
        ["model/parallel"],
        [
            "tests/model/test_activation_checkpoint.py",
            "tests/model/test_fsdp.py",
            "tests/model/test_expert_parallel.py",
        ],
    ),
    "kernels": (
        [f"kernels/{name}.py" for name in ("op", "gemms", "experts", "grouped", "launch", "grouping", "reference")]
        + [
            f"kernels/{name}.py"
            for name in ("memory_schedule", "routing", "router", "quantile", "combine", "multi_tensor")
        ],
        [f"tests/kernels/test_{name}.py" for name in ("fuzz", "experts", "op", "memory_schedule", "routing", "router")],
    ),
}
SWAPS = {  # in the source, with what stands around a name
    **{"max(": "min(", "min(": "max(", ".amax(": ".amin(", "any(": "all(", "all(": "any(", "sorted(": "list("},
    **{"ReduceOp.SUM": "ReduceOp.MAX", "ReduceOp.MAX": "ReduceOp.SUM", "ReduceOp.AVG": "ReduceOp.SUM"},
    **{".sum(": ".mean(", ".mean(": ".sum(", "int64": "int32", "float32": "bfloat16", "reverse=True": "reverse=False"},
}
BROKEN = "tests fail without a fault"
QUIET = ("logger", "warnings", "print", "log", "_log", "say", "parser")  # what they say is not tested word by word


def _quiet(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    if isinstance(call, ast.Constant):
        return True  # a docstring
    name = call.func if isinstance(call, ast.Call) else None
    while isinstance(name, (ast.Attribute, ast.Call)):
        name = name.value if isinstance(name, ast.Attribute) else name.func
    return isinstance(name, ast.Name) and (name.id in QUIET or name.id.startswith(("_say", "_warn", "log")))


def _hints(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from node.decorator_list
        if node.returns:
            yield node.returns
    elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
        yield node.annotation


def left_alone(tree: ast.AST) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of hints, messages, imports and docstrings."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _quiet(node)]
    nodes += [hint for node in ast.walk(tree) for hint in _hints(node)]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def by_cosmic_ray(path: Path) -> Iterator[tuple[int, int, str, str]]:
    """(line, column, name, source with the fault) for each fault that cosmic-ray knows."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text()
    nodes = list(ast_nodes(get_ast_from_path(path)))
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith(("NoOp", "RemoveDecorator", "ExceptionReplacer", "_Is", "_IsNot")):
            continue
        positions = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        for occurrence, (line, column) in enumerate(positions):
            yield line, column, name.removeprefix("core/"), (path, name, occurrence, source, mutate_code)


def by_hand(source: str, tree: ast.AST) -> Iterator[tuple[int, int, str, str]]:
    """The same for statements left out and swapped names."""
    lines = source.splitlines(keepends=True)

    def replaced(line, column, end_line, end_column, text):
        start = sum(map(len, lines[: line - 1])) + column
        end = sum(map(len, lines[: end_line - 1])) + end_column
        return source[:start] + text + source[end:]

    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if (is_call or isinstance(node, ast.AugAssign)) and not _quiet(node) and lines[node.lineno - 1].isascii():
            span = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
            yield node.lineno, node.col_offset, "statement left out", replaced(*span, "pass")
    for old, new in SWAPS.items():
        for found in re.finditer(rf"(?<![\w.]){re.escape(old)}" if old[0].isalpha() else re.escape(old), source):
            line = source.count("\n", 0, found.start()) + 1
            column = found.start() - (source.rfind("\n", 0, found.start()) + 1)
            yield line, column, f"{old} -> {new}", source[: found.start()] + new + source[found.end() :]


def changed_at(path: Path) -> list[int]:
    """When each line was committed last."""
    blame = subprocess.run(
        ["git", "blame", "--line-porcelain", path], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [int(time) for time in re.findall(r"^committer-time (\d+)$", blame, re.M)]


def candidates(path: Path) -> list[tuple[int, int, str, object]]:
    """(when the line was changed, line, name of the fault, its source or how to make it)."""
    source = path.read_text()
    tree = ast.parse(source)
    spans, times = left_alone(tree), changed_at(path)
    found = []
    for line, column, name, made in [*by_cosmic_ray(path), *by_hand(source, tree)]:
        if not any(start <= (line, column) < end for start, end in spans) and line <= len(times):
            found.append((times[line - 1], line, name, made))
    return found


def sample(rooms: list[str], count: int, seed: int) -> list[dict]:
    """`count` faults of each room."""
    of_rooms = []
    for room in rooms:
        chosen: list[dict] = []
        of_rooms.append(chosen)
        draw = random.Random(f"{seed} {room}")
        wanted = [str(PACKAGE / name) for name in ROOMS[room][0]]
        listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [p for name in listed.stdout.split() if (p := str(ROOT / name)).startswith(tuple(wanted))]
        every = [(when, path, line, name, made) for path in paths for when, line, name, made in candidates(Path(path))]
        draw.shuffle(every)
        of_line = {(path, line): (when, path, line, name, made) for when, path, line, name, made in every}
        every = list(of_line.values())
        every.sort(key=lambda fault: -fault[0])  # stable: in a commit they stay shuffled
        last, rest = every[: count // 2], every[count // 2 :]
        for _, path, line, name, made in last + draw.sample(rest, min(len(rest), count - len(last))):
            if isinstance(made, tuple):
                from cosmic_ray.plugins import get_operator

                file, operator, occurrence, source, mutate_code = made
                made = mutate_code(source, get_operator(operator)(), occurrence)
            if made is None or made == Path(path).read_text():
                continue
            with contextlib.suppress(SyntaxError):
                compile(made, path, "exec")
                file = Path(path).relative_to(ROOT).as_posix()
                chosen.append({"room": room, "file": file, "line": line, "fault": name, "source": made})
    # in turn, so that a run that ends early has some of each room
    return [mutant for mutants in itertools.zip_longest(*of_rooms) for mutant in mutants if mutant]


def tests_of(mutant: dict, quick: bool) -> list[str]:
    """The test files to run, the one of the same name first, and alone if quick."""
    stem = Path(mutant["file"]).stem
    everything = []
    for name in ROOMS[mutant["room"]][1]:
        path = Path(name)
        everything += sorted(path.rglob("test_*.py")) if path.is_dir() else [path] if path.exists() else []
    named = sorted(Path("tests").rglob(f"test_{stem}.py"))
    return [str(path) for path in dict.fromkeys(named if quick else [*named, *everything])]


def run_tests(files: list[str], limit: float) -> str:
    """ "killed", "survived" or "late": what the tests of a forked process say."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        quiet = [
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--basetemp",
            tempfile.mkdtemp(dir="."),
            "-m",
            "not slow",
        ]
        status = 1
        with contextlib.suppress(BaseException):
            status = pytest.main([*quiet, *files])
        os._exit(int(status))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the tests have left behind
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def work(mutants: list[dict], results: Path, deadline: float, limit: float, quick: bool) -> None:
    """Run these faults in the copy of the repository that this process is in."""
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    import torch.distributed.checkpoint
    import torchtitan.train  # noqa: F401  - the forks find it imported

    torch.set_num_threads(1)
    passes: dict[tuple[str, ...], bool] = {}  # test files: whether they pass without a fault
    for mutant in mutants:
        if time.monotonic() > deadline:
            break
        files = tests_of(mutant, quick)
        if not files:
            continue
        if tuple(files) not in passes:
            passes[tuple(files)] = run_tests(files, limit) == "survived"
        if not passes[tuple(files)]:
            with open(results, "a") as file:
                row = {key: mutant[key] for key in ("room", "file", "line", "fault", "id")}
                file.write(json.dumps({**row, "verdict": BROKEN, "seconds": 0}) + "\n")
            continue
        path = Path(mutant["file"])
        whole = path.read_text()
        begin = time.monotonic()
        path.write_text(mutant["source"])
        verdict = run_tests(files, min(limit, max(20.0, deadline - begin + 20)))
        path.write_text(whole)
        if verdict == "late" and time.monotonic() - begin < limit:
            break  # no time left: says nothing about this one
        row = {key: mutant[key] for key in ("room", "file", "line", "fault", "id")}
        with open(results, "a") as file:
            file.write(json.dumps({**row, "verdict": verdict, "seconds": round(time.monotonic() - begin, 1)}) + "\n")


def run(mutants: list[dict], processes: int, seconds: float, limit: float, quick: bool, out: Path) -> list[dict]:
    """What came of each fault whose turn came, in `seconds`. The results stand in `out` as they come."""
    deadline = time.monotonic() + seconds
    for number, mutant in enumerate(mutants):
        mutant["id"] = number
    scratch = Path(tempfile.mkdtemp())
    children = []
    for i in range(processes):
        copy = scratch / str(i)
        copy.mkdir()
        for name in (
            "momoe_titan",
            "tests",
            "benchmarks",
            "docs",
            "train_configs",
            "scripts",
            "pyproject.toml",
            "README.md",
        ):
            of, to = ROOT / name, copy / name
            shutil.copytree(of, to, ignore=shutil.ignore_patterns("__pycache__")) if of.is_dir() else shutil.copy(
                of, to
            )
        child = os.fork()
        if child == 0:
            os.chdir(copy)
            work(mutants[i::processes], out / f"results-{i}.jsonl", deadline, limit, quick)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    return [json.loads(line) for file in sorted(out.glob("results-*.jsonl")) for line in file.read_text().splitlines()]


def told(rows: list[dict], mutants: list[dict]) -> str:
    """A table of all rooms, and the diff of each fault that survived."""
    lines = ["| room | faults | seen | score |", "| --- | ---: | ---: | ---: |"]
    for room in ROOMS:
        some = [row for row in rows if row["room"] == room and row["verdict"] != BROKEN]
        if some:
            seen = sum(row["verdict"] != "survived" for row in some)  # an endless loop is seen too
            lines.append(f"| {room} | {len(some)} | {seen} | {100 * seen / len(some):.0f}% |")
    for row in rows:
        if row["verdict"] == "survived":
            lines.append(f"\n{row['file']}:{row['line']} {row['fault']}")
            old = (ROOT / row["file"]).read_text().splitlines()
            new = mutants[row["id"]]["source"].splitlines()
            at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
            lines += [f"  - {old[at].strip()}", f"  + {new[at].strip()}"]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("sample", help="draw faults")
    drawing.add_argument("--rooms", nargs="+", default=list(ROOMS), choices=ROOMS)
    drawing.add_argument("--count", type=int, default=50, help="of each room")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run", help="run the tests on each")
    running.add_argument("mutants", type=Path)
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--seconds", type=float, default=7200, help="no fault begins later than that")
    running.add_argument("--limit", type=float, default=600, help="seconds for the tests of one fault")
    running.add_argument("--quick", action="store_true", help="run only the test file of the same name")
    running.add_argument("--out", type=Path, default=Path("mutation"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.command == "sample":
        faults = sample(args.rooms, args.count, args.seed)
        args.out.write_text(json.dumps(faults))
        print(f"{len(faults)} faults of {len(args.rooms)} rooms: {args.out}")
        return 0
    faults = json.loads(args.mutants.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    rows = run(faults, args.processes, args.seconds, args.limit, args.quick, args.out.absolute())
    print(told(rows, faults))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
