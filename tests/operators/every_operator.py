"""One of each operator on images of odd and unequal sides, bound to one image."""

import torch
from analytic import F64, normal

from particledaps.operators.blur_network import BlurNetwork
from particledaps.operators.down_sampling import DownSampling
from particledaps.operators.gaussian_blur import GaussianBlur
from particledaps.operators.hdr import HighDynamicRange
from particledaps.operators.inpainting import BoxInpainting, RandomInpainting
from particledaps.operators.motion_blur import MotionBlur

SHAPE = (3, 15, 12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, shape=SHAPE, seed=0, dtype=F64):
    return (0.6 * normal(count, *shape, seed=seed, dtype=dtype)).clamp(-1, 1)


def tiny_network(seed=0):
    """The blur network with few channels, whose ReLUs let its code through."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BlurNetwork(channels=2, front_blocks=1, back_blocks=1, width=2)
        for name, parameter in network.named_parameters():
            parameter.data.mul_(2)
            if name.endswith("bias"):
                parameter.data.abs_()
    return network


def code(network, seed=0):
    return 1.2 * normal(1, network.code_channels, 2, 2, seed=seed, dtype=torch.float32)


LINEAR = {
    "down_sampling": lambda: DownSampling(4),
    "down_sampling_by_3": lambda: DownSampling(3),
    "gaussian_blur": lambda: GaussianBlur(std=1.5, kernel_size=9, reference_side=None),
    "motion_blur": lambda: MotionBlur(kernel_size=9, reference_side=None),
    "inpainting": lambda: BoxInpainting(min_side=3, max_side=6, margin=1, reference_side=None),
    "inpainting_rand": lambda: RandomInpainting(0.3, 0.6),
}
CLOSED_FORM = LINEAR | {"hdr": HighDynamicRange}


def bound(make, shape=SHAPE, seed=0):
    return make().for_image(shape, generator(seed))
