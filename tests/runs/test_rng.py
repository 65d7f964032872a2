import pytest
import torch

from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.streams import ParticleStreams, measurement_generator, stream, stream_seed

LIKE = torch.zeros(4, 3, 2, 2)
KEY = (42, 0, 3, "mcmc", 7)


def first_numbers(*key):
    return torch.randn(8, generator=stream(*key))


def test_golden_values():
    """Every published number rests on these; a change of key, hash or generator must not pass unnoticed."""
    assert stream_seed(*KEY) == 5621266827788940626
    few, many = torch.randn(8, generator=stream(*KEY)), torch.randn(64, generator=stream(*KEY))
    assert few[:3].tolist() == pytest.approx([0.1747064, 0.6314026, -0.0329416], abs=1e-5)
    assert many[[0, 1, 63]].tolist() == pytest.approx([-1.5428810, -0.2205059, 0.0397149], abs=1e-5)
    measured = torch.randn(2, generator=measurement_generator(42, 5))
    assert measured.tolist() == pytest.approx([1.1633406, 0.1866324], abs=1e-5)


def test_same_key_same_numbers():
    assert torch.equal(first_numbers(42, 1, 2, "start", 0), first_numbers(42, 1, 2, "start", 0))


@pytest.mark.parametrize(
    "other",
    [
        (43, 1, 2, "start", 0),
        (42, 2, 2, "start", 0),
        (42, 1, 3, "start", 0),
        (42, 1, 2, "mcmc", 0),
        (42, 1, 2, "start", 1),
    ],
    ids=["seed", "image", "particle", "purpose", "level"],
)
def test_every_part_of_the_key_matters(other):
    assert not torch.equal(first_numbers(42, 1, 2, "start", 0), first_numbers(*other))


@pytest.mark.parametrize("purpose", ["start", "mcmc"])
@pytest.mark.parametrize("level", [0, 4])
def test_particle_streams_are_keyed_by_everything(purpose, level):
    """The key of :func:`stream` is seed, image, particle, purpose, level."""
    drawn = ParticleStreams(42, 7).normal([0, 3], purpose, level, LIKE)
    expected = [torch.randn(3, 2, 2, generator=stream(42, 7, p, purpose, level)) for p in (0, 3)]
    assert torch.equal(drawn, torch.stack(expected))


def test_parts_of_a_key_do_not_run_together():
    keys = [(1, 23), (12, 3), (123,), (1, 2, 3), (2, 31), (-1, 23), (1, -23)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)


def test_seeds_of_many_keys_are_distinct_and_fit_a_generator():
    seeds = {stream_seed(42, i, p, "mcmc", k) for i in range(20) for p in range(8) for k in range(50)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_are_uncorrelated():
    rows = torch.stack([torch.randn(20_000, generator=stream(42, 0, p, "mcmc", 0)) for p in range(6)])
    off_diagonal = rows.corrcoef() - torch.eye(6)
    assert off_diagonal.abs().max() < 5 / 20_000**0.5


def test_a_particle_alone_draws_what_it_draws_in_a_batch():
    streams = ParticleStreams(42, 7)
    batch = streams.normal([0, 1, 2, 3], "renoise", 5, LIKE)
    assert torch.equal(streams.normal([3], "renoise", 5, LIKE)[0], batch[3])
    assert torch.equal(streams.normal([3, 0], "renoise", 5, LIKE), batch[[3, 0]])
    alone = streams.generators([3], "mcmc", 5, torch.device("cpu"))[0]
    together = streams.generators([0, 1, 2, 3], "mcmc", 5, torch.device("cpu"))[3]
    assert torch.equal(torch.randn(8, generator=alone), torch.randn(8, generator=together))


def test_draws_do_not_depend_on_what_was_drawn_before():
    used, fresh = ParticleStreams(42, 7), ParticleStreams(42, 7)
    used.normal([0, 1], "start", 0, LIKE)
    used.normal([0, 1], "renoise", 4, LIKE)
    assert torch.equal(used.normal([1], "renoise", 5, LIKE), fresh.normal([1], "renoise", 5, LIKE))


def test_float64_particles_get_the_float32_numbers():
    streams = ParticleStreams(42, 7)
    double = streams.normal([0, 1], "start", 0, LIKE.double())
    assert double.dtype == torch.float64
    assert torch.equal(double, streams.normal([0, 1], "start", 0, LIKE).double())


def test_normal_draws_are_standard_normal():
    draws = ParticleStreams(42, 7).normal([0, 1], "start", 0, torch.zeros(2, 100_000))
    assert draws.mean(1).abs().max() < 4 / 100_000**0.5
    assert (draws.std(1) - 1).abs().max() < 4 / 200_000**0.5


def test_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ParticleStreams(42, 7).normal([0], "start", 0, LIKE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(ParticleStreams(42, 7).normal([0], "start", 0, LIKE), first)


def measurements(image_ids, seed=42):
    operator = PhaseRetrieval()
    images = {i: torch.randn(1, 3, 8, 8, generator=stream("image", i)).clamp(-1, 1) for i in range(4)}
    return {i: operator.measure(images[i], measurement_generator(seed, i)) for i in image_ids}


def test_measurement_noise_depends_on_seed_and_image_only():
    together, alone = measurements([0, 1, 2, 3]), measurements([2])
    assert torch.equal(together[2], alone[2])
    assert torch.equal(measurements([3, 2])[2], alone[2])
    assert not torch.equal(measurements([2], seed=43)[2], alone[2])


def test_images_have_noise_of_their_own():
    noise = [torch.randn(8, generator=measurement_generator(42, i)) for i in range(4)]
    assert len({tuple(n.tolist()) for n in noise}) == 4


def test_measurement_noise_is_no_particles_noise():
    noise = torch.randn(8, generator=measurement_generator(42, 0))
    for particle in range(8):
        for purpose in ("start", "mcmc", "accept", "renoise", "measurement"):
            assert not torch.equal(noise, first_numbers(42, 0, particle, purpose, 0))
