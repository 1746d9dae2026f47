"""The page of `python -m momoe_titan.dashboard`: what it takes from event files, and what a browser makes of it."""

import json
import math
import re
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from momoe_titan.dashboard import page as dashboard
from momoe_titan.dashboard import page_data as shown
from momoe_titan.dashboard.events import Run, Start, find_runs
from momoe_titan.dashboard.page_data import page_data
from momoe_titan.dashboard.tags import maxvio_layer
from momoe_titan.dashboard.tensorboard import RunRecorder
from tests.support.browser import CHROMEDRIVER, CHROMIUM, Browser

LAYERS, EXPERTS = (1, 2, 3), 16


def load_at(step):
    load_LE = np.random.default_rng(step).gamma(8, 1 / 8, (len(LAYERS), EXPERTS))
    load_LE[0, 3], load_LE[0, 5] = 0, 2.5
    return load_LE


def write_start(folder, steps, first_step=None, offset=0.0, description=None, **values):
    """An event file as a start of a job leaves it; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(folder)) as writer:
        recorder = RunRecorder(writer, len(steps))
        about = {
            "total_steps": 100,
            "model": "momoe_llama test",
            "device": "NVIDIA H100",
            "ranks": 2,
            "moe_layers": list(LAYERS),
            "experts_kept_at_100_gib": 8.0,
            "num_experts": EXPERTS,
            "top_k": 2,
            "config": {"optimizer.lr": 1e-3, "training.steps": 100},
            **(description or {}),
        }
        recorder.start({"first_step": first_step or steps[0], **about}, {}, steps[0])
        for step in steps:
            loss = 8 / step**0.3 + offset
            scalars = {
                "loss_metrics/global_avg_loss": loss,
                "loss_metrics/global_max_loss": loss + 0.1,
                "grad_norm": 1.0 + step % 7,
                "lr": 1e-3 * min(1, step / 10),
                "n_tokens_seen": 1000 * step,
                "throughput(tps)": 1000.0 + step,
                "mfu(%)": 31.0,
                "time_metrics/step(s)": 0.25,
                "time_metrics/data_loading(%)": 0.5,
                "memory/worst_rank_reserved(GiB)": 60.0,
                "memory/worst_rank_active(GiB)": 55.0,
                "memory/capacity(GiB)": 80.0,
                "memory/worst_rank": step % 2,
                "memory/experts_kept(GiB)": 4.0,
                "moe/save_percent": 50.0,
                "moe/maxvio_batch_mean": 0.5,
                "moe/maxvio_batch_max": 1.5,
                "moe/dead_experts": step % 2,
                "moe/worst_ep_rank_load": 1.1,
                "moe/router_entropy_mean": 0.9,
                "moe/router_entropy_min": 0.8,
                "moe/bias_min": -0.001 * step,
                "moe/bias_max": 0.001 * step,
                "moe/dropped_tokens": 0,
                "moe/kernel_compiles": 13,
                "health/ooms": 0,
                "health/alloc_retries": 0,
                "health/non_finite": 0,
                **{maxvio_layer(i): 0.5 * i for i in LAYERS},
                **values,
            }
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
            if step % 20 == 0:
                writer.add_scalar("validation_metrics/loss", loss + 0.2, step)
                writer.add_scalar("validation_metrics/maxvio_global_mean", 0.3, step)
                writer.add_scalar("validation_metrics/maxvio_global_max", 0.6, step)
                writer.add_scalar("validation_metrics/dead_experts", 0, step)
            recorder.record(load_at(step), step)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that went through, and one that was killed after step 60 and resumed from step 40."""
    root = tmp_path_factory.mktemp("outputs")
    other = {"config": {"optimizer.lr": 3e-4, "training.steps": 100, "model.flavor": "</td><!--<script>"}}
    write_start(root / "whole" / "tb" / "20260101-0000", range(2, 101, 2), first_step=1, description=other)
    write_start(root / "resumed" / "tb" / "20260101-0000", range(2, 61, 2), first_step=1, **{"health/alloc_retries": 3})
    time.sleep(0.01)
    write_start(root / "resumed" / "tb" / "20260102-0000", range(42, 101, 2), first_step=41, offset=0.5)
    return root


