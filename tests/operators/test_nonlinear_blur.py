import pytest
import torch
from analytic import F64, normal
from every_operator import code, images, tiny_network
from torch import nn
from torch.nn import functional as F

from particledaps.operators.blur_network import BlurNetwork
from particledaps.operators.nonlinear_blur import NonlinearBlur, resized


class Darken(nn.Module):
    """A network whose answer is known: it multiplies by a number, and remembers what it saw."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.factor, self.seen = factor, None

    def forward(self, x, code):
        self.seen = x
        return self.factor * x + code.mean()


ZERO = torch.zeros(1, 4, 2, 2)


def operator_of(network):
    return NonlinearBlur(network, code(network))


def test_the_network_sees_unit_range_and_the_answer_is_clipped():
    network = Darken(3.0)
    x = torch.linspace(-1, 1, 256, dtype=F64).expand(1, 3, 256, 256)
    y = NonlinearBlur(network, ZERO)(x)
    torch.testing.assert_close(network.seen, (x + 1) / 2)
    torch.testing.assert_close(y, (3 * (x + 1) - 1).clamp(-1, 1))


def test_clipped_pixels_have_no_gradient():
    x = torch.linspace(-1, 1, 256, dtype=F64).expand(1, 3, 256, 256)
    gradient = NonlinearBlur(Darken(3.0), ZERO).objective(torch.full_like(x, 2.0))(x)[1]
    assert (gradient[..., x[0, 0, 0] > -1 / 3 + 1e-9] == 0).all() and (gradient[..., :80] != 0).all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 64, 48)])
def test_other_sizes_are_resized_to_256_and_back(shape):
    network, x = Darken(1.0), F.interpolate(images(1, (3, 4, 4)), shape[1:], mode="bicubic").clamp(-1, 1)
    y = NonlinearBlur(network, ZERO)(x)
    assert network.seen.shape == (1, 3, 256, 256) and y.shape == x.shape
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(y[inside], x[inside], rtol=0, atol=0.02)
    assert resized(x, shape[1:]) is x


def test_only_colour_images_are_taken():
    operator = NonlinearBlur(Darken(), ZERO)
    assert operator.measurement_shape((3, 16, 16)) == (3, 16, 16)
    with pytest.raises(ValueError, match="blurs colour images, not 1 channel"):
        operator.measurement_shape((1, 16, 16))


def test_gradient_against_finite_differences():
    operator = operator_of(tiny_network().double())
    x, y, step = images(1, (3, 16, 16)), images(1, (3, 16, 16), seed=2), 1e-7  # few kinks are crossed
    gradient, direction = operator.objective(y)(x)[1], normal(1, 3, 16, 16, seed=3)
    ahead, behind = (operator.loss(x + s * direction, y) for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_batch_is_a_loop_and_the_code_matters():
    network = tiny_network()
    one, other = NonlinearBlur(network, code(network)), NonlinearBlur(network, code(network, seed=1))
    x = images(3, (3, 16, 16), dtype=torch.float32)
    together = one(x)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], one(x[row : row + 1]), rtol=1e-4, atol=1e-5)
    assert (together - other(x)).abs().max() > 1e-4
    assert not any(parameter.requires_grad for parameter in network.parameters())


def reference(state, x, z):
    """The published decoder written out with functions, from its description: independent of our modules."""

    def conv(name, h, **options):
        return F.conv2d(h, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def block(name, h):
        return h + conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", h, padding=1)), padding=1)

    def raise_up(name, h):
        h = F.relu(conv(f"{name}.up.1.double_conv.0", F.relu(h), padding=2))
        h = F.relu(conv(f"{name}.up.1.double_conv.2", h, padding=2))
        return F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)

    h = F.leaky_relu(conv("feature_extractor.0", x, padding=1), 0.1)
    h = F.leaky_relu(conv("feature_extractor.2", h, stride=2, padding=1), 0.1)
    h = F.leaky_relu(conv("feature_extractor.4", h, stride=2, padding=1), 0.1)
    h = block("feature_extractor.6", h)
    names = ["adapter.model" + ".submodule" * level for level in range(5)]
    skips, h = [], conv("adapter.model.down.0", h, stride=2, padding=1)
    for name in names[1:]:
        h = F.leaky_relu(h, 0.2)
        skips.append(h)
        h = conv(f"{name}.down.1", h, stride=2, padding=1)
    h = torch.cat([h, z.expand(len(h), -1, -1, -1)], 1)
    for name in reversed(names[1:]):
        h = torch.cat([raise_up(name, h), skips.pop()], 1)
    h = torch.tanh(raise_up(names[0], h))
    h = block("recon_trunk.0", h)
    h = F.leaky_relu(F.pixel_shuffle(conv("recon_trunk.1", h, padding=1), 2), 0.1)
    h = F.leaky_relu(F.pixel_shuffle(conv("recon_trunk.4", h, padding=1), 2), 0.1)
    h = F.leaky_relu(conv("recon_trunk.7", h, padding=1), 0.1)
    return conv("recon_trunk.9", h, padding=1) + x


def test_network_against_its_description():
    network = tiny_network().double()
    x, z = images(1, (3, 128, 128)), code(network).double()[..., :1, :1]
    expected = reference(network.state_dict(), x, z)
    torch.testing.assert_close(network(x, z), expected, rtol=1e-9, atol=1e-9)
    assert (expected - x).abs().max() > 1e-3


def test_names_and_sizes_of_the_published_weights():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in BlurNetwork().state_dict().items()}
    known = {
        "feature_extractor.0.weight": (64, 3, 3, 3),
        "feature_extractor.4.bias": (64,),
        "feature_extractor.15.conv2.weight": (64, 64, 3, 3),
        "adapter.model.down.0.weight": (64, 64, 4, 4),
        "adapter.model.up.1.double_conv.0.weight": (64, 128, 5, 5),
        "adapter.model.submodule.down.1.weight": (128, 64, 4, 4),
        "adapter.model.submodule.submodule.submodule.up.1.double_conv.2.weight": (256, 256, 5, 5),
        "adapter.model.submodule.submodule.submodule.submodule.down.1.weight": (512, 512, 4, 4),
        "adapter.model.submodule.submodule.submodule.submodule.up.1.double_conv.0.weight": (512, 1024, 5, 5),
        "recon_trunk.19.conv1.bias": (64,),
        "recon_trunk.20.weight": (256, 64, 3, 3),
        "recon_trunk.23.weight": (256, 64, 3, 3),
        "recon_trunk.26.weight": (64, 64, 3, 3),
        "recon_trunk.28.weight": (3, 64, 3, 3),
    }
    assert {name: shapes[name] for name in known} == known
    assert "adapter.model.down.0.bias" not in shapes
