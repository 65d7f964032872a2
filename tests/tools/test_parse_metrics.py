import copy
import csv
import io
import math
import re

import metrics_schema
import pytest
from hand_made_results import DIVERGED, TWO, csv_rows, hand_made

from particledaps.reports import read_metrics
from particledaps.reports import write_metrics as metrics_file
from particledaps.reports.finished_runs import ResultsError
from particledaps.reports.tables import Column, Estimate, Table, cell_text, terminal


@pytest.mark.parametrize("metrics", [TWO, DIVERGED, hand_made({0: [1.0, 2.0]}, truth=False)], ids=len)
def test_the_files_of_these_tests_follow_the_schema(metrics):
    metrics_schema.check(metrics)


def test_the_schema_is_the_one_that_runs_write():
    assert read_metrics.SCHEMA == metrics_file.SCHEMA


def test_every_number_of_a_run(write, call):
    (row,) = csv_rows(call(write(TWO), "--all", "--format", "csv").out)
    known = {
        "run": "exp",
        "images": 2,
        "psnr_best_db": 25,  # 20 and 30: variance 50, standard error sqrt(50 / 2) = 5
        "psnr_best_db_se": 5,
        "psnr_mean_db": 21.5,  # 15 and 28: half their distance
        "psnr_mean_db_se": 6.5,
        "psnr_selected_db": 23,
        "psnr_selected_db_se": 3,
        "psnr_std_db": (math.sqrt(50) + math.sqrt(8)) / 2,
        "psnr_aligned_best_db": 26,
        "psnr_aligned_selected_db": 24,
        "ssim_aligned_best": 0.25,
        "ssim_mean_se": 0.065,
        "lpips_best": None,
        "lpips_aligned_std": None,
        "success_rate": 1,
        "particle_success_rate": 0.75,
        "coverage": 1,
        "seconds_per_image": 4,
        "pre_optimization_seconds": 6,
        "pre_optimization_peak_vram_mb": 500,
        "optimization_steps": 2,
        "optimization_peak_vram_mb": 900,
        "peak_vram_mb": 900,
        "optimization_iterations": 14,
        "pairwise_distance": 3,
    }
    assert {k: row[k] for k in known} == pytest.approx(known)


def test_a_diverged_image_counts_as_a_failure_but_in_no_mean(write, call):
    (row,) = csv_rows(call(write(DIVERGED), "--all", "--format", "csv").out)
    assert (row["images"], row["diverged_images"]) == (3, 1)
    assert (row["psnr_best_db"], row["psnr_best_db_se"]) == (25, 5)
    assert row["success_rate"] == pytest.approx(2 / 3)
    assert row["particle_success_rate"] == 0.75


def test_what_does_not_exist_is_a_dash(write, call):
    lines = call(write(hand_made({0: [20.0, 10.0]}))).out.splitlines()
    assert "20.00 ± -" in lines[2] and lines[2].endswith(" -")
    assert len({len(line.rstrip()) for line in lines[:2]}) == 1
    blind = call(write(hand_made({0: [20.0], 1: [3.0]}, truth=False)), "--all").out
    assert blind.count("±") == 2 and "nan" not in blind.lower() and "None" not in blind
    assert "misfit best" in blind and "s/image" in blind  # the two that have an error
    nothing = hand_made({})
    assert "exp" in call(write(nothing)).out


def test_without_truth_the_compact_table_has_the_misfit(write, call):
    blind = hand_made({0: [20.0], 1: [3.0]}, truth=False)
    (row,) = csv_rows(call(write(blind), "--format", "csv").out)
    losses = [min(image["loss"]) for image in blind["measurement"]["per_image"]]
    assert row["misfit_best"] == pytest.approx(sum(losses) / 2)
    assert "misfit" not in call(write(TWO)).out


def test_nan_is_a_missing_value(write, call):
    metrics = copy.deepcopy(TWO)
    metrics["psnr"]["per_image"][0]["best"] = math.nan
    (row,) = csv_rows(call(write(metrics), "--format", "csv").out)
    assert (row["psnr_best_db"], row["psnr_best_db_se"]) == (30, None)


def test_without_solved_flags_coverage_tells_success(write, call):
    plain = copy.deepcopy(TWO)
    for row in plain["modes"]["per_image"]:
        del row["solved"], row["image_id"]
    plain["modes"]["per_image"][1]["coverage"] = 0
    (row,) = csv_rows(call(write(plain), "--format", "csv").out)
    assert (row["success_rate"], row["particle_success_rate"]) == (0.5, None)