def read(*folders):
    found = find_runs([str(folder) for folder in folders])
    for run in found:
        run.read()
    return found


def tiles(run):
    return {tile["label"]: tile for tile in run["health"]}


def test_resumed_runs_are_stitched(runs):
    (run,) = (page_data(run) for run in read(runs / "resumed"))
    assert run["name"] == "resumed" and run["starts"] == 2
    assert [r["step"] for r in run["resumes"]] == [41]
    loss = run["series"]["loss"]
    assert loss["x"] == list(range(2, 101, 2)), "every step once"
    of = dict(zip(loss["x"], loss["y"], strict=True))
    assert of[40] == pytest.approx(8 / 40**0.3, rel=1e-5), "of the first start"
    assert of[42] == pytest.approx(8 / 42**0.3 + 0.5, rel=1e-5), "repeated: the later start counts"
    assert run["series"]["val_loss"]["x"] == [20, 40, 60, 80, 100]
    assert tiles(run)["Resumes"]["value"] == 1
    retries = tiles(run)["Allocation retries"]
    assert (retries["value"], retries["state"], retries["note"]) == (3, "warn", "last at step 2")
    assert tiles(run)["Kernels compiled"]["value"] == 26, "of both processes"
    assert run["summary"]["step_time"] == 0.25 and run["summary"]["mem_peak"] == 60


def test_what_a_later_start_took_back_is_gone(tmp_path):
    """Steps 21 to 60 were trained, then the job was resumed from step 20 and is now at 30."""
    write_start(tmp_path / "run" / "tb" / "20260101-0000", range(1, 61))
    time.sleep(0.01)
    write_start(tmp_path / "run" / "tb" / "20260101-0000", range(21, 31))  # within the same minute
    (run,) = (page_data(run) for run in read(tmp_path / "run"))
    assert run["last_step"] == 30 and run["load"]["steps"][-1] == 30
    time.sleep(0.01)
    write_start(tmp_path / "run" / "tb" / "20260103-0000", range(1, 5))
    (run,) = (page_data(run) for run in read(tmp_path / "run"))
    assert run["last_step"] == 4 and run["resumes"] == [] and "again from step 1" in run["notes"][0]


def test_the_rank_with_the_loss_is_read(tmp_path):
    """metrics.save_for_all_ranks with pipeline parallelism: the first stage logs -1."""
    for rank, loss in ((0, -1.0), (2, 5.0), (10, 6.0)):
        folder = tmp_path / "run" / "tb" / "20260101-0000" / f"rank_{rank}"
        write_start(folder, [1, 2], **{"loss_metrics/global_avg_loss": loss})
    (run,) = (page_data(run) for run in read(tmp_path / "run"))
    assert run["series"]["loss"]["y"] == [5, 5]


def test_runs_are_found_and_named(runs, tmp_path):
    assert [run.name for run in find_runs([str(runs)])] == ["resumed", "whole"]
    assert [run.name for run in find_runs([f"all={runs}"])] == ["all/resumed", "all/whole"]
    for folder in ("whole", "whole/tb", "whole/tb/20260101-0000"):
        (run,) = read(runs / folder)
        assert run.name == "whole" and page_data(run)["last_step"] == 100
    (run,) = find_runs([f"a name={runs / 'whole'}"])
    assert run.name == "a name"
    with pytest.raises(ValueError, match="no TensorBoard file under .* is metrics.enable_tensorboard on"):
        find_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="there is no folder"):
        find_runs([str(tmp_path / "none")])


def test_non_finite_values_are_told_and_left_out(tmp_path):
    folder = tmp_path / "run" / "tb" / "20260101-0000"
    write_start(folder, [1, 2, 3], **{"grad_norm": math.nan, "health/non_finite": 3})
    (run,) = read(tmp_path / "run")
    data = page_data(run)
    assert data["series"]["grad_norm"]["y"] == [None] * 3
    assert tiles(data)["Non-finite log steps"]["value"] == 3 and tiles(data)["Non-finite log steps"]["state"] == "bad"
    json.loads(dashboard.page_json([run]), parse_constant=pytest.fail)


