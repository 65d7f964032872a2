import copy
import math
import re

import pytest
from hand_made_results import DIVERGED, TWO, csv_rows, hand_made, metric


def halves():
    first = hand_made({0: [20.0, 10.0]}, name="exp_10", iterations=[1, 2], distances={0: [1.0, 2.0]})
    second = hand_made({7: [26.0, 30.0]}, name="exp_90", iterations=[5, 6], distances={7: [3.0, 6.0]}, seconds=8.0)
    second["vram"]["optimization_peak_mb"] = 1000.0
    return first, second


def test_a_join_is_the_run_over_both(write, call):
    first, second = halves()
    whole = hand_made({0: [20.0, 10.0], 7: [26.0, 30.0]}, iterations=[1, 2], distances={0: [1.0, 2.0], 7: [3.0, 6.0]})
    joined = f"{write(second)}/,{write(first)}/metrics.json"
    (got,) = csv_rows(call("--join", joined, "--all", "--format", "csv").out)
    (expected,) = csv_rows(call(write(whole), "--all", "--format", "csv").out)
    different = {
        "run": "exp_90+exp_10",
        "seconds_per_image": 6,
        "seconds_per_image_se": 2,
        "optimization_iterations": 14,
    }
    different |= {"peak_vram_mb": 1000, "optimization_peak_vram_mb": 1000}
    different |= {"pre_optimization_seconds": 12, "pre_optimization_steps": 16}
    different |= {"optimization_seconds": 4, "optimization_steps": 4}
    assert got == pytest.approx(expected | different)


def test_a_metric_that_one_part_lacks_is_left_out(write, call):
    first, second = halves()
    for key in ("lpips", "lpips_aligned"):
        first[key] = metric([(0, [0.2, 0.4])], lower=True)
    alone, other = write(first), write(second)
    assert csv_rows(call(alone, "--format", "csv").out)[0]["lpips_aligned_best"] == 0.2
    assert csv_rows(call("--join", f"{alone},{other}", "--format", "csv").out)[0]["lpips_aligned_best"] is None


def test_joins_that_are_no_run_are_refused(write, refused):
    first, second = halves()
    a = write(first)
    assert re.search(r"cannot join .* both hold image 0", refused("--join", f"{a},{write(first)}"))
    second["metadata"]["config_sha256"] = "b" * 64
    assert "config_sha256 aaaaaaaa and bbbbbbbb" in refused("--join", f"{a},{write(second)}")
    assert "give --join" in refused(f"{a},{write(first)}")
    assert "names no run" in refused("--join", ",")


def differences(text):
    return {(row["run"], row["quantity"]): row for row in csv_rows(text)}


def test_paired_differences(write, call):
    first = hand_made({0: [10.0, 8.0], 1: [20.0, 16.0], 2: [30.0, 20.0], 5: [99.0, 99.0]}, name="A")
    other = hand_made({0: [11.0, 9.0], 1: [22.0, 18.0], 2: [33.0, 23.0], 9: [1.0, 1.0]}, name="B")
    third = hand_made({1: [17.0, 21.0]}, name="C", seconds=6.0, losses=(74.0, 71.5))
    out, err = call("--compare", write(first), write(other), write(third), "--format", "csv")
    rows = differences(out)
    best = rows["B", "PSNR aligned best [dB]"]  # 1, 2, 3
    assert (best["against"], best["first_mean"], best["run_mean"], best["images"]) == ("A", 21, 23, 3)
    assert (best["difference"], best["difference_se"]) == (2, pytest.approx(math.sqrt(1 / 3)))
    unpaired = math.sqrt((100 + 121) / 3)
    assert best["difference_se"] < unpaired / 10
    assert rows["B", "SSIM aligned best"]["difference"] == pytest.approx(0.02)
    assert rows["B", "success rate"]["difference"] == 0
    assert rows["B", "final loss, lowest"]["difference"] == 0
    expected = {
        "PSNR aligned mean [dB]": 1.0,  # 19 against 18
        "PSNR raw best [dB]": 1.0,  # 21 against 20
        "PSNR raw mean [dB]": 1.0,
        "PSNR raw selected [dB]": -3.0,  # the first particle: 17 against 20
        "particle success rate": 0.0,  # one of two in both
        "coverage": 0.0,
        "final loss, lowest": -3.5,  # 71.5 against 75
        "seconds an image, ratio": 1.5,
    }
    assert {q: rows["C", q]["difference"] for q in expected} == pytest.approx(expected)
    assert rows["C", "coverage"]["difference_se"] is None and rows["C", "coverage"]["images"] == 1
    assert "B against A: left out image 5, only in" in err and "B against A: left out image 9, only in" in err
    assert "C against A: left out images 0, 2, 5, only in" in err
    assert "1.5 ± -" in call("--compare", write(first), write(third)).out


def test_a_diverged_image_is_compared_by_success_only(write, call):
    whole = hand_made({0: [20.0, 10.0], 1: [19.0, 19.0], 2: [26.0, 30.0]}, name="whole")
    out, err = call("--compare", write(whole), write(DIVERGED), "--format", "csv")
    rows = differences(out)
    assert (rows["hurt", "PSNR raw best [dB]"]["images"], rows["hurt", "PSNR raw best [dB]"]["difference"]) == (2, 0)
    assert rows["hurt", "success rate"]["difference"] == pytest.approx(-1 / 3)
    assert rows["hurt", "final loss, lowest"]["images"] == 2
    assert "image 1 diverged in" in err


def test_without_truth_the_loss_is_still_compared(write, call):
    rows = differences(call("--compare", write(TWO), write(hand_made({0: [1.0]}, "B", False)), "--format", "csv").out)
    assert (rows["B", "PSNR raw best [dB]"]["images"], rows["B", "PSNR raw best [dB]"]["difference"]) == (0, None)
    assert rows["B", "final loss, lowest"]["difference"] == 0


CHANGES = {
    "noise_sigma is 0.1 there and 0.05": lambda m: m["metadata"]["conventions"].update(noise_sigma=0.1),
    "oversample": lambda m: m["metadata"]["conventions"].update(oversample=4.0),
    "measurement_range": lambda m: m["metadata"]["conventions"].update(measurement_range="signed"),
    "seed is 1 there and 42": lambda m: m["metadata"].update(seed=1),
    "of image 1 the mean of y": lambda m: m["measurement"]["per_image"][1]["fingerprint"].__setitem__(0, 1.0701),
    "of image 1 the noise floor": lambda m: m["measurement"]["per_image"][1].update(noise_floor=71.01),
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_measurements_are_not_compared(write, refused, message):
    changed = copy.deepcopy(TWO)
    changed["metadata"]["name"] = "other"
    CHANGES[message](changed)
    said = refused("--compare", write(TWO), write(changed))
    assert "cannot pair other with exp: " in said and message in said


def test_comparisons_of_nothing_are_refused(write, refused):
    a = write(TWO)
    assert "no image in common" in refused("--compare", a, write(hand_made({5: [1.0, 2.0]})))
    assert "two runs or more" in refused("--compare", a)


def test_files_without_fingerprints_are_compared_with_a_warning(write, call):
    older = copy.deepcopy(TWO)
    for row in older["measurement"]["per_image"]:
        del row["fingerprint"]
    assert "images 0-1 matched by noise floor only" in call("--compare", write(TWO), write(older)).err
