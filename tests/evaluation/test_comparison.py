import math

import pytest

from particledaps.reports.comparison import (
    ComparisonError,
    Estimate,
    Fingerprint,
    Measurements,
    common_images,
    estimate,
    paired_difference,
    paired_ratio,
    partners,
    without_fingerprint,
)

CONDITIONS = {"noise_sigma": 0.05, "oversample": 2.0, "measurement_range": "unit", "seed": 42}


def measurements(name="a", images=(0, 1, 2), mean_rms=(0.07, 0.43), floor=70.0, **changed):
    return Measurements(name, CONDITIONS | changed, {i: Fingerprint(mean_rms, floor + i) for i in images})


def test_standard_error_is_the_sample_deviation_over_sqrt_n():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, variance 14 / 2 = 7, standard error sqrt(7 / 3)
    assert estimate([1.0, 2.0, 6.0]) == Estimate(3.0, pytest.approx(math.sqrt(7 / 3)), 3)


def test_missing_values_do_not_count():
    assert estimate([1.0, None, 3.0]) == Estimate(2.0, pytest.approx(1.0), 2)
    assert estimate([5.0, None]) == Estimate(5.0, None, 1)
    assert estimate([None]) == estimate([]) == Estimate(None, None, 0)


def test_pairing_removes_what_images_share():
    first, other = {0: 10.0, 1: 20.0, 2: 30.0}, {0: 11.0, 1: 22.0, 2: 33.0}
    # differences 1, 2, 3: variance 1, standard error sqrt(1 / 3); each run alone has 10 and 11 times that
    paired = paired_difference(first, other)
    assert paired == Estimate(2.0, pytest.approx(math.sqrt(1 / 3)), 3)
    unpaired = math.hypot(estimate(first.values()).standard_error, estimate(other.values()).standard_error)
    assert unpaired == pytest.approx(math.sqrt((100 + 121) / 3))
    assert unpaired > 10 * paired.standard_error


def test_only_images_with_both_values_are_paired_whatever_their_order():
    first, other = {3: 1.0, 1: 2.0, 0: None, 5: 9.0}, {0: 4.0, 1: 5.0, 3: 2.0, 6: 7.0}
    assert paired_difference(first, other) == Estimate(2.0, pytest.approx(1.0), 2)  # 5 - 2 and 2 - 1
    assert paired_difference(other, first).mean == -2.0
    assert paired_difference({0: None}, {0: 1.0}) == Estimate(None, None, 0)


def test_ratio_is_the_mean_of_ratios():
    assert paired_ratio({0: 2.0, 1: 4.0, 2: 0.0}, {0: 1.0, 1: 6.0, 2: 1.0}) == Estimate(1.0, pytest.approx(0.5), 2)


def test_common_images_of_equal_measurements():
    assert common_images(measurements(images=(0, 1, 2)), measurements("b", images=(4, 2, 1))) == [1, 2]
    assert common_images(measurements(), measurements("b", mean_rms=(0.07 * (1 + 5e-6), 0.43))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise_sigma": 0.1}, "cannot pair b with a: noise_sigma is 0.1 there and 0.05 in a"),
        ({"oversample": 4.0}, "oversample is 4.0"),
        ({"measurement_range": "signed"}, "measurement_range is 'signed'"),
        ({"seed": 7}, "seed is 7 there and 42 in a"),
        ({"noise_sigma": None}, "noise_sigma is None"),
        ({"images": (3, 4)}, "no image in common"),
        ({"mean_rms": (0.07 * (1 + 2e-5), 0.43)}, "of image 0 the mean of y differs"),
        ({"mean_rms": (0.07, 0.44)}, r"of image 0 the root mean square of y differs \(0.44 against 0.43\)"),
        ({"floor": 70.01}, r"of image 0 the noise floor differs \(70.01 against 70\)"),
    ],
)
def test_other_measurements_are_refused(changed, message):
    with pytest.raises(ComparisonError, match=message):
        common_images(measurements(), measurements("b", **changed))


def test_without_a_fingerprint_the_floor_decides():
    first, other = measurements(), measurements("b", images=(1, 2), mean_rms=None)
    assert common_images(first, other) == [1, 2]
    assert without_fingerprint(first, other) == without_fingerprint(other, first) == [1, 2]
    assert without_fingerprint(first, first) == []
    with pytest.raises(ComparisonError, match="noise floor"):
        common_images(first, measurements("b", mean_rms=None, floor=71.0))


def named(run, *rows):
    """Measurements of ``(id, name, mean of y)``."""
    found = {i: Fingerprint((mean, 0.43), 70.0) for i, _, mean in rows}
    return Measurements(run, CONDITIONS, found, {i: name for i, name, _ in rows if name is not None})


def test_images_pair_by_the_names_of_their_inputs():
    first, other = named("a", (0, "b", 0.1), (1, "d", 0.2)), named("b", (0, "a", 0.5), (1, "b", 0.1), (2, "d", 0.2))
    assert partners(first, other) == {1: 0, 2: 1} and common_images(first, other) == [0, 1]
    assert partners(other, first) == {0: 1, 1: 2}


def test_one_name_with_two_measurements_is_no_pair():
    with pytest.raises(ComparisonError, match=r"of image 0 \(b\) the mean of y differs \(0\.3 against 0\.1\)"):
        common_images(named("a", (0, "b", 0.1)), named("b", (1, "b", 0.3)))


def test_another_name_under_one_id_is_another_image_unless_the_measurement_is_the_same():
    first = named("a", (0, "b", 0.1), (1, "d", 0.2))
    assert partners(first, named("b", (0, "a", 0.5), (1, "d", 0.2))) == {1: 1}
    assert partners(first, named("b", (0, "test_00000", 0.1))) == {0: 0}  # one data set, as folder and as archive


def test_runs_without_names_pair_by_id():
    first = named("a", (0, None, 0.1), (1, None, 0.2))
    assert partners(first, named("b", (1, "d", 0.2), (2, "x", 0.1))) == {1: 1}
