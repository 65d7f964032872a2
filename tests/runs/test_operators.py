"""``task.options``, the published blur network, per-image randomness, masks and kernels of given measurements."""

import numpy as np
import pytest
import torch
import yaml

from particledaps.checks import Checks, DataError, SettingsError
from particledaps.operators.blur_network import BlurNetwork
from particledaps.settings.build import build_operator
from particledaps.settings.command_line import CONFIG_DIR
from particledaps.settings.schema import TaskSettings
from particledaps.settings.tasks import (
    OPERATORS,
    check_options,
    load_blur_network,
    nonlinear_blur,
    operator_of_image,
    operators_of_measurements,
    option_types,
)

SHAPE = (3, 16, 16)
RANDOM = ("inpainting", "inpainting_rand", "motion_blur")


def problems(kind, **options):
    checks = Checks()
    check_options(kind, options, {"noise_sigma": 0.05}, checks)
    return checks.problems


@pytest.mark.parametrize("kind", [k for k in OPERATORS if k != "phase_retrieval"])
def test_the_files_spell_out_every_option_with_its_default(kind):
    written = yaml.safe_load((CONFIG_DIR / "task" / f"{kind}.yaml").read_text())
    assert written["kind"] == kind and written["noise_sigma"] == 0.05
    assert set(written["options"]) == set(option_types(kind))
    assert problems(kind, **written["options"]) == []
    if kind != "nonlinear_blur":
        ours, defaults = OPERATORS[kind](**written["options"]), OPERATORS[kind]()
        plain = {k: v for k, v in vars(defaults).items() if not callable(v)}
        assert {k: vars(ours)[k] for k in plain} == plain


