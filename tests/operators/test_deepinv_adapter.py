"""Physics objects that look like deepinv's."""

import sys
from types import SimpleNamespace

import pytest
import torch
from analytic import F64, normal
from every_operator import generator, images

from particledaps.operators.deepinv_adapter import PhysicsOperator, from_physics
from particledaps.operators.operator import Operator

SHAPE = (3, 6, 5)


class Rows(torch.nn.Module):
    """Linear physics on [0, 1]: every other row, weighted; as deepinv's ``LinearPhysics``."""

    def __init__(self, sigma=0.07):
        super().__init__()
        self.noise_model = SimpleNamespace(sigma=torch.tensor(sigma))
        self.register_buffer("gain", torch.tensor([2.0, 0.5, 1.0, 3.0, 1.0]))

    def A(self, x, **kwargs):  # noqa: N802
        return x[:, :, ::2] * self.gain.to(x.dtype)

    def A_adjoint(self, y, **kwargs):  # noqa: N802
        x = y.new_zeros(*y.shape[:2], 6, 5)
        x[:, :, ::2] = y * self.gain.to(y.dtype)
        return x

    def A_dagger(self, y, **kwargs):  # noqa: N802
        return self.A_adjoint(y) / self.gain.to(y.dtype) ** 2


class Squares:
    """Nonlinear physics: no adjoint, no noise model."""

    def A(self, x):  # noqa: N802
        return x.square()


def test_the_noise_level_is_the_physics_own():
    assert from_physics(Rows()).noise_sigma == pytest.approx(0.07)
    assert from_physics(Rows(), noise_sigma=0.2).noise_sigma == 0.2
    with pytest.raises(ValueError, match="Squares has no noise_model.sigma, so give noise_sigma"):
        from_physics(Squares())


def test_images_are_mapped_to_the_range_of_the_physics():
    x = images(2, SHAPE)
    torch.testing.assert_close(from_physics(Rows())(x), Rows().A((x + 1) / 2))
    torch.testing.assert_close(from_physics(Rows(), data_range="symmetric")(x), Rows().A(x))
    assert from_physics(Rows()).measurement_shape(SHAPE) == (3, 3, 5)


@pytest.mark.parametrize("data_range", ["unit", "symmetric"])
@pytest.mark.parametrize("physics", [Rows(), Squares()], ids=["linear", "nonlinear"])
def test_gradient(physics, data_range):
    operator = from_physics(physics, noise_sigma=0.1, data_range=data_range)
    x, y = images(2, SHAPE), operator.measure(images(2, SHAPE, seed=2), generator())
    assert operator.linear == isinstance(physics, Rows)
    torch.testing.assert_close(operator.objective(y)(x), Operator.objective(operator, y)(x))
    step, direction = 1e-6, normal(2, *SHAPE, seed=3)
    ahead, behind = (operator.loss(x + s * direction, y).sum() for s in (step, -step))
    expected = (operator.objective(y)(x)[1] * direction).sum().item()
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(expected, rel=1e-6)


def test_a_measurement_that_is_an_image_is_shown_in_its_own_range():
    y = images(1, SHAPE)[0]
    assert from_physics(Rows()).picture(y) is None
    torch.testing.assert_close(from_physics(Rows(), image_like=True).picture(y), 2 * y - 1)
    torch.testing.assert_close(from_physics(Rows(), data_range="symmetric", image_like=True).picture(y), y)


def test_images_that_the_physics_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"deepinv_Rows: cannot be applied to images of shape \(3, 6, 4\)"):
        from_physics(Rows()).measurement_shape((3, 6, 4))


def test_plain_image():
    operator, x = from_physics(Rows()), images(2, SHAPE, dtype=F64)
    torch.testing.assert_close(operator.pseudo_inverse(operator(x), SHAPE)[:, :, ::2], x[:, :, ::2])
    assert from_physics(Squares(), 0.1).pseudo_inverse(x, SHAPE) is None


def test_physics_by_name(tmp_path, monkeypatch):
    (tmp_path / "lab_physics.py").write_text(
        "class Gain:\n"
        "    def __init__(self, gain):\n        self.gain = gain\n"
        "    def A(self, x):\n        return self.gain * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    operator = from_physics("lab_physics:Gain", 0.1, arguments={"gain": 3.0})
    x = images(1, SHAPE)
    torch.testing.assert_close(operator(x), 1.5 * (x + 1))
    assert operator.name == "deepinv_Gain"
    sys.modules.pop("lab_physics")
    for target in ("lab_physics:Loss", "no_lab:Gain", "lab_physics"):
        with pytest.raises(ValueError, match=f"physics={target}: cannot be imported as package.module:factory"):
            from_physics(target)
    sys.modules.pop("lab_physics", None)


REFUSED = {
    "no A": (lambda: from_physics(object(), 0.1), "physics=object: has no method A"),
    "range": (lambda: from_physics(Rows(), data_range="byte"), "data_range=byte: allowed are unit, symmetric"),
    "no noise": (lambda: from_physics(Rows(sigma=0.0)), "noise_sigma=0.0: must be positive"),
    "complex": (
        lambda: from_physics(SimpleNamespace(A=torch.fft.fft2), 0.1)(images(1, SHAPE)),
        "its measurement is torch.complex128",
    ),
    "several tensors": (
        lambda: from_physics(SimpleNamespace(A=lambda x: [x, x]), 0.1)(images(1, SHAPE)),
        "its measurement is list, and only one real tensor",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_is_an_operator():
    assert isinstance(PhysicsOperator(Rows()), Operator)
