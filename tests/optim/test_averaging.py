from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from golfmodel.optim.averaging import WeightAverage


def parameters() -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.zeros(5, 7)),
        nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.tensor(0.0)),
    ]


def randomise(weights: list[nn.Parameter], seed: int) -> list[np.ndarray]:
    """New random weights, of sizes far apart; returns them in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) + 10)
    return [weight.detach().double().numpy().copy() for weight in weights]


def test_mean_of_many_copies_is_that_of_float64():
    weights = parameters()
    average = WeightAverage(weights)
    copies = []
    for seed in range(60):
        copies.append(randomise(weights, seed))
        average.add()
    assert average.copies == 60
    assert average.apply()
    for index, weight in enumerate(weights):
        mean = np.mean([copy[index] for copy in copies], axis=0)
        if weight.dtype == torch.bfloat16:
            # Rounded once, at the end; a mean kept in bf16 would be off by several units of 2^-5.
            assert np.array_equal(weight.detach().double().numpy(), torch.tensor(mean).bfloat16().double().numpy())
        else:
            np.testing.assert_allclose(weight.detach().numpy(), mean, rtol=1e-6)


def test_bfloat16_weights_are_averaged_in_float32():
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    average = WeightAverage([weight])
    copies = []
    for seed in range(60):
        copies.append(randomise([weight], seed)[0])
        average.add()
    assert average._means[0].dtype == torch.float32
    np.testing.assert_allclose(average._means[0].numpy(), np.mean(copies, axis=0), rtol=1e-6)


@pytest.mark.parametrize("copies", [0, 1])
def test_fewer_than_two_copies_leave_the_weights(copies):
    weights = parameters()
    average = WeightAverage(weights)
    for seed in range(copies):
        randomise(weights, seed)
        average.add()
    last = randomise(weights, 99)
    assert not average.apply()
    assert all(np.array_equal(w.detach().double().numpy(), value) for w, value in zip(weights, last, strict=True))


def test_two_copies_are_enough():
    weight = nn.Parameter(torch.zeros(2))
    average = WeightAverage([weight])
    for value in (1.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)
        average.add()
    assert average.apply()
    assert weight.tolist() == [2.5, 2.5]


def test_a_copy_is_a_copy():
    """Training goes on after it, in place."""
    weight = nn.Parameter(torch.ones(2))
    average = WeightAverage([weight])
    average.add()
    with torch.no_grad():
        weight.fill_(100)
    average.add()
    with torch.no_grad():
        weight.fill_(1e6)
    average.apply()
    assert weight.tolist() == [50.5, 50.5]


def test_the_weights_stay_the_parameters_they_were():
    weights = parameters()
    average = WeightAverage(weights)
    pointers = [weight.data_ptr() for weight in weights]
    for seed in range(2):
        randomise(weights, seed)
        average.add()
    average.apply()
    assert [weight.data_ptr() for weight in weights] == pointers
    assert all(weight.requires_grad for weight in weights)


def test_goes_on_from_what_was_saved():
    weights = parameters()
    average, other = WeightAverage(weights), WeightAverage(weights)
    other.load(0, [])
    assert other.copies == 0
    for seed in range(3):
        randomise(weights, seed)
        average.add()
    other.load(average.copies, average.means)
    randomise(weights, 3)
    average.add()
    other.add()
    assert other.copies == 4
    assert all(torch.equal(a, b) and a is not b for a, b in zip(average.means, other.means, strict=True))