def test_a_run_without_an_event_spoils_no_page(runs, tmp_path):
    folder = tmp_path / "empty" / "tb" / "20260101-0000"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host.1.0").touch()
    found = find_runs([str(tmp_path / "empty"), str(runs / "whole")])
    for run in found:
        run.read()
    empty, whole = json.loads(dashboard.page_json(found), parse_constant=pytest.fail)["runs"]
    assert (empty["begun"], empty["updated"], empty["last_step"]) == (None, None, None)
    assert whole["begun"] <= whole["updated"] and whole["last_step"] == 100


def test_kernels_that_keep_being_compiled(tmp_path):
    with SummaryWriter(str(tmp_path / "run" / "tb" / "20260101-0000")) as writer:
        for step in range(1, 41):
            writer.add_scalar("loss_metrics/global_avg_loss", 1.0, step)
            writer.add_scalar("moe/kernel_compiles", 10 + step, step)
    (run,) = (page_data(run) for run in read(tmp_path / "run"))
    compiled = tiles(run)["Kernels compiled"]
    assert (compiled["value"], compiled["state"], compiled["note"]) == (50, "warn", "still growing")
    assert tiles(run)["Out of memory"]["state"] == "unknown", "not recorded is not 0"
    assert run["load"] is None and run["series"].keys() == {"loss"}


def test_long_lines_keep_their_extremes():
    values = np.sin(np.arange(100_000) / 5000)
    values[31_234], values[77_777], values[50_000:50_010] = 9.0, -9.0, np.nan
    kept = shown.extremes(values, 2000)
    assert len(kept) <= 2000 and (np.diff(kept) > 0).all()
    assert {0, 31_234, 77_777, 99_999} <= set(kept.tolist())
    assert shown.extremes(values[:2000], 2000).tolist() == list(range(2000))


def test_a_long_run_makes_a_bounded_page():
    """20,000 log steps of 48 layers with 128 experts, of which 201 recorded the load."""
    start = Start(Path("none"))
    steps = range(20_000)
    for tags in shown.SERIES.values():
        start.scalars[tags[0]] = {step: math.sin(step) for step in steps}
    for layer in range(48):
        start.scalars[maxvio_layer(layer)] = {step: math.cos(step) for step in range(0, 20_000, 4)}
    rng = np.random.default_rng(0)
    start.frames = {step: rng.gamma(4, 0.25, (48, 128)).astype(np.float16) for step in range(0, 20_000, 100)}
    start.begun = start.last = 1.0
    run = Run("long", Path("."))
    run.files[Path("file")] = start
    text = dashboard.page_json([run])
    assert len(text) < 3e6
    data = json.loads(text)["runs"][0]
    assert len(data["series"]["loss"]["x"]) <= shown.MAX_POINTS < data["drawn"][1]
    means = data["series"]["loss"]["means"]
    assert means["x"][0] == 99 and means["x"][-1] == 19_999
    assert means["y"][0] == pytest.approx(np.mean(np.sin(np.arange(100))), rel=1e-5)
    assert len(data["load"]["steps"]) == shown.MAX_FRAMES and data["load"]["recorded"] == 200


def test_command_line(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["dashboard.py", f"<b>&=</script>{runs}", "-o", str(out)])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["dashboard.py", str(runs), "--live", "1", "--port", "99999"])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "--port 99999 must be from 0 to 65535" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["dashboard.py", str(runs), "-o", str(out)])
    dashboard.main()
    assert "2 runs" in capsys.readouterr().out
    text = out.read_text()
    assert text.count("<script") == 3 and not re.search(r"(src|href)=\"(https?:)?//", text[:20_000])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SystemExit, match=r"pip install 'momoe_titan\[dashboard\]'"):
        dashboard.main()


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver (Debian: apt install chromium-driver)"
)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


# As HTML it would end the page's script, open a comment in it, or be set in italics.
EVIL = "<i>plain</i></script><!--<script>"


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """Two runs, and one of another program: a loss and nothing else, with a name made to break out."""
    with SummaryWriter(str(runs.parent / "plain" / "tb" / "20260101-0000")) as writer:
        for step in range(1, 101):
            writer.add_scalar("loss_metrics/global_avg_loss", 9 - step / 50, step)
    path = tmp_path_factory.mktemp("page") / "dashboard.html"
    found = read(runs / "whole", runs / "resumed", f"{EVIL}={runs.parent / 'plain'}")
    path.write_text(dashboard.page(dashboard.page_json(found)))
    return path.as_uri()