def cells_of(text, form):
    lines = text.splitlines()
    if form == "terminal":
        return [re.split(r"\s{2,}", line.strip()) for line in [lines[0], *lines[2:]]]
    if form == "markdown":
        rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        return [[c.replace("\\|", "|") for c in row] for row in [rows[0], *rows[2:]]]
    body = [line.removesuffix(r"\\").strip().split(" & ") for line in lines if line.endswith(r"\\")]
    plain = [[c.strip("$").replace(r"\pm", "±").replace("\\", "") for c in row] for row in body]
    return plain


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex"])
@pytest.mark.parametrize("everything", [(), ("--all",)], ids=["compact", "all"])
def test_formats_agree_with_csv(write, call, form, everything):
    paths = [write(TWO), write(hand_made({0: [20.0, 10.0], 1: [26.4, 31.0]}, name="a_b|50%")), write(DIVERGED)]
    exact = list(csv.reader(io.StringIO(call(*paths, *everything, "--format", "csv").out)))
    header, *rows = cells_of(call(*paths, *everything, "--format", form).out, form)
    assert len(rows) == 3 and {len(row) for row in rows} == {len(header)}
    keys = exact[0]
    for row, truth in zip(rows, exact[1:], strict=True):
        values = iter(zip(keys, truth, strict=True))
        for cell in row:
            for part in cell.split(" ± ") if " ± " in cell else [cell]:
                key, value = next(values)
                agrees(part, value, key)
            if cell == "-" and f"{key}_se" in keys:
                assert next(values)[1] == ""
        assert next(values, None) is None


def agrees(part, value, key):
    if value == "" or key == "run":
        assert part == (value or "-"), key
    else:
        assert float(part) == pytest.approx(float(value), abs=0.5 * 10.0 ** -len(part.partition(".")[2]) + 1e-9), key


def test_a_table_wider_than_the_terminal_is_split_into_blocks():
    table = Table([Column("run", "run"), *(Column(c, c * 8, ".1f") for c in "abc")], [["r", 1.0, 2.0, 3.0]])
    assert terminal(table, width=24).splitlines() == [
        "run  aaaaaaaa  bbbbbbbb",
        "---  --------  --------",
        "r         1.0       2.0",
        "",
        "run  cccccccc",
        "---  --------",
        "r         3.0",
    ]
    assert len(terminal(table).splitlines()) == 3 and len(terminal(table, width=1).split("\n\n")) == 3


def test_the_standard_error_decides_the_decimals():
    assert cell_text(Estimate(-1.29964, 0.49157, 10), ".4g") == "-1.300 ± 0.492"
    assert cell_text(Estimate(1234.5, 123.4, 10), ".4g") == "1234 ± 123"
    assert cell_text(Estimate(0.0, 0.0, 10), ".4g") == "0 ± 0"


def test_output_goes_to_a_file(write, call, tmp_path, refused):
    path = write(TWO)
    out, _ = call(path, "--output", tmp_path / "table.txt")
    assert out == "" and (tmp_path / "table.txt").read_text() == call(path).out
    assert "No such file" in refused(path, "--output", tmp_path / "nowhere" / "table.txt")


def test_runs_of_one_name_keep_apart(write, call):
    paths = [write(TWO), write(TWO)]
    assert [r["run"] for r in csv_rows(call(*paths, "--format", "csv").out)] == [f"exp ({p})" for p in paths]


def test_files_that_are_no_results(tmp_path, write, refused):
    file = tmp_path / "metrics.json"
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no metrics.json" in refused(tmp_path / "empty")
    assert f"{tmp_path / 'x.json'} does not exist" in refused(tmp_path / "x.json")
    for content, message in {
        '{"schema": 1,': "is not JSON",
        "[1]": "holds a JSON list",
        '{"psnr": [20.0], "best": 3}': "(an older version or the research fork); this tool reads schema 1",
        '{"schema": 2}': "has schema 2; this tool reads schema 1",
        '{"schema": "1"}': "has schema '1'",
        '{"schema": 1}': "does not follow it (KeyError: 'metadata')",
    }.items():
        file.write_text(content)
        said = refused(file)
        assert str(file) in said and message in said
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refused(tmp_path)
    assert "is not JSON" in refused(write(TWO), tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["psnr"]["per_image"][0].update(best="20"),
        lambda m: m["timing"]["per_image_seconds"].pop(),
        lambda m: m["measurement"]["per_image"].pop(),
        lambda m: m.update(timing=None),
        lambda m: m["psnr"].update(per_image=3),
    ],
)
def test_files_that_break_their_schema(write, refused, spoil):
    metrics = copy.deepcopy(TWO)
    spoil(metrics)
    assert "says schema 1 but does not follow it" in refused(write(metrics))


def test_reading_is_an_ordinary_function(tmp_path):
    with pytest.raises(ResultsError, match="does not exist"):
        read_metrics.read_run(tmp_path / "no")
