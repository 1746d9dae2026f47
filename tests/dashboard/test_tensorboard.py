"""What people look at: the picture of the load, how often it is written, the line on the console."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torchtitan.tools.utils import NoColor

from momoe_titan.dashboard import console, tags
from momoe_titan.dashboard import tensorboard as dashboards


def test_load_image():
    load_LE = np.array([[1.0, 0.0, 2.0, 0.5], [64.0, 0.01, 8.0, 0.125]])
    image = dashboards.load_image(load_LE)
    side = image.shape[0] // 2
    assert image.shape == (2 * side, 4 * side, 3) and image.dtype == np.uint8
    cell = image[side // 2 :: side, side // 2 :: side].astype(int)
    assert cell[0, 0].tolist() == [255] * 3, "the fair share is white"
    assert cell[0, 1].tolist() == [0] * 3, "no token is black"
    assert cell[0, 2, 0] > cell[0, 2, 2] and cell[0, 3, 0] < cell[0, 3, 2], "red is more, blue less"
    assert (cell[1, 0] == cell[1, 2]).all() and (cell[1, 1] == cell[1, 3]).all(), "ends of the scale"


@pytest.mark.parametrize("log_steps, shape", [(7, (48, 128)), (401, (2, 4))])
def test_a_run_of_any_length_stays_small(tmp_path, log_steps, shape):
    with SummaryWriter(str(tmp_path)) as writer:
        recorder = dashboards.RunRecorder(writer, log_steps)
        load_LE = np.random.default_rng(0).gamma(4, 0.25, shape)
        for step in range(log_steps):
            recorder.record(load_LE, step)
    (file,) = tmp_path.iterdir()
    events = EventAccumulator(str(file), {"tensors": 0, "images": 0}).Reload()
    steps = [frame.step for frame in events.Tensors(tags.LOAD)]
    assert steps == [image.step for image in events.Images(tags.LOAD_IMAGE)]
    assert steps == list(range(0, log_steps, recorder.every)) and len(steps) <= dashboards.MAX_FRAMES
    # of 48 layers with 128 experts: under 8 MB for a run
    assert file.stat().st_size < 40_000 * len(steps)


def test_progress_line():
    progress = console.Progress(
        step=40,
        total_steps=1000,
        loss=2.5,
        grad_norm=0.5,
        tps=12345.6,
        memory_gib=40.0,
        memory_pct=50.0,
        memory_name="memory",
        mfu=31.25,
        maxvio=0.214,
        seconds_left=7384,
    )
    assert progress.line(NoColor()) == (
        "step: 40  loss:  2.50000  grad_norm:  0.5000  memory: 40.00GiB(50.0%)  tps: 12,346  "
        "mfu: 31.2%  maxvio: 0.21  done: 40/1000 (4%)  left: 2h03m"
    )
    progress.mfu, progress.maxvio, progress.seconds_left = float("nan"), None, None
    assert "mfu" not in progress.line(NoColor()) and "left" not in progress.line(NoColor())
    assert "maxvio" not in progress.line(NoColor())
    progress.waiting_pct = 0.9
    assert "waiting" not in progress.line(NoColor())
    progress.waiting_pct = 12.4
    assert "  waiting for data: 12%  " in progress.line(NoColor())


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (183000, "2d02h")]
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_time_left_follows_the_last_steps():
    left = console.TimeLeft(100, window=2)
    assert left.after(1, 50.0) is None, "the first step's time is that of starting up"
    assert left.after(11, 60.0) == pytest.approx(89)
    assert left.after(21, 70.0) == pytest.approx(79)
    assert left.after(31, 110.0) == pytest.approx(69 * 2.5)
    assert left.after(100, 120.0) == 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_loss_and_balance_come_first(on_gpu):
    """TensorBoard shows the groups in this order; health, which is flat in a good run, is the last."""
    layout = dashboards.custom_scalars_layout([1, 2], on_gpu)
    assert list(layout) == ["loss", "balance", "throughput", "memory", "health"]
    kind, first = next(iter(layout["loss"].values()))
    assert f"^{tags.LOSS}$" in first and kind
    assert f"^{tags.MAXVIO_MEAN}$" in next(iter(layout["balance"].values()))[1]
