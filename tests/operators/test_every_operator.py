"""What holds for each operator: gradient, adjoint, batch, noise floor, immutability."""

import pytest
import torch
from analytic import F64, normal
from every_operator import CLOSED_FORM, LINEAR, SHAPE, bound, generator, images

from particledaps.operators.operator import Operator

each = pytest.mark.parametrize("make", CLOSED_FORM.values(), ids=CLOSED_FORM)
each_linear = pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)


def measured(operator, x, seed=1):
    return operator.measure(x, generator(seed))


@each
def test_measurement_has_the_promised_shape(make):
    for shape in (SHAPE, (1, 16, 16), (3, 12, 17)):
        operator = bound(make, shape)
        assert operator(images(2, shape)).shape == (2, *operator.measurement_shape(shape))


@each
def test_gradient_against_finite_differences(make):
    operator, x, step = bound(make), images(1), 1e-6
    y, direction = measured(operator, images(1, seed=2)), normal(1, *SHAPE, seed=3)
    gradient = operator.objective(y)(x)[1]
    ahead, behind = (operator.loss(x + s * direction, y) for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


@each
def test_objective_is_loss_and_its_automatic_gradient(make):
    operator, x = bound(make), images(3)
    y = measured(operator, images(3, seed=2))
    loss, gradient = operator.objective(y)(x)
    torch.testing.assert_close(loss, (operator(x) - y).square().sum((1, 2, 3)))
    torch.testing.assert_close((loss, gradient), Operator.objective(operator, y)(x))
    assert not loss.requires_grad and not gradient.requires_grad


@each_linear
def test_adjoint(make):
    operator, x = bound(make), images(2)
    y = normal(*operator(x).shape, seed=5)
    left, right = (operator(x) * y).sum(), (x * operator.adjoint(y, SHAPE)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-12)


@each_linear
def test_linearity(make):
    operator, a, b = bound(make), images(1), images(1, seed=1)
    torch.testing.assert_close(operator(2 * a - 3 * b), 2 * operator(a) - 3 * operator(b))


@each
def test_batch_is_a_loop_over_single_images(make):
    operator, x = bound(make), images(4)
    y = measured(operator, images(4, seed=2))

    def everything(x, y):
        floor, plain = operator.noise_floor(y), operator.pseudo_inverse(y, SHAPE)
        return operator(x), operator.loss(x, y), *operator.objective(y)(x), *floor, plain

    together = everything(x, y)
    for row in range(4):
        alone = everything(x[row : row + 1], y[row : row + 1])
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[row : row + 1], single, rtol=1e-12, atol=1e-12)


@each
def test_noise_floor_is_the_loss_at_the_truth(make):
    count, operator = 1000, bound(make)
    x = images(1).expand(count, *SHAPE)
    y = measured(operator, x)
    floor = operator.noise_floor(y)
    assert floor.mean.shape == floor.std.shape == (count,)
    excess = operator.loss(x, y) - floor.mean
    assert excess.mean().abs() < 4 * excess.std() / count**0.5
    assert excess.std().item() == pytest.approx(floor.std[0].item(), rel=0.12)
    assert floor.mean.mean().item() == pytest.approx(y[0].numel() * 0.05**2, rel=0.03)


@each
def test_noise_is_white_with_the_stated_level_and_hangs_on_the_generator_only(make):
    operator, x = bound(make, (3, 48, 48)), images(1, (3, 48, 48))
    torch.manual_seed(1)
    noise = (measured(operator, x, seed=5) - operator(x)) / operator.noise_sigma
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=4 * (0.5 / noise.numel()) ** 0.5)
    torch.manual_seed(2)
    assert torch.equal(measured(operator, x, seed=5), measured(operator, x, seed=5))
    assert not torch.equal(measured(operator, x, seed=5), measured(operator, x, seed=6))


@each
def test_single_and_double_precision_agree(make):
    operator, x = bound(make), images(2)
    assert operator(x.float()).dtype == torch.float32
    torch.testing.assert_close(operator(x.float()), operator(x).float(), rtol=1e-4, atol=1e-5)


@each
def test_operators_stay_as_they_were_built(make):
    described = make()
    one, two = (described.for_image(SHAPE, generator(seed)) for seed in (0, 1))
    x = images(1)
    before = one(x)
    two(x), one.objective(before)(x), described.for_image((3, 32, 32), generator())(images(1, (3, 32, 32)))
    assert torch.equal(one(x), before)
    assert described.part is None


@each
def test_the_only_ambiguity_is_the_identity(make):
    assert [s.name for s in make().symmetries()] == ["identity"]


@each
def test_two_processes_draw_the_same_operator(make):
    x, keep = images(1), torch.get_rng_state()
    assert torch.equal(bound(make, seed=3)(x), bound(make, seed=3)(x))
    assert torch.equal(torch.get_rng_state(), keep)


@pytest.mark.parametrize("name", ["motion_blur", "inpainting", "inpainting_rand"])
def test_another_generator_draws_another_operator(name):
    x = images(1)
    answers = [bound(LINEAR[name], seed=seed)(x) for seed in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize("name", ["motion_blur", "inpainting", "inpainting_rand"])
def test_what_was_drawn_can_be_given(name):
    x, drawn = images(1), bound(LINEAR[name], seed=3)
    given = LINEAR[name]().with_part(drawn.part)
    assert torch.equal(given(x), drawn(x))
    with pytest.raises(ValueError, match=f"has no {drawn.part_name} yet"):
        LINEAR[name]()(x)


@pytest.mark.parametrize("name", ["down_sampling", "gaussian_blur", "hdr"])
def test_deterministic_operators_have_no_part(name):
    operator = CLOSED_FORM[name]()
    assert operator.part_name is None and operator.for_image(SHAPE, generator()) is operator
    with pytest.raises(ValueError, match="no random part"):
        operator.with_part(torch.ones(3, 3))


@pytest.mark.parametrize("make", [CLOSED_FORM[n] for n in ("gaussian_blur", "motion_blur", "down_sampling")])
def test_a_constant_stays_a_constant(make):
    constant = torch.full((1, *SHAPE), 0.37, dtype=F64)
    blurred = bound(make)(constant)
    torch.testing.assert_close(blurred, torch.full_like(blurred, 0.37), rtol=1e-6, atol=0)


def test_a_plain_image_of_the_measurement():
    """``A A^+ A = A`` where the pseudo-inverse is exact; an image in any case."""
    for name, make in CLOSED_FORM.items():
        operator, x = bound(make), images(2, seed=4)
        again = operator.pseudo_inverse(operator(x), SHAPE)
        assert again.shape == x.shape
        if name in ("down_sampling", "inpainting", "inpainting_rand", "hdr"):
            torch.testing.assert_close(operator(again), operator(x), rtol=1e-9, atol=1e-9)
