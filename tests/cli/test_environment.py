"""What changes numbers without being a setting is recorded, and kept or told when a run goes on."""

import json

import metrics_schema
import pytest
import torch

from particledaps.settings import environment as environments
from particledaps.settings.environment import differences, environment, keep_threads


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_facts_are_those_of_this_process():
    torch.set_num_threads(2)
    facts = environment(torch.device("cpu"))
    assert facts["threads"] == 2 and facts["torch"] == torch.__version__
    assert facts["tf32_matmul"] is None and facts["deterministic"] is False
    assert facts["processor"] == environments.device_facts(torch.device("cpu"))["name"]
    json.dumps(facts, allow_nan=False)


def test_a_run_that_goes_on_keeps_its_threads():
    torch.set_num_threads(1)
    assert keep_threads([]) is None and keep_threads([{}, {"threads": 1}]) is None
    assert "began with 2 threads and goes on with as many (not 1)" in keep_threads([{"threads": 2}, {"threads": 2}])
    assert torch.get_num_threads() == 2
    assert "made with 1, 4 threads and go on with 2" in keep_threads([{"threads": 4}, {"threads": 1}])
    assert torch.get_num_threads() == 2


def test_differences_are_named_and_unknown_facts_passed_over():
    now = environment(torch.device("cpu"))
    assert differences(now, now) == [] == differences({}, now)
    other = now | {"source": "0" * 40, "processor": "another", "deterministic": True}
    lines = differences(other, now)
    assert [line.split(" ")[0] for line in lines] == ["processor", "deterministic", "commit"]
    assert lines[2].startswith("commit 000000000000 then, ")


def records(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "records").glob("0*.json"))]


def test_records_and_metrics_hold_them(baseline):
    _, folder = baseline
    facts = [record["environment"] for record in records(folder)]
    (row,) = metrics_schema.load(folder / "metrics.json")["metadata"]["environments"]
    assert row["facts"] == facts[0] and row["image_ids"] == [0, 1, 2]
    assert all(len(record["prior_sha256"]) == 64 for record in records(folder))


def test_going_on_elsewhere_is_told(tiny_run, monkeypatch):
    assert tiny_run("data.end_id=1").status == 0
    threads = records(tiny_run.folder)[0]["environment"]["threads"]
    torch.set_num_threads(threads + 1)
    monkeypatch.setattr(environments, "source_state", lambda: "f" * 40)
    outcome = tiny_run("data.end_id=2")
    assert f"this run began with {threads} threads and goes on with as many (not {threads + 1})" in outcome.out
    assert "begun in another environment (commit " in outcome.out and "ffffffffffff now)" in outcome.out
    assert [r["environment"]["threads"] for r in records(tiny_run.folder)] == [threads] * 2
    rows = metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["environments"]
    assert [row["image_ids"] for row in rows] == [[0], [1]]
