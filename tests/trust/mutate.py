"""Mutation testing of a seeded sample: small faults, which the tests that concern them have to see.

    python -m tests.trust.mutate sample --rooms moe data --count 50 --out mutants.json
    python -m tests.trust.mutate run mutants.json --processes 2 --seconds 3600 --out results   # goes on where it was
    python -m tests.trust.mutate tell results

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
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONCERNS: dict[str, dict[str, list[str]]] = tomllib.loads(
    (Path(__file__).parent / "concerns.toml").read_text()
)  # room: {start of a module's path: its tests}
SWAPS = {  # in the source, with what stands around a name
    **{"max(": "min(", "min(": "max(", ".amax(": ".amin(", "any(": "all(", "all(": "any(", "sorted(": "list("},
    **{"ReduceOp.SUM": "ReduceOp.MAX", "ReduceOp.MAX": "ReduceOp.SUM", "ReduceOp.AVG": "ReduceOp.SUM"},
    **{".sum(": ".mean(", ".mean(": ".sum(", "int64": "int32", "float32": "bfloat16", "reverse=True": "reverse=False"},
}
COPIED = "momoe_titan", "tests", "benchmarks", "docs", "train_configs", "scripts", "pyproject.toml", "README.md"
FAILING = "failing.jsonl"
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


def edit(path: str, made: str) -> dict:
    """What is written over what, at which character."""
    old = Path(path).read_text()
    start = len(os.path.commonprefix([old, made]))
    end = min(len(os.path.commonprefix([old[start:][::-1], made[start:][::-1]])), min(len(old), len(made)) - start)
    return {"at": start, "old": old[start : len(old) - end], "new": made[start : len(made) - end]}


def sample(rooms: list[str], count: int, seed: int) -> list[dict]:
    """`count` faults of each room."""
    of_rooms = []
    for room in rooms:
        chosen: list[dict] = []
        of_rooms.append(chosen)
        draw = random.Random(f"{seed} {room}")
        wanted = [str(ROOT / name) for name in CONCERNS[room]]
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
                chosen.append({"room": room, "file": file, "line": line, "fault": name, **edit(path, made)})
    # in turn, so that a run that ends early has some of each room
    every = [mutant for mutants in itertools.zip_longest(*of_rooms) for mutant in mutants if mutant]
    return [{"id": number, **mutant} for number, mutant in enumerate(every)]


def tests_of(mutant: dict, most: int) -> list[str]:
    """The test files that concern its module, as concerns.toml says; only the first ones, if there are more."""
    modules = CONCERNS[mutant["room"]]
    longest = max((start for start in modules if mutant["file"].startswith(start)), key=len)
    return modules[longest][:most]


class Failures:
    """A plugin of pytest that writes down which tests failed, and why."""

    def __init__(self, path: str):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(self.path, "a") as file:
                file.write(json.dumps([report.nodeid, report.longreprtext[-300:]]) + "\n")

    pytest_collectreport = pytest_runtest_logreport


def run_tests(tests: list[str], but: list[str], limit: float, every: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """What the tests of a forked process say: "killed", "survived" or "late"; and which have failed, and why.

    The first that fails is the last to run, unless `every`.
    """
    scratch = tempfile.mkdtemp(dir=".")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "--no-header", "--basetemp", f"{scratch}/tests"]
        options += [] if every else ["-x"]
        without = [f"--deselect={test}" for test in but]
        status = 1
        with contextlib.suppress(BaseException):
            plugin = Failures(os.path.abspath(f"{scratch}/failed"))
            status = pytest.main([*options, "-m", "not slow", *without, *tests], plugins=[plugin])
        os._exit(int(status))
    end, verdict = time.monotonic() + limit, "late"
    while verdict == "late" and time.monotonic() < end:
        time.sleep(0.05)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            # 5: no test is left; others than 0 and 1: pytest could not even begin
            verdict = "survived" if os.waitstatus_to_exitcode(status) in (0, 5) else "killed"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests have left behind
    if verdict == "late":
        os.waitpid(child, 0)
    failed = Path(scratch) / "failed"
    by = [tuple(json.loads(line)) for line in failed.read_text().splitlines()] if failed.exists() else []
    shutil.rmtree(scratch, ignore_errors=True)
    return verdict, by


def failing_without(test: str, limit: float) -> list[tuple[str, str]]:
    """(test, why) of this test and others of its file that fail though no fault is put in; empty if it passes."""
    verdict, failed = run_tests([test], [], limit)
    if verdict == "survived":
        return []
    others = run_tests([test.partition("::")[0]], [test], limit, every=True)[1]
    return [*(failed or [(test, "not in time")]), *others]


@contextlib.contextmanager
def put_in(mutant: dict, count: Iterator[int]) -> Iterator[None]:
    """The fault stands in this copy of the repository meanwhile."""
    path = Path(mutant["file"])
    whole = path.read_text()
    at, old = mutant["at"], mutant["old"]

    def write(text: str) -> None:
        path.write_text(text)
        second = 1_000_000_000 + next(count)  # Python takes a compiled file for another by the second and the size
        os.utime(path, (second, second))

    write(whole[:at] + mutant["new"] + whole[at + len(old) :])
    yield
    write(whole)


def work(mutants: list[dict], turn: Synchronized, results: Path, deadline: float, limit: float, most: int) -> None:
    """Run faults, each when its turn comes, in the copy of the repository that this process is in.

    A test that has failed runs again without the fault. One that fails then too says nothing and is left out, as are
    all others of its file that fail. Tests that do not end in time have seen the fault ("late") if they end in a third
    of the time without it; otherwise they say nothing ("no verdict").
    """
    sys.path.insert(0, os.getcwd())
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "momoe_titan")]:
        del sys.modules[name]  # of the repository, not of this copy
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    import torch.distributed.checkpoint
    import torchtitan.train  # noqa: F401  - the forks find it imported

    torch.set_num_threads(1)
    passes: set[str] = set()  # tests that failed with a fault and pass without
    quick: dict[str, bool] = {}  # tests that were late: whether they are quick without the fault
    count, failing = itertools.count(), results.parent / FAILING
    while time.monotonic() < deadline:
        with turn.get_lock():
            number, turn.value = turn.value, turn.value + 1
        if number >= len(mutants):
            break
        mutant, begin = mutants[number], time.monotonic()
        at, old = mutant["at"], mutant["old"]
        if Path(mutant["file"]).read_text()[at : at + len(old)] != old:
            continue  # the file has changed since the sample was drawn
        while True:
            broken = list(failing_in(results.parent))  # with or without a fault
            with put_in(mutant, count):
                verdict, failed = run_tests(tests_of(mutant, most), broken, min(limit, deadline - time.monotonic()))
            by = failed[0][0] if failed and verdict == "killed" else ""
            verdict = "no verdict" if by in broken else verdict  # it could not be left out
            if not by or by in passes or by in broken:
                break
            without = failing_without(by, min(limit, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break  # what was not in time then says nothing
            if not without:
                passes.add(by)
                break
            with open(failing, "ab", buffering=0) as file:  # at once: other processes read it
                file.write("".join(json.dumps(row) + "\n" for row in without).encode())
        if time.monotonic() >= deadline:
            break  # without a verdict
        if verdict == "late":
            tests = tests_of(mutant, most)
            if str(tests) not in quick:
                quick[str(tests)] = run_tests(tests, broken, limit / 3)[0] == "survived"
            verdict = "late" if quick[str(tests)] else "no verdict"
        row = {key: mutant[key] for key in ("room", "file", "line", "fault", "id", "old", "new")}
        row |= {"verdict": verdict, "by": by, "seconds": round(time.monotonic() - begin, 1)}
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")


def failing_in(out: Path) -> dict[str, str]:
    """Tests that have failed without a fault, and why."""
    path = out / FAILING
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}


def results_in(out: Path) -> list[dict]:
    lines = [line for file in sorted(out.glob("results*.jsonl")) for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda row: row["id"])


def run(mutants: list[dict], processes: int, seconds: float, limit: float, most: int, out: Path) -> None:
    """Run faults of which `out` has no result yet, until `seconds` are over. Each result is written as it comes."""
    deadline = time.monotonic() + seconds
    scratch = Path(tempfile.mkdtemp())
    turn = multiprocessing.Value("i", 0)
    children = []
    for i in range(processes):
        copy = scratch / str(i)
        copy.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
        child = os.fork()
        if child == 0:
            os.chdir(copy)
            results = out / f"results-{os.uname().nodename}-{os.getpid()}.jsonl"
            work(mutants, turn, results, deadline, limit, most)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    shutil.rmtree(scratch, ignore_errors=True)


def told(out: Path) -> str:
    """A table of all rooms, and each fault that survived."""
    rows = results_in(out)
    lines = ["| room | faults | seen | of these by time | score |", "| --- | ---: | ---: | ---: | ---: |"]
    for room in CONCERNS:
        verdicts = [row["verdict"] for row in rows if row["room"] == room and row["verdict"] != "no verdict"]
        if verdicts:
            seen = len(verdicts) - verdicts.count("survived")  # an endless loop is seen too
            share = f"{100 * seen / len(verdicts):.0f}%"
            lines.append(f"| {room} | {len(verdicts)} | {seen} | {verdicts.count('late')} | {share} |")
    for row in rows:
        if row["verdict"] == "survived":
            lines.append(f"\n{row['id']}: {row['file']}:{row['line']} {row['fault']}")
            source = (ROOT / row["file"]).read_text().splitlines()
            lines += [f"    {source[row['line'] - 1].strip()}", f"    {row['old']!r} -> {row['new']!r}"]
    return "\n".join(lines + [f"\nfails without a fault too: {test}" for test in sorted(failing_in(out))])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("sample", help="draw faults")
    drawing.add_argument("--rooms", nargs="+", default=list(CONCERNS), choices=CONCERNS)
    drawing.add_argument("--count", type=int, default=50, help="of each room")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run", help="run the tests on each")
    running.add_argument("mutants", type=Path)
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--seconds", type=float, default=7200, help="what has no verdict by then has none")
    running.add_argument("--limit", type=float, default=600, help="seconds for the tests of one fault")
    running.add_argument("--most", type=int, default=100, help="test files for one fault")
    running.add_argument("--first", type=int, default=0, help="number of the first fault to run")
    running.add_argument("--end", type=int, default=1_000_000, help="number of the first fault behind those to run")
    running.add_argument("--files", nargs="+", default=["momoe_titan"], help="only faults whose files begin so")
    running.add_argument("--out", type=Path, default=Path("mutation"), help="folder of the results")
    telling = commands.add_parser("tell", help="the scores of the results in a folder")
    telling.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    if args.command == "sample":
        faults = sample(args.rooms, args.count, args.seed)
        args.out.write_text("[\n" + ",\n".join(map(json.dumps, faults)) + "\n]\n")
        print(f"{len(faults)} faults of {len(args.rooms)} rooms: {args.out}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "run":
        done = {row["id"] for row in results_in(args.out)}
        faults = [
            fault
            for fault in json.loads(args.mutants.read_text())
            if args.first <= fault["id"] < args.end and fault["id"] not in done
            if fault["file"].startswith(tuple(args.files))
        ]
        run(faults, args.processes, args.seconds, args.limit, args.most, args.out.absolute())
    print(told(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
