"""Progress: bars where somebody watches, few lines where nobody does."""

import io
import re

import pytest
from tqdm import tqdm

from particledaps.runs.progress import RunProgress, hms, step_progress

DETAIL = "sigma 0.5, misfit 70.1 (floor 69.3)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def work(run, clock, name="chelsea", levels=30, seconds=5.0):
    with run.image(name, levels) as image:
        for _ in range(levels):
            clock.wait(seconds)
            image.level(DETAIL)


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock):
    stream = io.StringIO()
    work(RunProgress(3, stream, clock), clock)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and "\r" not in stream.getvalue()  # at 30, 60, 90, 120, 150 seconds, and the end
    assert lines[1] == f"chelsea: level 12 of 30, {DETAIL}, 0:01:00 of the image, about 0:06:30 left in the run"
    assert lines[-1] == f"chelsea: 100%, 30 levels in 0:02:30, {DETAIL}; 1 of 3 images, about 0:05:00 left"


def test_a_log_of_quick_levels_is_short(clock):
    stream = io.StringIO()
    run = RunProgress(2, stream, clock)
    for name in "ab":
        work(run, clock, name, levels=2048, seconds=1 / 64)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "a: level 1920 of 2048",
        "a: 100%",
        "b: level 1920 of 2048",
        "b: 100%",
    ]


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_the_time_left_is_that_of_the_images_that_need_work(clock, skipped):
    run = RunProgress(4, io.StringIO(), clock)
    for _ in range(skipped):
        run.skip()
    assert run.seconds_left() is None
    work(run, clock, "a", levels=10, seconds=6.0)
    assert run.seconds_left() == pytest.approx(60 * (3 - skipped))
    with run.image("b", 10) as image:
        for _ in range(5):
            clock.wait(6.0)
            image.level(DETAIL)
        assert run.seconds_left() == pytest.approx(60 * (2.5 - skipped))


def test_an_image_that_is_begun_again_counts_once(clock):
    stream = io.StringIO()
    run = RunProgress(2, stream, clock)
    with pytest.raises(RuntimeError), run.image("a", 4) as image:
        image.level(DETAIL)
        raise RuntimeError("out of memory")
    assert "100%" not in stream.getvalue()
    work(run, clock, "a", levels=4)
    assert run.done == 1 and "1 of 2 images" in stream.getvalue()


def test_levels_that_children_go_through_again_are_counted(clock):
    stream = io.StringIO()
    run = RunProgress(1, stream, clock)
    with run.image("a", 2) as image:
        for _ in range(5):
            image.level(DETAIL)
            assert run.done <= 1
    assert "a: 100%, 5 levels" in stream.getvalue()


def test_a_terminal_gets_a_bar_an_image_inside_one_of_the_run(clock):
    stream = Terminal()
    with RunProgress(2, stream, clock) as run:
        for name in ("first", "second"):
            with run.image(name, 5) as image:
                image.bar.mininterval = 0  # these levels take no time
                for _ in range(5):
                    clock.wait(5.0)
                    image.level(DETAIL)
    shown = stream.getvalue()
    assert re.search(r"run: +50%.*1 of 2 images, about 0:00:25 left", shown)
    assert re.search(r"first: +80%.*4/5", shown) and f"second: 100%, 5 levels in 0:00:25, {DETAIL}" in shown
    assert "\x1b[A" in shown  # the bar of the image stands below the other one
    assert run.bar is None


def test_steps_of_a_training_in_a_log(clock):
    stream = io.StringIO()
    steps = step_progress(1000, 400, "denoiser", stream, clock)
    for _ in range(600):
        clock.wait(0.125)
        steps.update()
        steps.set_postfix({"loss": "0.12"})
    steps.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "denoiser: step 640 of 1000, loss 0.12, 0:00:30, about 0:00:45 left"
    assert lines[-1] == "denoiser: step 1000 of 1000, loss 0.12, 0:01:15" and len(lines) == 3


def test_steps_of_a_training_on_a_terminal():
    steps = step_progress(10, 4, "denoiser", Terminal())
    steps.update()
    assert isinstance(steps, tqdm) and steps.n == 5
    steps.set_postfix({"loss": "0.12"})
    steps.close()


def test_hours_minutes_seconds():
    assert (hms(0.4), hms(80), hms(36000)) == ("0:00:00", "0:01:20", "10:00:00")
