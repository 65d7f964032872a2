"""Entries of y that were not measured: loss, gradient, floor and halves are those of the others, for every operator."""

import pytest
import torch
from analytic import F64, normal
from every_operator import CLOSED_FORM, SHAPE, bound, code, generator, images, tiny_network
from test_deepinv_adapter import Rows, Squares

from particledaps.operators.deepinv_adapter import from_physics
from particledaps.operators.inpainting import RandomInpainting
from particledaps.operators.measured import MeasuredPart, leave_out, with_gaps
from particledaps.operators.measured_phase_retrieval import MeasuredPhaseRetrieval
from particledaps.operators.nonlinear_blur import NonlinearBlur
from particledaps.operators.operator import CLEAR, LinearOperator, Operator
from particledaps.operators.phase_retrieval import PhaseRetrieval, mirror_frequencies

SIGMA = 0.05


class Shear(LinearOperator):
    """A custom linear operator whose measurement is no image: differences of neighbours, in a row."""

    name, noise_sigma = "shear", SIGMA

    def __call__(self, x):
        return (x[..., 1:] - x[..., :-1]).flatten(1)

    def adjoint(self, y, image_shape):
        y = y.reshape(len(y), *image_shape[:2], image_shape[2] - 1)
        return torch.nn.functional.pad(y, (1, 0)) - torch.nn.functional.pad(y, (0, 1))

    def measurement_shape(self, image_shape):
        return (image_shape[0] * image_shape[1] * (image_shape[2] - 1),)


class Cube(Operator):
    """A custom nonlinear operator with what the base class gives."""

    name, noise_sigma = "cube", SIGMA

    def __call__(self, x):
        return x**3

    def measurement_shape(self, image_shape):
        return image_shape


def blurred():
    network = tiny_network()
    return NonlinearBlur(network, code(network))


EVEN = (3, 16, 12)
OPERATORS = {name: (lambda make=make: bound(make)) for name, make in CLOSED_FORM.items()} | {
    "phase_retrieval": PhaseRetrieval,
    "nonlinear_blur": blurred,
    "deepinv_linear": lambda: from_physics(Rows(), SIGMA),
    "deepinv_nonlinear": lambda: from_physics(Squares(), SIGMA),
    "custom_linear": Shear,
    "custom_nonlinear": Cube,
}
SHAPES = {"deepinv_linear": (3, 6, 5), "nonlinear_blur": EVEN}
each = pytest.mark.parametrize("name", OPERATORS)


def with_gaps_at(name, count=1, share=0.3, seed=9):
    """The plain operator, images, y, what of it was measured, and the operator and y that know the gaps."""
    operator, shape = OPERATORS[name](), SHAPES.get(name, SHAPE)
    x = images(count, shape)
    y = operator.measure(images(1, shape, seed=2), generator(1))
    measured = torch.rand(y.shape[1:], generator=generator(seed)) > share
    own, given = leave_out(operator, torch.where(measured, y[0], torch.nan))
    return operator, x, y, measured, own, given[None]


def plain_loss(operator, x, y, measured):
    return ((operator(x) - y).square() * measured).flatten(1).sum(1)


@each
def test_loss_is_the_sum_over_measured_entries(name):
    operator, x, y, measured, own, given = with_gaps_at(name, count=3)
    assert given.isfinite().all() and 0 < measured.sum() < measured.numel()
    expected = plain_loss(operator, x, y, measured)
    torch.testing.assert_close(own.loss(x, given), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own.objective(given.expand(3, *given.shape[1:]))(x)[0], expected, rtol=1e-9, atol=1e-9)
    assert (operator.loss(x, given) - expected).abs().min() > 1e-3


