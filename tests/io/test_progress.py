"""Progress in a log file: a line a minute, and one at the end."""

import io

from rich.console import Console

from taskvec.io import progress


def test_a_log_gets_a_line_a_minute(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=False))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("learning") as update:
        for second, *given in ((10, 0, "", 50), (61, None, "features: [3] of 9"), (100, 7, "loss 1"), (130, 8)):
            now[0] = float(second)
            update(*given)
        assert out.getvalue().splitlines() == [
            "learning  0/50  0:01:01  features: [3] of 9",
            "learning  8/50  0:02:10",
        ]
        update(9, "loss 0.5")
    assert out.getvalue().splitlines()[2:] == ["learning  9/50  0:02:10  loss 0.5"]