DAPS = {  # daps.md's tables: steps, step size, ratio, momentum
    "down_sampling": ((100, 1e-4), (24, 1.35e-4, 0.023, 0.86), (30, 1e-4, 1, 0.45)),
    "gaussian_blur": ((100, 1e-4), (35, 2.70e-6, 0.95, 0.95), (40, 1e-5, 1, 0.9)),
    "motion_blur": ((100, 5e-5), (49, 2.4e-5, 0.041, 0.45), (30, 2e-5, 1, 0.85)),
    "nonlinear_blur": ((200, 1e-5), (80, 3.71e-6, 0.024, 0.91), (60, 1e-5, 1, 0.80)),
    "inpainting": ((100, 5e-5), (15, 9.02e-6, 0.13, 0.74), (58, 1.11e-6, 0.43, 0.92)),
    "inpainting_rand": ((100, 1e-4), (38, 8.40e-6, 0.013, 0.92), (15, 3e-5, 1, 0.60)),
    "hdr": ((100, 2e-5), (38, 4.52e-6, 0.015, 0.58), (45, 1.0e-5, 1, 0.7)),
    "phase_retrieval": ((100, 5e-5), (65, 2.1e-5, 0.12, 0.41), (95, 1.10e-4, 0.027, 0.47)),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_files_hold_the_official_values(kind):
    chains = yaml.safe_load((CONFIG_DIR / "task" / f"{kind}.yaml").read_text())["mcmc"]
    names = ("num_steps", "step_size", "step_size_min_ratio", "momentum")
    pixel, *latent = DAPS[kind]
    assert tuple(chains["pixel"][n] for n in names) == (*pixel, 0.01, 0.0)
    assert [tuple(chains[f][n] for n in names) for f in ("ldm", "sd")] == latent
    assert [chains[f]["kernel"] for f in ("pixel", "ldm", "sd")] == ["langevin", "hmc", "hmc"]
    assert [chains[f]["tau"] for f in ("pixel", "ldm", "sd")] == pytest.approx([0.01 / 2**0.5] * 3)


WRONG = {
    "unknown": ("hdr", {"gain": 2}, "task.options.gain: unknown key; hdr takes scale, recover_saturated"),
    "none to take": ("phase_retrieval", {"scale": 2}, "task.options.scale: unknown key; phase_retrieval takes none"),
    "text for a number": ("hdr", {"scale": "two"}, "task.options.scale=two: must be a number"),
    "fraction for a whole number": (
        "down_sampling",
        {"scale_factor": 2.5},
        "task.options.scale_factor=2.5: must be a whole number",
    ),
    "flag for a number": ("hdr", {"scale": True}, "task.options.scale=True: must be a number"),
    "number for a flag": ("motion_blur", {"per_image": 1}, "task.options.per_image=1: must be true or false"),
    "null for a number": ("hdr", {"scale": None}, "task.options.scale=None: must be a number"),
    "out of range": ("hdr", {"scale": 0.5}, "task.options.scale=0.5: must be greater than 1 and finite"),
    "text for a side": (
        "inpainting",
        {"reference_side": "big"},
        "task.options.reference_side=big: must be a whole number or null",
    ),
}


@pytest.mark.parametrize(("kind", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(kind, options, message):
    assert problems(kind, **options) == [message]


def test_whole_numbers_and_null_are_taken_where_they_fit():
    assert problems("hdr", scale=3) == [] and problems("inpainting", reference_side=None) == []


@pytest.mark.parametrize("kind", RANDOM)
def test_each_image_has_its_own_part_and_always_the_same(kind):
    operator = build_operator(TaskSettings(kind=kind))
    parts = [operator_of_image(operator, 42, i, (3, 64, 64)).part for i in (0, 1, 0)]
    assert torch.equal(parts[0], parts[2]) and not torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], operator_of_image(operator, 43, 0, (3, 64, 64)).part)


@pytest.mark.parametrize("kind", RANDOM)
def test_one_part_can_be_shared(kind):
    operator = build_operator(TaskSettings(kind=kind, options={"per_image": False}))
    parts = [operator_of_image(operator, 42, i, (3, 64, 64)).part for i in (0, 1)]
    assert torch.equal(*parts)
    assert not torch.equal(parts[0], operator_of_image(operator, 43, 0, (3, 64, 64)).part)


def test_an_operator_that_does_not_fit_the_images_is_named():
    operator = build_operator(TaskSettings(kind="down_sampling", options={"scale_factor": 32}))
    with pytest.raises(SettingsError, match=r"task\.options\.scale_factor=32: exceeds the image side 16"):
        operator_of_image(operator, 42, 0, SHAPE)


def written(path, **arrays):
    np.savez(path / "y.npz", **{"y": np.zeros((3, *SHAPE), np.float32)} | arrays)
    return path / "y.npz"


def test_masks_come_with_the_measurements(tmp_path):
    operator = build_operator(TaskSettings(kind="inpainting_rand"))
    masks = np.stack([np.eye(16), 1 - np.eye(16), np.ones((16, 16))]).astype(np.uint8)
    each = written(tmp_path, mask=masks, image_ids=np.array([7, 3, 5]))
    bound = operators_of_measurements(operator, each, (5, 7), SHAPE)
    assert [o.part.sum().item() for o in bound] == [256, 16]
    shared = written(tmp_path, mask=masks[0].astype(bool))
    assert [o.part.sum().item() for o in operators_of_measurements(operator, shared, (0, 2), SHAPE)] == [16, 16]


def test_kernels_come_with_the_measurements(tmp_path):
    operator = build_operator(TaskSettings(kind="motion_blur"))
    path = written(tmp_path, kernel=np.full((1, 3, 3), 1 / 9))
    assert operators_of_measurements(operator, path, (1,), SHAPE)[0].part.shape == (3, 3)


BAD_PARTS = {
    "missing": ({}, r"has no array 'mask': a measurement of inpainting needs the mask that was used, \(H, W\)"),
    "count": ({"mask": np.ones((2, 16, 16))}, r"mask is float64 \(2, 16, 16\), expected one for all or for each of 3"),
    "text": ({"mask": np.array([["a"]])}, "expected one for all"),
    "size": ({"mask": np.ones((8, 8))}, "mask of .8, 8. px does not fit images"),
    "grey": ({"mask": np.full((16, 16), 0.5)}, "1 where a pixel is seen"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_masks_that_do_not_fit_are_refused(tmp_path, arrays, message):
    operator = build_operator(TaskSettings(kind="inpainting"))
    with pytest.raises(DataError, match=message):
        operators_of_measurements(operator, written(tmp_path, **arrays), (0, 1, 2), SHAPE)


def test_operators_without_parts_need_none(tmp_path):
    operator = build_operator(TaskSettings(kind="hdr"))
    assert operators_of_measurements(operator, written(tmp_path), (0, 2), SHAPE) == [operator] * 2


@pytest.fixture
def blur_weights(tmp_path):
    """A small file laid out like ``GOPRO_wVAE.pth``: the encoder beside the decoder."""
    torch.manual_seed(0)
    state = BlurNetwork(2, 1, 2, 3).state_dict() | {"kernel_extractor.model.1.weight": torch.zeros(2, 4, 7, 7)}
    torch.save(state, tmp_path / "blur.pth")
    return tmp_path / "blur.pth"


def test_published_weights_are_loaded(blur_weights):
    network, saved = load_blur_network(blur_weights), torch.load(blur_weights, weights_only=True)
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in saved.items() if not k.startswith("kernel_extractor")
    }
    assert torch.equal(network.recon_trunk[1].conv2.weight, saved["recon_trunk.1.conv2.weight"])
    torch.save({f"module.{k}": v for k, v in saved.items()}, blur_weights)
    assert torch.equal(
        load_blur_network(blur_weights).adapter.model.down[0].weight, saved["adapter.model.down.0.weight"]
    )


def test_the_code_is_that_of_daps_and_the_global_generator_is_left_alone(blur_weights):
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    operator = nonlinear_blur(str(blur_weights))
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(0)
    expected = 1.2 * np.random.randn(1, 16, 2, 2)
    assert np.array_equal(operator.code.numpy(), expected.astype(np.float32))
    assert not torch.equal(nonlinear_blur(str(blur_weights), seed=1).code, operator.code)
    assert operator(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="seed=-1: must be at least 0"):
        nonlinear_blur(str(blur_weights), seed=-1)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def page(path):
    path.write_text("<!DOCTYPE html><html>Google Drive - virus scan warning</html>")


def malicious(path):
    torch.save({"feature_extractor.0.weight": RunsCode(path.parent / "ran")}, path)


def other_network(path):
    torch.save({"conv.weight": torch.zeros(3)}, path)


def lacking(path):
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "recon_trunk.0.conv1.bias"}, path)


def misshapen(path):
    torch.save(torch.load(path, weights_only=True) | {"adapter.model.down.0.weight": torch.zeros(2, 2, 3, 3)}, path)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "no such file; nonlinear blur needs .*: bash download.sh nonlinear-blur"),
    "page": (page, "not a readable file of weights"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a readable file of weights"),
    "malicious": (malicious, "not a readable file of weights"),
    "list": (lambda path: torch.save([1, 2], path), "holds no plain dictionary of tensors"),
    "other": (other_network, "not the network of nonlinear blur"),
    "lacking": (lacking, "not the network of nonlinear blur: .*recon_trunk.0.conv1.bias"),
    "misshapen": (misshapen, "not the network of nonlinear blur: .*adapter.model.down.0.weight"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights_end_in_one_sentence(blur_weights, damage, message):
    damage(blur_weights)
    with pytest.raises(SettingsError, match=message) as refused:
        nonlinear_blur(str(blur_weights))
    assert str(refused.value).startswith(f"task.options.weights={blur_weights}")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert not (blur_weights.parent / "ran").exists()