# Titles of the charts that show at least one mark.
DRAWN = """
return [...document.querySelectorAll(".plot")].filter(p =>
    p.querySelector(".scatterlayer .trace path, .scatterlayer .trace .point")
    && p.querySelector(".canvas").offsetHeight > 200)
  .map(p => p.querySelector("h3").textContent)"""
CHARTS = [
    "Loss",
    "Validation perplexity",
    "Learning rate",
    "Gradient norm, before clipping",
    "Throughput",
    "Model FLOPS utilisation",
    "Time per step",
    "Waiting for data",
    "Peak against capacity",
    "Saved by the experts for the backward",
    "Which rank uses most",
    "MaxVio per layer",
    "MaxVio over a whole validation",
    "Dead experts",
    "Worst rank of experts",
    "Router entropy",
    "Range of the balancing bias",
    "Peak memory",
    "Time per step",
]
SETTLED = "return new Promise(done => setTimeout(done, 250))"


@needs_browser
@pytest.mark.parametrize("width, dark", [(1600, False), (400, True)])
def test_every_panel_is_drawn(browser, page, width, dark):
    browser.view(width, 900, dark)
    browser.open(page)
    browser.run(SETTLED)
    assert browser.run(DRAWN) == CHARTS
    assert browser.run("return document.querySelectorAll('#heat .heatmaplayer image').length") == 1
    assert browser.run("return document.querySelectorAll('.tile').length") == 9 + 9 + 8
    assert browser.run("return document.documentElement.scrollWidth") == width, "nothing sticks out"
    columns = browser.run("return new Set([...document.querySelectorAll('.plot')].map(p => p.offsetLeft)).size")
    assert columns >= 4 if width == 1600 else columns == 1
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(14, 17, 22)" if dark else "rgb(244, 245, 247)")
    said = browser.run("return document.querySelector('#plot-tps .missing').textContent")
    assert said.startswith(f"Without data: {EVIL}: its event files have no such values")
    assert browser.console() == []


@needs_browser
def test_text_can_be_read(browser, page):
    """WCAG's contrast of at least 4.5 for text and 3 for lines, in light and dark."""
    ratio = """
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const luminance = name => {
      context.fillStyle = css(name); context.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    };
    return arguments[0].map(name => {
      const [a, b] = [luminance(name), luminance(arguments[1])].sort();
      return (b + .05) / (a + .05);
    });
    """
    for dark in (False, True):
        browser.view(1600, 900, dark)
        browser.open(page)
        for behind in ("--card", "--page"):
            assert min(browser.run(ratio, ["--text", "--quiet"], behind)) >= 4.5
        states = ["--ok", "--warn", "--bad"]
        assert min(browser.run(ratio, states, "--card")) >= 4.5
        assert min(browser.run(ratio, [f"--run{i}" for i in range(6)], "--card")) >= 3


