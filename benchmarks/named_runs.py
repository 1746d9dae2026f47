"""The option `--run "NAME: OPTIONS"` of scripts that compare jobs."""

import argparse


def add_named_runs(parser: argparse.ArgumentParser) -> None:
    """Add the option, whose value is a list: one string for each time that it is given."""
    parser.add_argument("--run", action="append", required=True, metavar='"NAME: OPTIONS"', help="may be repeated")


def named_runs(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, list[str]]:
    """The options of each run, by its name. Ends the process with a usage message where a name lacks or is twice."""
    runs: dict[str, list[str]] = {}
    for run in given:
        name, colon, options = run.partition(":")
        if not colon or name in runs:
            parser.error(f"--run {run!r} must be 'NAME: OPTIONS' with a name of its own")
        runs[name] = options.split()
    return runs
