"""Builds the HTML page of training runs: health, loss, speed, memory, and the balance of the experts.

    python -m momoe_titan.dashboard outputs/debug_model -o dashboard.html
    python -m momoe_titan.dashboard "keep nothing=outputs/a" "keep all=outputs/b" --live 30

A RUN is a job's dump folder, or a folder below or above it. NAME=folder gives the run a name of its own. The command
reads TensorBoard's event files (metrics.enable_tensorboard). The page opens in any browser, without a network. All
starts of one job are one run: where a resumed job repeats steps, the later start counts.

--live SECONDS also serves the page at http://127.0.0.1:PORT and refreshes it there until the command is interrupted.
A refresh keeps zoom and sliders.

Needs the extra "dashboard": pip install 'momoe_titan[dashboard]'
"""

import argparse
import json
import math
import re
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from momoe_titan.config.command_line import install_command
from momoe_titan.dashboard.events import Run, find_runs
from momoe_titan.dashboard.page_data import page_data

TEMPLATE = Path(__file__).with_name("page.html")


def page_json(runs: list[Run], live: float = 0) -> str:
    """What the page's script draws. `live` is the number of seconds between refreshes, or 0."""
    shown = [page_data(run) for run in runs]
    return json.dumps({"written": time.time(), "live": live, "runs": shown}, allow_nan=False)


def page(data: str) -> str:
    """The whole page, made from what `page_json` returns.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    # No name must end the script with "</script>", or open a comment in it with "<!--".
    parts = {"@DATA@": data.replace("<", "\\u003c"), "@PLOTLY@": get_plotlyjs()}
    return re.sub("@DATA@|@PLOTLY@", lambda mark: parts[mark[0]], TEMPLATE.read_text())


def write(path: Path, text: str) -> None:
    """Write a file so that a reader finds either the old text or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


class Live:
    """A page that follows its runs: read again, written again, served.

    Attributes:
        data, page: what the server answers, as of the last refresh.
    """

    def __init__(self, runs: list[Run], out: Path, seconds: float):
        self.runs, self.out, self.seconds = runs, out, seconds
        self.refresh(force=True)

    def refresh(self, force: bool = False) -> None:
        """Read the runs again; write the page if they have changed."""
        if any([run.read() for run in self.runs]) or force:
            data = page_json(self.runs, self.seconds)
            text = page(data)
            self.data, self.page = data.encode(), text.encode()
            write(self.out, text)

    def serve(self, port: int) -> ThreadingHTTPServer:
        """Start a server that only this machine reaches. Port 0 takes a free one."""
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, live: Live, *args):
        self.live = live
        super().__init__(*args)

    def do_GET(self) -> None:
        answers = {"/": (self.live.page, "text/html"), "/data": (self.live.data, "application/json")}
        body, kind = answers.get(self.path.partition("?")[0], (None, None))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Print nothing about requests."""


def main() -> None:
    """The command line; exit status 2 for runs that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="momoe_titan.dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, or NAME=folder")
    parser.add_argument("-o", "--out", type=Path, default=Path("dashboard.html"))
    parser.add_argument(
        "--live", type=float, default=0, metavar="SECONDS", help="serve the page and refresh it this often"
    )
    parser.add_argument("--port", type=int, default=0, help="port of --live; 0 (the default) takes a free one")
    args = parser.parse_args()
    if args.live < 0 or not math.isfinite(args.live):
        parser.error(f"--live {args.live} must be a number of seconds")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} must be from 0 to 65535")
    try:
        runs = find_runs(args.runs)
        if not args.live:
            for run in runs:
                run.read()
            write(args.out, page(page_json(runs)))
            print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, {len(runs)} run{'s'[: len(runs) > 1]}")
            return
        live = Live(runs, args.out, args.live)
        server = live.serve(args.port)
    except ModuleNotFoundError as e:
        sys.exit(f"momoe_titan.dashboard: {e}: {install_command('dashboard')}")
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(
        f"http://127.0.0.1:{server.server_port} (and {args.out}), refreshed every {args.live:g} s; Ctrl-C ends it",
        flush=True,
    )
    try:
        while True:
            time.sleep(args.live)
            live.refresh()
    except KeyboardInterrupt:
        server.shutdown()