@each
def test_gradient_is_that_of_the_sum_over_measured_entries(name):
    operator, x, y, measured, own, given = with_gaps_at(name, count=2)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(plain_loss(operator, leaf, y, measured).sum(), leaf)
    both = given.expand(2, *given.shape[1:])
    torch.testing.assert_close(own.objective(both)(x)[1], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(Operator.objective(own, both)(x)[1], expected, rtol=1e-7, atol=1e-9)


@each
def test_gradient_against_finite_differences(name):
    _, x, _, _, own, given = with_gaps_at(name)
    direction, step = normal(*x.shape, seed=3), 1e-8 if name == "nonlinear_blur" else 1e-6  # its ReLUs have kinks
    ahead, behind = (own.objective(given)(x + s * direction)[0] for s in (step, -step))
    expected = (own.objective(given)(x)[1] * direction).sum().item()
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(expected, rel=1e-5)


@each
def test_single_precision(name):
    """Gaps cost no accuracy: the loss agrees with the plain sum to 1e-5."""
    operator, x, y, measured, own, given = with_gaps_at(name, count=2)
    expected = plain_loss(operator, x.float(), y.float(), measured)
    found = own.objective(given.float().expand(2, *given.shape[1:]))(x.float())
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@each
def test_what_stands_in_a_gap_changes_nothing(name):
    _, x, _, measured, own, given = with_gaps_at(name, count=2)
    absurd = torch.where(measured, given, 1e6)

    def everything(y):
        both = y.expand(2, *y.shape[1:])
        sigma = own.estimated_noise_sigma(y)
        seen = own.loss(x, y), *own.objective(both)(x), own.high_snr_loss(x, y), *own.noise_floor(y)
        return (*seen, *([] if sigma is None else [sigma]), *(own.split(y) or []))

    for one, other in zip(everything(given), everything(absurd), strict=True):
        assert torch.equal(one, other)


@each
def test_noise_floor_is_the_loss_at_the_truth(name):
    operator, _, _, measured, own, _ = with_gaps_at(name)
    count, x = 1000, images(1, SHAPES.get(name, SHAPE))
    clean = operator(x)
    y = clean + SIGMA * torch.randn((count, *clean.shape[1:]), generator=generator(4), dtype=clean.dtype)
    floor = own.noise_floor(y)
    excess = own.loss(x, y) - floor.mean  # A(x) is computed once
    assert floor.mean.shape == floor.std.shape == (count,)
    assert excess.mean().abs() < 4 * excess.std() / count**0.5
    assert excess.std().item() == pytest.approx(floor.std[0].item(), rel=0.12)
    assert floor.mean.mean().item() == pytest.approx(measured.sum().item() * SIGMA**2, rel=0.03)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "phase_retrieval"])  # of pairs: see below
def test_high_snr_loss_counts_measured_entries_that_stand_clear(name):
    operator, x, y, measured, own, given = with_gaps_at(name)
    clear = y.abs() > CLEAR * SIGMA
    expected = plain_loss(operator, x, y, measured & clear)
    torch.testing.assert_close(own.high_snr_loss(x, given), expected, rtol=1e-9, atol=1e-9)


@each
def test_without_gaps_operator_and_measurement_are_what_they_were(name):
    operator = OPERATORS[name]()
    y = operator.measure(images(1, SHAPES.get(name, SHAPE)), generator())[0]
    own, given = leave_out(operator, y)
    assert own is operator and given is y and with_gaps(operator, y) is y


@each
def test_gaps_come_back_for_files_and_pictures(name):
    _, _, y, measured, own, given = with_gaps_at(name)
    assert torch.equal(with_gaps(own, given).isnan()[0], ~measured)
    assert torch.equal(with_gaps(own, given)[0][measured], y[0][measured])
    again, once_more = leave_out(OPERATORS[name](), with_gaps(own, given)[0])
    assert torch.equal(once_more, given[0]) and torch.equal(again.measured, measured)


@each
def test_what_else_an_operator_knows_stays(name):
    operator, x, _, _, own, _ = with_gaps_at(name)
    assert (own.name, own.noise_sigma, own.image_like) == (operator.name, operator.noise_sigma, operator.image_like)
    assert torch.equal(own(x), operator(x))
    assert own.measurement_shape(tuple(x.shape[1:])) == operator.measurement_shape(tuple(x.shape[1:]))
    assert [s.name for s in own.symmetries()] == [s.name for s in operator.symmetries()]
    assert len(own.channel_symmetries(3)) == len(operator.channel_symmetries(3))
    assert own.part_name == operator.part_name and (own.part is None) == (operator.part is None)


def test_nothing_measured_is_refused():
    for operator in (PhaseRetrieval(), Cube()):
        with pytest.raises(ValueError, match="no entry of the measurement was measured"):
            leave_out(operator, torch.full(operator.measurement_shape((1, 8, 8)), torch.nan))


def test_another_part_keeps_the_gaps():
    operator, _, y, measured, own, given = with_gaps_at("inpainting_rand")
    other = own.with_part(1 - operator.part)
    x = images(1, SHAPE)
    torch.testing.assert_close(other.loss(x, given), plain_loss(operator.with_part(1 - operator.part), x, y, measured))


