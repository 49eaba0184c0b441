"""Where the time goes, on a clock that the test turns."""

import pytest

from wavepath.training.chrono import Chrono, TraceWindow, speed_note


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def run(chrono, clock, steps, step_seconds, wait_seconds, first=False):
    for _ in range(steps):
        with chrono.waiting():
            clock.now += wait_seconds
        clock.now += step_seconds
        chrono.stepped(first=first)


def test_rates_waits_and_outlook():
    clock = Clock()
    chrono = Chrono(steps=100, batch_size=10, clock=clock)
    run(chrono, clock, 1, step_seconds=30.0, wait_seconds=1.0, first=True)
    assert chrono.report(1) == {"seconds": 31.0}  # nothing can be said of a step that was compiled
    run(chrono, clock, 5, step_seconds=0.75, wait_seconds=0.25)
    with chrono.paused():
        clock.now += 50
    report = chrono.report(6)
    assert report["images_per_second"] == pytest.approx(10.0)
    assert report["data_wait"] == pytest.approx(0.25)
    assert report["eta_seconds"] == pytest.approx(94.0)
    assert report["seconds"] == pytest.approx(31 + 5 + 50)
    # The next window knows nothing of the last.
    run(chrono, clock, 2, step_seconds=2.0, wait_seconds=0.0)
    assert chrono.report(8)["images_per_second"] == pytest.approx(5.0)
    assert chrono.report(8) == {"seconds": pytest.approx(90.0)}


def test_the_compile_time_is_counted_whatever_happens_between_dispatch_and_result():
    clock = Clock()
    chrono = Chrono(steps=10, batch_size=10, clock=clock)
    with chrono.waiting():
        clock.now += 1
    clock.now += 20  # the first step is compiled when it is sent off
    with chrono.waiting():  # and the next batch fetched before its result is asked for
        clock.now += 1
    chrono.stepped(first=True)
    assert chrono.compile_seconds == pytest.approx(20) and chrono.data_seconds == pytest.approx(2)


def test_totals_survive_a_restart():
    clock = Clock()
    chrono = Chrono(steps=100, batch_size=10, clock=clock)
    run(chrono, clock, 1, 5.0, 0.0, first=True)
    run(chrono, clock, 4, 1.0, 0.0)
    saved = chrono.saved()
    clock.now += 1000  # the machine was off
    again = Chrono(steps=100, batch_size=10, saved=saved, clock=clock)
    run(again, clock, 1, 5.0, 0.0, first=True)
    run(again, clock, 4, 1.0, 0.0)
    assert again.seconds == pytest.approx(18.0)
    assert again.rate() == pytest.approx(10.0)
    assert again.compile_seconds == pytest.approx(10.0)


def test_the_note_of_the_progress_line():
    report = {"images_per_second": 128.2, "data_wait": 0.031, "eta_seconds": 130.0, "seconds": 9.0}
    assert speed_note(0.43123, report) == "loss 0.4312, 128.2 images/s, data wait 3%, ETA 2m10s"
    assert speed_note(None, {"seconds": 1.0}) == ""


def test_a_trace_window_opens_and_closes_at_its_steps(tmp_path, monkeypatch):
    import jax

    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    trace = TraceWindow((3, 5), tmp_path)
    for step in range(1, 8):
        trace.before(step, {})
        events.append(step)
    trace.close()
    assert events == [1, 2, "start", 3, 4, "stop", 5, 6, 7]
    # A resume in the middle of the window traces the rest of it, one after it nothing.
    events.clear()
    for first in (4, 6):
        trace = TraceWindow((3, 5), tmp_path)
        trace.before(first, {})
        trace.close()
    assert events == ["start", "stop"]