@needs_browser
def test_hover_slider_zoom_and_choice_of_runs(browser, page):
    browser.view(1600, 900)
    browser.open(page)
    browser.run(SETTLED)
    # hovering names step, value and run
    browser.hover("#plot-loss .nsewdrag", right=0.6)
    said = browser.wait("return document.querySelector('#plot-loss .hoverlayer').textContent")
    assert "whole" in said and "resumed" in said and "mean over ranks" in said and re.search(r"5\.|3\.|2\.", said)
    browser.hover("#heat .nsewdrag", right=(5 + 0.5) / EXPERTS, down=0.5 / len(LAYERS))
    said = browser.wait("return document.querySelector('#heat .hoverlayer').textContent")
    found = re.search(r"layer 1, expert 5([\d.]+) times the fair share", said)
    assert found and float(found[1]) == pytest.approx(2.5, rel=0.02)

    # the slider, by keyboard: the last step at first, then the one before, then the first
    label = "return document.getElementById('heat-label').textContent"
    picture = "return document.querySelector('#heat .heatmaplayer image').outerHTML"
    assert browser.run(label) == "step 100"
    last = browser.run(picture)
    browser.press("#heat-step", "\ue012")  # left
    browser.run(SETTLED)
    assert browser.run(label) == "step 98"
    assert (
        browser.wait(picture.replace("return ", "const now = ") + f"; return now !== {json.dumps(last)} && now") != last
    )
    browser.press("#heat-step", "\ue011")  # home
    browser.run(SETTLED)
    assert browser.run(label) == "step 2"
    loads = browser.run("return document.getElementById('heat').data[0].customdata")
    np.testing.assert_allclose(loads, load_at(2), rtol=0.02)
    assert loads[0][3] == 0, "an expert without a token"

    # dragging in one chart zooms all, and back
    axis = "return document.querySelector('#plot-tps .canvas').layout.xaxis.range"
    full = browser.run(axis)
    browser.drag("#plot-loss .nsewdrag", 0.25, 0.5)
    browser.wait(f"{axis}[0] !== {full[0]}")
    low, high = browser.run(axis)
    assert 20 < low < 32 and 45 < high < 55
    assert browser.run(axis.replace("tps", "loss")) == [low, high]
    browser.run("document.getElementById('reset').click()")
    browser.wait(f"{axis}[0] === {full[0]}")
    assert browser.run(axis) == full

    # hiding runs
    chips = "[...document.querySelectorAll('#chips .chip')]"
    traces = "return document.querySelector('#plot-grad .canvas').data.length"
    assert browser.run(traces) == 2
    browser.run(f"{chips}[0].click()")
    assert browser.run(traces) == 1
    browser.run(f"{chips}[1].click()")
    browser.run(SETTLED)
    empty = browser.run("return document.querySelector('#plot-grad .empty').textContent")
    assert "no step was logged" in empty and not browser.run(DRAWN)[1:]
    browser.run(f"{chips}[2].click()")
    assert "All runs are hidden" in browser.run("return document.querySelector('#plot-loss .empty').textContent")
    browser.run(f"{chips}.forEach((c, i) => {chips}[i].click())")
    browser.run(SETTLED)
    assert browser.run(DRAWN) == CHARTS
    assert browser.console() == []


@needs_browser
def test_live_page_keeps_zoom_and_slider(browser, tmp_path):
    folder = tmp_path / "run" / "tb" / "20260101-0000"
    write_start(folder, range(2, 21, 2), first_step=1)
    live = dashboard.Live(find_runs([str(tmp_path / "run")]), tmp_path / "page.html", 0.2)
    server = live.serve(0)
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        browser.view(1600, 900)
        browser.open(url)
        browser.run(SETTLED)
        browser.press("#heat-step", "\ue011\ue014")  # home, right
        browser.drag("#plot-loss .nsewdrag", 0.25, 0.5)
        axes = "return ['loss', 'tps'].map(p => document.querySelector(`#plot-${p} .canvas`).layout.xaxis.range)"
        browser.wait(f"{axes.replace('return', 'const now =')}; return now[0][0] > 2 && now[1][0] === now[0][0]")
        before = browser.run(axes)
        assert before[0] == before[1] and 5 < before[0][0] < 8
        time.sleep(0.01)
        write_start(folder, range(22, 41, 2), first_step=21)
        live.refresh()
        deadline = time.time() + 20
        steps = "return document.querySelector('#plot-loss .canvas').data[0].x.at(-1)"
        while browser.run(steps) != 40 and time.time() < deadline:
            time.sleep(0.1)
        assert browser.run(steps) == 40
        assert browser.run(axes) == before
        assert browser.run("return document.getElementById('heat-label').textContent") == "step 4"
        written = (tmp_path / "page.html").read_text()
        live.refresh()
        assert (tmp_path / "page.html").read_text() == written, "nothing new, nothing written"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + "etc/passwd")
        assert browser.console() == []
    finally:
        server.shutdown()
        server.server_close()
    assert browser.wait("return document.getElementById('written').textContent.includes('has ended')")


def test_equal_names_are_told_apart_by_the_parts_that_differ(tmp_path):
    for folder in ("a/out", "b/out", "c/other"):
        write_start(tmp_path / folder / "tb" / "20260101-0000", [1, 2])
    assert [run.name for run in read(tmp_path)] == ["a/out/tb", "b/out/tb", "other"]