def test_unseen_pixels_that_were_not_measured_hold_no_noise():
    """The mask of inpainting tells pixels; a gap tells entries. The floor counts each entry once."""
    operator = RandomInpainting(0.5, 0.6).for_image(SHAPE, generator(3))
    y = operator.measure(images(1, SHAPE), generator(1))[0]
    measured = torch.rand(SHAPE, generator=generator(9)) > 0.4
    own, given = leave_out(operator, torch.where(measured, y, torch.nan))
    seen = operator.part.bool()
    unseen = y[measured & ~seen].square()
    floor = own.noise_floor(given[None])
    assert floor.mean.item() == pytest.approx(((measured & seen).sum() * SIGMA**2 + unseen.sum()).item())
    assert floor.std.item() == pytest.approx(SIGMA**2 * (2 * (measured & seen).sum().item()) ** 0.5)
    assert own.estimated_noise_sigma(given[None]).item() == pytest.approx(unseen.mean().sqrt().item())
    assert own.pseudo_inverse(given[None], SHAPE)[0][~(measured & seen)].abs().max() == 0
    assert leave_out(operator, torch.where(seen, y, torch.nan))[0].estimated_noise_sigma(given[None]) is None


PLANES = {"even": (3, 8, 8), "odd": (1, 9, 7), "even_by_odd": (3, 8, 5), "odd_by_even": (1, 5, 12)}
each_plane = pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)


def dead_lines(plane):
    measured = torch.ones(plane, dtype=bool)
    measured[..., 1:3, :] = False
    measured[..., plane[-1] // 2 + 1] = False
    return measured


def beam_stop(plane):
    measured = torch.ones(plane, dtype=bool)
    measured[..., plane[-2] // 2 - 1 : plane[-2] // 2 + 2, plane[-1] // 2 - 1 : plane[-1] // 2 + 2] = False
    return measured


def half_covered(plane):
    """No pair is measured twice: one entry of each, and the self-conjugate ones."""
    index = torch.arange(plane[-2] * plane[-1]).reshape(plane[-2:])
    first = torch.fft.fftshift(index <= mirror_frequencies(index), dim=(-2, -1))
    return first.expand(plane).clone()


def one_dead_entry_in_one_channel(plane):
    measured = torch.ones(plane, dtype=bool)
    measured[0, 1, 2] = False
    return measured


def scattered(plane):
    return torch.rand(plane, generator=generator(7)) > 0.5


GAPS = [dead_lines, beam_stop, half_covered, one_dead_entry_in_one_channel, scattered]
each_gap = pytest.mark.parametrize("gap", GAPS, ids=lambda g: g.__name__)


def phase(shape, gap, count=1, seed=2):
    operator = PhaseRetrieval(noise_sigma=SIGMA)
    x = images(1, shape, seed=seed)
    y = operator.measure(x.expand(count, *shape), generator(1))
    measured = gap(y.shape[1:])
    return operator, x, y, measured, MeasuredPhaseRetrieval(operator, measured)


def counts(measured):
    """How often each entry's pair was measured, and which entries are their own conjugates, on the centred plane."""
    index = torch.arange(measured[0].numel()).reshape(measured.shape[-2:])
    corner = torch.fft.ifftshift(measured, dim=(-2, -1))
    count = corner.long() + mirror_frequencies(corner).long()
    alone = (index == mirror_frequencies(index)).expand(measured.shape)
    return (*(torch.fft.fftshift(a, dim=(-2, -1)) for a in (count, alone)),)


@each_plane
@each_gap
def test_phase_retrieval_with_any_gaps(shape, gap):
    operator, _, y, measured, own = phase(shape, gap)
    x = images(3, shape).requires_grad_(True)
    expected = plain_loss(operator, x, y, measured)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    found = own.objective(y.expand(3, *y.shape[1:]))(x.detach())
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own.loss(x, y), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], gradient, rtol=1e-9, atol=1e-9)
    for symmetry in (*own.symmetries(), *own.channel_symmetries(shape[0])):
        torch.testing.assert_close(own.loss(symmetry.apply(x), y), expected, rtol=1e-9, atol=1e-9)


@each_plane
@each_gap
def test_the_floor_of_phase_retrieval_reads_off_the_pairs_that_were_measured_twice(shape, gap):
    operator, x, y, measured, own = phase(shape, gap, count=2000)
    count, alone = counts(measured)
    half = (count > 0)[~alone].sum().item() / 2 + (count > 0)[alone].sum().item()
    floor = own.noise_floor(y)
    assert floor.std[0].item() == pytest.approx(SIGMA**2 * (2 * half) ** 0.5)
    excess = own.loss(x.expand(len(y), *shape), y) - floor.mean
    assert excess.mean().abs() < 4 * excess.std() / len(y) ** 0.5
    assert excess.std().item() == pytest.approx(floor.std[0].item(), rel=0.1)


