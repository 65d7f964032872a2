import time

from particledaps.runs.clock import Seconds


def test_computing_counts_and_waiting_does_not():
    begun = Seconds.now()
    time.sleep(0.2)
    waited = begun.until_now()
    assert waited.wall >= 0.2 and waited.cpu < 0.15
    while begun.until_now().cpu < waited.cpu + 0.1:
        sum(range(10_000))
    assert begun.until_now().cpu >= 0.1