@pytest.mark.parametrize(
    "maxvio, dead, states",
    [
        (0.1, 0, ("ok", "ok")),
        (0.7, 1, ("warn", "warn")),
        (EXPERTS / 2 - 1, 30, ("bad", "bad")),  # the highest possible: two of sixteen experts have everything
        (4.0, 4, ("bad", "warn")),
    ],
)
def test_balance_has_a_tile(tmp_path, maxvio, dead, states):
    values = {"moe/maxvio_batch_max": maxvio, "moe/dead_experts": dead, "moe/worst_ep_rank_load": 1.0 + maxvio}
    write_start(tmp_path / "run" / "tb" / "20260101-0000", range(1, 21), **values)
    found = tiles(page_data(*read(tmp_path / "run")))
    assert (found["Balance (MaxVio)"]["state"], found["Dead experts"]["state"]) == states
    assert found["Balance (MaxVio)"]["value"] == pytest.approx(maxvio, abs=0.01)
    assert found["Dead experts"]["note"] == "of 48, in one step"
    assert found["Worst rank of experts"]["state"] == states[0].replace("warn", "bad")


def test_a_tile_without_numbers_of_experts_still_turns_red():
    collapsed = {"moe/maxvio_batch_max": dict.fromkeys(range(10), 7.0)}
    (tile, _) = shown.balance_tiles(collapsed, {})
    assert tile["state"] == "bad"
    (tile, _) = shown.balance_tiles({}, {})
    assert tile["state"] == "unknown"
    # where every token chooses all experts there is nothing to balance
    (tile, _) = shown.balance_tiles({"moe/maxvio_batch_max": {1: 0.0}}, {"num_experts": 2, "top_k": 2})
    assert tile["state"] == "ok"


def test_time_leaves_out_what_lies_between_two_starts(runs):
    whole, resumed = (page_data(run) for run in read(runs / "whole", runs / "resumed"))
    assert whole["axes"]["steps"] == list(range(2, 101, 2))
    assert whole["axes"]["tokens"] == [1000 * step for step in whole["axes"]["steps"]]
    seconds = resumed["axes"]["seconds"]
    assert seconds == sorted(seconds) and seconds[-1] < 60, "the test took no minute"
    assert "config" not in whole["description"] and whole["config"]["optimizer.lr"] == 3e-4


@needs_browser
def test_x_axis_can_be_tokens_or_time(browser, page):
    browser.view(1600, 900)
    browser.open("about:blank")  # the page of an earlier test asks a server that has ended
    browser.console()
    browser.open(page)
    browser.run(SETTLED)
    choose = (
        "const s = document.getElementById('axis-choice'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
    )
    chart = "const c = document.querySelector('#plot-tps .canvas'); return "
    browser.run(choose, "tokens")
    browser.run(SETTLED)
    assert browser.run(chart + "c.layout.xaxis.title.text") == "tokens"
    assert browser.run(chart + "[...c.data[0].x].slice(0, 3)") == [2000, 4000, 6000]
    low, high = browser.run(chart + "c.layout.xaxis.range")
    assert low < 2000 and 100_000 < high < 110_000
    # resumes are where they were, in tokens
    (mark,) = browser.run(chart + "c.layout.shapes.map(s => s.x0)")
    assert mark == 41_000
    # the third run has recorded no tokens
    said = browser.run("return document.querySelector('#plot-loss .missing').textContent")
    assert said == f"Without data: {EVIL}: its tokens were not recorded."
    browser.run(choose, "seconds")
    browser.run(SETTLED)
    assert browser.run(chart + "c.layout.xaxis.title.text") == "time (hours)"
    x = browser.run(chart + "[...c.data[1].x]")
    assert x == sorted(x) and x[-1] < 1 / 60
    browser.run(choose, "steps")
    browser.run(SETTLED)
    assert browser.run(chart + "[...c.data[0].x].slice(0, 3)") == [2, 4, 6]
    assert browser.console() == []


