import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.conjugate_gradients import conjugate_gradients

SIZE = 6


def systems(count=3):
    return torch.stack([correlated([10.0**-i for i in range(SIZE)], seed=s) for s in range(count)])


def product(matrices):
    return lambda x: (matrices @ x[..., None])[..., 0]


def test_it_solves_each_system_on_its_own_within_as_many_steps_as_unknowns():
    matrices, expected = systems(), normal(3, SIZE, seed=1)
    right = product(matrices)(expected)
    solution = conjugate_gradients(product(matrices), right, 3 * SIZE, tolerance=1e-12)
    torch.testing.assert_close(solution, expected, rtol=1e-5, atol=1e-5)
    alone = conjugate_gradients(product(matrices[1:2]), right[1:2], 3 * SIZE, tolerance=1e-12)
    torch.testing.assert_close(solution[1:2], alone, rtol=1e-10, atol=1e-10)


def test_a_particle_that_is_done_waits_without_a_change():
    matrices = torch.stack([torch.eye(SIZE, dtype=F64), systems(1)[0]])  # the first is solved in one step
    right = normal(2, SIZE, seed=2)
    solution = conjugate_gradients(product(matrices), right, 40, tolerance=1e-12)
    torch.testing.assert_close(solution[0], right[0], rtol=0, atol=1e-12)
    assert solution.isfinite().all()


def test_nothing_to_solve_is_zero():
    assert conjugate_gradients(lambda x: x, torch.zeros(2, 3), 5).abs().max() == 0
    few = conjugate_gradients(product(systems(1)), normal(1, SIZE), 1)
    assert few.abs().max() > 0  # as far as one step goes