@each_plane
@each_gap
def test_pairs_that_were_measured_twice_reveal_the_noise(shape, gap):
    _, _, y, measured, own = phase(shape, gap, count=4000)
    count, alone = counts(measured)
    twice = (count == 2)[~alone].sum().item() // 2
    found = own.estimated_noise_sigma(y)
    if gap is half_covered:
        assert twice == 0 and found is None and not own.can_split
        return
    assert own.can_split and own.pairs == twice > 0
    assert found.square().mean().item() == pytest.approx(SIGMA**2, abs=4 * SIGMA**2 * (2 / twice / 4000) ** 0.5)


@each_plane
@each_gap
def test_halves_hold_each_second_reading_once_and_the_floor_is_their_loss(shape, gap):
    operator, x, y, measured, own = phase(shape, gap, count=2000)
    count, alone = counts(measured)
    fit, held, floor = own.split(y)
    twice, once = (count == 2) & ~alone, (count == 1) | ((count == 2) & alone)
    assert torch.equal(fit[:, once], held[:, once])
    assert not (fit == held)[:, twice].any()
    for copy in (fit, held):
        assert torch.equal(
            copy, torch.fft.fftshift(mirror_frequencies(torch.fft.ifftshift(copy, dim=(-2, -1))), dim=(-2, -1))
        )
        assert own.half_plane(copy).pair_loss.abs().max() == 0
        excess = own.loss(x.expand(len(y), *shape), copy) - floor
        assert excess.mean().abs() < 4 * excess.std() / len(y) ** 0.5
    noise = ((fit - operator(x)) * (held - operator(x)) / SIGMA**2).mean(0)
    assert noise[twice].abs().max() < 5 * len(y) ** -0.5 if twice.any() else gap is half_covered


@each_plane
def test_a_plane_without_gaps_gives_what_phase_retrieval_gives(shape):
    operator, _, y, _, own = phase(shape, lambda plane: torch.ones(plane, dtype=bool), count=2)
    x = images(2, shape)
    assert torch.equal(own.loss(x, y), operator.loss(x, y))
    torch.testing.assert_close(own.objective(y)(x), operator.objective(y)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.high_snr_loss(x, y), operator.high_snr_loss(x, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.noise_floor(y), operator.noise_floor(y), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.estimated_noise_sigma(y), operator.estimated_noise_sigma(y), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.split(y), operator.split(y), rtol=1e-12, atol=0)


@each_plane
def test_a_gap_takes_the_reading_of_its_conjugate_where_there_is_one(shape):
    operator, _, y, measured, own = phase(shape, scattered)
    count, alone = counts(measured)
    filled, turned = (
        own.fill(y),
        torch.fft.fftshift(mirror_frequencies(torch.fft.ifftshift(y, dim=(-2, -1))), dim=(-2, -1)),
    )
    assert torch.equal(filled[:, measured], y[:, measured])
    assert torch.equal(filled[:, ~measured & (count == 1)], turned[:, ~measured & (count == 1)])
    assert (filled[:, count == 0] == 0).all() and (count == 0).any()


@each_plane
@each_gap
def test_high_snr_of_pairs(shape, gap):
    """A mean of two entries stands clear at less than a single entry does."""
    operator, _, y, measured, own = phase(shape, gap)
    x, (count, _) = images(2, shape), counts(measured)
    values = torch.where(measured, y, 0)
    turned = torch.fft.fftshift(mirror_frequencies(torch.fft.ifftshift(values, dim=(-2, -1))), dim=(-2, -1))
    mean = (values + turned) / count.clamp(min=1)
    clear = mean > CLEAR * SIGMA / count.clamp(min=1).to(F64).sqrt()
    expected = (measured * clear * (operator(x) - mean).square()).sum((1, 2, 3))
    torch.testing.assert_close(own.high_snr_loss(x, y), expected, rtol=1e-9, atol=1e-9)


def test_an_operator_that_builds_on_phase_retrieval_is_left_to_the_general_case():
    class Brighter(PhaseRetrieval):
        def __call__(self, x):
            return 2 * super().__call__(x)

        def loss(self, x, y):
            return Operator.loss(self, x, y)

    y = Brighter().measure(images(1, (1, 8, 8)), generator())[0]
    y[0, 2] = torch.nan
    own, given = leave_out(Brighter(), y)
    assert type(own) is MeasuredPart
    x = images(1, (1, 8, 8), seed=5)
    expected = ((2 * PhaseRetrieval()(x) - y).square()).nansum()
    assert own.loss(x, given[None]).item() == pytest.approx(expected.item())