@needs_browser
def test_differences_of_configurations_and_equal_runs(browser, runs, tmp_path):
    path = tmp_path / "page.html"
    found = read(runs / "whole", f"again={runs / 'whole' / 'tb'}", runs / "resumed")
    assert len(found) == 2, "one folder is one run"
    write_start(tmp_path / "same" / "tb" / "20260101-0000", range(2, 101, 2), first_step=1)
    path.write_text(dashboard.page(dashboard.page_json(read(runs / "whole", runs / "resumed", tmp_path / "same"))))
    browser.view(1600, 900)
    browser.open(path.as_uri())
    browser.run(SETTLED)
    table = "return [...document.querySelectorAll('#differences tr')].map(r => [...r.children].map(c => c.textContent))"
    rows = browser.run(table)
    assert rows[0] == ["Field", "1 whole", "2 resumed", "3 same"]
    assert rows[1:] == [["optimizer.lr", "0.0003", "0.001", "0.001"], ["model.flavor", "</td><!--<script>", "–", "–"]]
    notes = browser.run("return [...document.querySelectorAll('#notes p')].map(p => p.textContent)")
    assert notes == ["1 (whole), 3 (same) have the same loss in every step: their lines lie on top of each other."]
    assert browser.console() == []


@needs_browser
@pytest.mark.parametrize("width", [420, 1400])
def test_the_tables_fit_a_telephone_and_a_laptop(browser, page, width):
    browser.view(width, 900)
    browser.open(page)
    browser.run(SETTLED)
    regions = "return [...document.querySelectorAll('.scroll')].map(t => [t.scrollWidth, t.clientWidth])"
    for wanted, there_is in browser.run(regions):
        assert wanted <= there_is, "nothing to scroll sideways"
    labels = browser.run("return [...document.querySelectorAll('#table tr:nth-child(1) td')].map(t => t.dataset.label)")
    assert labels[:3] == ["Run", "Step", "Loss"] and "Dead experts" in labels
    # on a telephone each field of the differences has a line of its own, and each run below it one
    rows = "const row = document.querySelector('#differences tbody tr'); return "
    assert browser.run(rows + "row.children[1].dataset.label").startswith("1 ")
    assert browser.run(rows + "row.children[0].offsetTop < row.children[1].offsetTop") == (width == 420)


@needs_browser
def test_charts_of_a_row_stand_in_a_line(browser, page):
    """However many lines the keys above them take."""
    browser.view(1400, 900)
    browser.open(page)
    browser.run(SETTLED)
    plots = """
    const lines = key => new Set([...key.children].map(c => c.offsetTop)).size;
    return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('.canvas').offsetParent).map(
        p => [p.offsetTop, lines(p.querySelector('.key')), p.querySelector('.canvas').getBoundingClientRect().top]);
    """
    rows = {}
    for row, lines, top in browser.run(plots):
        rows.setdefault(row, []).append((lines, top))
    assert any(len({lines for lines, _ in row}) > 1 for row in rows.values()), "keys of one line beside keys of two"
    for row in rows.values():
        assert max(top for _, top in row) - min(top for _, top in row) < 1


@needs_browser
@pytest.mark.parametrize("low, high", [(0.61, 0.97), (1.0, 9.0), (0.03, 40.0), (1e-9, 1e6)])
def test_ticks_of_a_logarithmic_axis_can_be_read(browser, tmp_path, low, high):
    """At least three of them within the axis, none on top of another, and no exponent where none is needed."""
    folder = tmp_path / "run" / "tb" / "20260101-0000"
    write_start(folder, range(1, 51))
    path = tmp_path / "page.html"
    (run,) = read(tmp_path / "run")
    data = json.loads(dashboard.page_json([run]))
    line = data["runs"][0]["series"]["grad_norm"]
    line["y"] = list(np.geomspace(low, high, len(line["x"])))
    path.write_text(dashboard.page(json.dumps(data)))
    browser.view(1600, 900)
    browser.open(path.as_uri())
    browser.run(SETTLED)
    boxes = browser.run(
        "return [...document.querySelectorAll('#plot-grad .ytick text')].map(t => "
        "[t.textContent, t.getBoundingClientRect().top, t.getBoundingClientRect().bottom])"
    )
    assert len(boxes) >= 3, boxes
    edges = sorted(box[1:] for box in boxes)
    assert all(below[0] >= above[1] - 1 for above, below in zip(edges, edges[1:], strict=False)), boxes
    if low > 1e-3:
        assert not any("e" in text or "×" in text for text, *_ in boxes)
