"""The console's lines: colours only where someone looks at them."""

import io
import logging

import pytest

from momoe_titan.components import console_log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("level", ["info", "debug"])
@pytest.mark.parametrize("stream, colors", [(Terminal, True), (io.StringIO, False)])
def test_colours_stay_out_of_a_redirected_log(stream, colors, level, monkeypatch):
    out = stream()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("colours")
    logger.addHandler(handler)
    monkeypatch.setattr(console_log, "logger", logger)
    console_log.set_up_console(console_log.ConsoleFilter(level))
    logger.info("\033[31mstep:  1  \033[38;2;180;60;0mloss:  8.1\033[0m")
    assert ("\033" in out.getvalue()) == colors
    assert colors or out.getvalue().endswith("step:  1  loss:  8.1\n")
