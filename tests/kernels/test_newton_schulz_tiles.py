from __future__ import annotations

from collections import Counter

import pytest
import torch

import kernels
from kernels import newton_schulz_plan as plan
from kernels.muon_update import momentum_newton_schulz_

SHAPES = [(128, 128), (256, 128), (128, 384), (512, 256), (1, 700), (300, 1), (250, 200)]
FORMS = (
    lambda left, right: left @ right,
    lambda left, right: left @ right.mT,
    lambda left, right: left.mT @ right,
)


def places_of(shapes):
    places, first = [], 0
    for shape in shapes:
        places.append(plan.place_of(*shape, first))
        first += plan.tiles_of(places[-1])
    return places, first


def reads_of(item):
    """The tiles that an item reads."""
    _, left, left_step, right, right_step, count, added, *_ = item
    products = {left + k * left_step for k in range(count)} | {right + k * right_step for k in range(count)}
    return products, added


def writes_of(item):
    return {tile for tile in item[7:9] if tile >= 0}


@pytest.fixture(scope="module")
def order():
    return plan.work_order(places_of(SHAPES)[0], 3)


def test_items_wait_for_what_comes_before_them(order):
    done = Counter()
    for item in order:
        waits_for, count, raises = item[13:]
        if waits_for >= 0:
            assert done[waits_for] == count
        done[raises] += 1
    assert 0 not in done  # the counter that hands items out


def test_a_stage_reads_what_the_stages_before_have_written(order):
    places, _ = places_of(SHAPES)
    written = {tile for place in places for tile in range(place.x[0], place.x[1])}
    by_stage = {}
    for item in order:
        by_stage.setdefault((item[9], item[10]), []).append(item)
    for (stage, _), items in sorted(by_stage.items()):
        products = set().union(*(reads_of(item)[0] for item in items))
        written_now = Counter(tile for item in items for tile in writes_of(item))
        assert products <= written
        if stage % plan.STAGES:  # the first stage adds nothing
            assert {reads_of(item)[1] for item in items} <= written
        assert set(written_now.values()) == {1}
        # items of one stage run at the same time: none may write what another reads
        for item in items:
            others = [other for other in items if other is not item]
            assert writes_of(item).isdisjoint(reads_of(item)[0])
            assert all(writes_of(item).isdisjoint({*reads_of(other)[0], reads_of(other)[1]}) for other in others)
        written |= set(written_now)


def test_no_matrix_touches_anothers_tiles(order):
    places, total = places_of(SHAPES)
    for item in order:
        place = places[item[10]]
        own = range(place.x[0], place.x[0] + plan.tiles_of(place))
        products, added = reads_of(item)
        assert {*products, added, *writes_of(item)} <= set(own)
    assert sum(map(plan.tiles_of, places)) == total


def test_items_are_the_iteration():
    """The list, worked off on whole tiles, gives what the definition gives."""
    shape, coefficients = (256, 384), [(2.0, -1.5, 0.5), (3.0, 1.0, -2.0)]
    places, total = places_of([shape])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) / 100
    for matrix, place in ((x, places[0]), (x.mT, places_of([shape[::-1]])[0][0])):
        work = torch.full((total, 128, 128), float("nan"), dtype=torch.float64)
        rows, columns = place.rows, place.columns
        work[: rows * columns] = matrix.reshape(rows, 128, columns, 128).transpose(1, 2).reshape(-1, 128, 128)
        factors = [pair for a, b, c in coefficients for pair in ((1.0, 0.0), (c, b), (1.0, a))]
        for item in plan.work_order([place], len(coefficients)):
            form, left, left_step, right, right_step, count, added, target, mirror, stage = item[:10]
            product = sum(FORMS[form](work[left + k * left_step], work[right + k * right_step]) for k in range(count))
            alpha, beta = factors[stage]
            work[target] = alpha * product + (beta * work[added] if beta else 0)
            if mirror >= 0:
                work[mirror] = work[target].mT
        result = work[place.x[0] : place.x[1]].reshape(rows, columns, 128, 128).transpose(1, 2).reshape(matrix.shape)
        expected = x
        for a, b, c in coefficients:
            gram = expected @ expected.mT
            expected = a * expected + (b * gram + c * gram @ gram) @ expected
        torch.testing.assert_close(result if matrix is x else result.mT, expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("triton_kernels")
def test_a_result_does_not_depend_on_the_rest_of_the_list(device):
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator).to(device) for shape in ((130, 70), (20, 300), (128, 128))]
    together = kernels.newton_schulz(matrices)
    turned = kernels.newton_schulz(matrices[::-1])[::-1]
    alone = [kernels.newton_schulz(matrix) for matrix in matrices]
    assert all(map(torch.equal, together, alone))
    assert all(map(torch.equal, turned, alone))


@pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")
def test_batches_are_as_their_matrices(device):
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(2, 3, 5, 9, generator=generator).to(device)  # results at odd addresses
    results = kernels.newton_schulz([batch, batch[0, :1, :4, :8]])
    assert results[0].is_contiguous()
    singly = torch.stack([kernels.newton_schulz(matrix) for matrix in batch.flatten(0, 1)])
    assert torch.equal(results[0].flatten(0, 1), singly)


@pytest.mark.usefixtures("triton_kernels")
def test_moved_inputs_are_found(device):
    """Tables are kept by address: the same memory with other numbers, and other memory, give what is there."""
    first, second = torch.randn(40, 30, device=device), torch.randn(40, 30, device=device)
    before = kernels.newton_schulz([first])[0].clone()
    elsewhere = kernels.newton_schulz([second])[0]
    assert not torch.equal(elsewhere, before)
    assert torch.equal(elsewhere, kernels.newton_schulz([second, first])[0])  # a table that was not there before
    first.mul_(-1)
    assert torch.equal(kernels.newton_schulz([first])[0], -before)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("momentum_first", [False, True])
def test_two_matrices_are_not_a_gradient_and_its_momentum(momentum_first, device):
    """Both stand in tables of the same addresses."""
    gradient, buffer = torch.randn(40, 30, device=device), torch.zeros(40, 30, device=device)
    if momentum_first:
        momentum_newton_schulz_([buffer], [gradient], momentum=0.9, nesterov=False)
        assert torch.equal(buffer, gradient)
        buffer.copy_(torch.randn(40, 30))
    results = kernels.newton_schulz([gradient, buffer])
    assert torch.equal(results[1], kernels.newton_schulz(buffer.clone()))
    if not momentum_first:
        momentum_newton_schulz_([buffer], [gradient], momentum=0.9, nesterov=False)
        assert torch.equal(buffer, gradient)


@pytest.mark.usefixtures("triton_kernels")
def test_where_a_gradient_is_asked_for_the_reference_runs(device):
    matrix = torch.randn(3, 5, device=device, requires_grad=True)
    kernels.newton_schulz(matrix).sum().backward()
    assert matrix.grad.abs().sum() > 0
    with torch.no_grad():
        assert not kernels.newton_schulz(matrix).requires_grad
