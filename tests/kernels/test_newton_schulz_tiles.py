from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from newton_schulz_truth import assert_accurate, like_gradients

import kernels
from kernels import newton_schulz_plan as plan
from kernels import newton_schulz_tiles
from kernels.muon_update import momentum_newton_schulz_
from kernels.reference import NAMED_COEFFICIENTS

TILE = plan.LARGE
QUINTIC = NAMED_COEFFICIENTS["quintic"][0]
# the square completed; not, because it would cancel, because it opens downwards, because there is none
TRIPLES = ((2.0, -1.5, 0.5), (1.0, -3.0, 2.0), (3.0, 1.0, -2.0), (1.5, -0.5, 0.0))
SHAPES = [(128, 128), (256, 128), (128, 384), (512, 256), (1, 700), (300, 1), (250, 200)]
FORMS = (
    lambda left, right: left @ right,
    lambda left, right: left @ right.mT,
    lambda left, right: left.mT @ right,
)


def planned(shapes, coefficients, segments=None):
    """Places, stages, and how many tiles they take; in segments of these lengths, or in those that would be taken."""
    places, stages, first = [], [], 0
    for shape in shapes:
        places.append(plan.place_of(*shape, first, TILE))
        own = plan.stages_of(coefficients, segments or plan.segments_of(*shape, coefficients))
        stages.append(own)
        first += plan.tiles_of(places[-1], own)
    return places, stages, first


def reads_of(item):
    """The tiles that an item reads."""
    _, left, left_step, right, right_step, count, added, *_ = item
    products = {left + k * left_step for k in range(count)} | {right + k * right_step for k in range(count)}
    return products | ({added} if added >= 0 else set())


def writes_of(item):
    return {tile for tile in item[7:9] if tile >= 0}


@pytest.fixture(scope="module", params=[(QUINTIC,) * 5, TRIPLES], ids=["pairs", "one at a time"])
def planned_shapes(request):
    return planned(SHAPES, request.param)


@pytest.fixture(scope="module", params=[plan.TOGETHER, 4], ids=["one group", "several"])
def order(planned_shapes, request):
    places, stages, _ = planned_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "TOGETHER", request.param)
        assert (len(plan.groups_of(places, [1] * len(places))) > 1) == (request.param == 4)
        return plan.work_order(places, stages, TILE)


def test_items_wait_for_what_comes_before_them(order):
    done = Counter()
    for item in order:
        waits_for, count, raises = item[13:]
        if waits_for >= 0:
            assert done[waits_for] == count
        done[raises] += 1


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_programs_that_work_their_items_off_in_order_end(order, programs):
    """Each has every n-th item and does nothing else while it waits."""
    hands = [list(order[first::programs]) for first in range(programs)]
    done = Counter()
    while any(hands):
        ready = [hand for hand in hands if hand and (hand[0][13] < 0 or done[hand[0][13]] >= hand[0][14])]
        assert ready
        for hand in ready:
            done[hand.pop(0)[15]] += 1


def test_groups_of_matrices_have_enough_to_do_and_one_mix_of_shapes():
    squares = [plan.place_of(1024, 1024, 0, TILE)] * 64
    groups = plan.groups_of(squares, [1] * 64)
    assert sorted(itertools.chain(*groups)) == list(range(64))
    assert {plan.TOGETHER - 36 < 36 * len(group) < 2 * plan.TOGETHER for group in groups} == {True}
    mixed = [plan.place_of(512, columns, 0, TILE) for columns in (512, 1536) for _ in range(64)]
    groups = plan.groups_of(mixed, [place.columns for place in mixed])
    assert len(groups) == 5
    assert {len([matrix for matrix in group if matrix >= 64]) for group in groups} == {12, 13}
    assert all(group == sorted(group, key=lambda matrix: -mixed[matrix].columns) for group in groups)
    assert len(plan.groups_of(mixed[:20] + mixed[-20:], [1] * 40)) == 1
    uneven = [plan.place_of(side, side, 0, TILE) for side in (4096, *[512] * 48)]
    assert sorted(map(len, plan.groups_of(uneven, [place.side for place in uneven]))) == [1, 24, 24]


def test_a_stage_reads_what_the_stages_before_have_written(planned_shapes, order):
    places, stages, _ = planned_shapes
    factors = plan.factors_of(stages)
    written = {place.buffer(0) + tile for place in places for tile in range(place.rows * place.columns)}
    by_counter = {}
    for item in order:
        by_counter.setdefault(item[15], []).append(item)
    assert sorted(by_counter) == list(range(sum(map(len, stages))))
    for _, items in sorted(by_counter.items()):
        assert len({(item[9], item[10]) for item in items}) == 1
        written_now = Counter(tile for item in items for tile in writes_of(item))
        assert set().union(*map(reads_of, items)) <= written
        assert {item[6] >= 0 for item in items} == {factors[items[0][9]][1] != 0}
        if written_now:  # the last stage writes results
            assert set(written_now.values()) == {1}
        # items of one stage run at the same time: none may write what another reads
        for item in items:
            assert all(writes_of(item).isdisjoint(reads_of(other)) for other in items if other is not item)
            assert writes_of(item).isdisjoint(reads_of(item) - {item[6]})
        written |= set(written_now)


def test_no_matrix_touches_anothers_tiles(planned_shapes, order):
    places, stages, total = planned_shapes
    for item in order:
        place = places[item[10]]
        own = range(place.first, place.first + plan.tiles_of(place, stages[item[10]]))
        assert reads_of(item) | writes_of(item) <= set(own)
    assert sum(map(plan.tiles_of, places, stages)) == total


def test_pairs_where_they_save():
    five = (QUINTIC,) * 5
    lengths = {shape: plan.segments_of(*shape, five) for shape in [(512, 512), (512, 1536), (512, 256)]}
    assert lengths == {(512, 512): (1,) * 5, (512, 1536): (2, 1, 2), (512, 256): (2, 1, 2)}
    assert plan.segments_of(512, 1536, (QUINTIC,) * 4) == (2, 1, 1)
    assert plan.segments_of(512, 1536, (QUINTIC,) * 6) == (2, 1, 2, 1)
    for usual in ((QUINTIC,) * 3, (QUINTIC,) * 7, TRIPLES * 2, (*five, TRIPLES[0])):
        assert plan.segments_of(512, 1536, usual) == (1,) * len(usual)
    wide = plan.place_of(512, 1536, 0, TILE)
    saved = plan.cost_of(wide, plan.stages_of(five, (2, 1, 2))) / plan.cost_of(wide, plan.stages_of(five, (1,) * 5))
    assert saved == pytest.approx(1376 / 1760)


def in_bfloat16(matrix, triples, segments):
    """What the stages give with every product rounded once, as a GPU does it."""
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    scale = 1 / (x.norm() + 1e-7)
    buffers = {plan.X[0]: x.to(torch.bfloat16).double()}
    for stage in plan.stages_of(triples, segments):
        left, right = buffers[stage.left], buffers[stage.right]
        product = left @ (right.mT if stage.left in plan.X else right)
        product = stage.alpha * scale**stage.power * product
        if stage.beta:
            product += stage.beta * buffers[stage.added]
        product += stage.gamma * torch.eye(*product.shape)
        product = product.to(torch.bfloat16)
        buffers[stage.target] = (product.triu() + product.triu(1).mT if stage.is_symmetric else product).double()
    result = buffers[stage.target].to(torch.bfloat16)
    return result if matrix.shape[0] <= matrix.shape[1] else result.mT


@pytest.mark.parametrize(
    ("shape", "steps", "draws"), [((16, 256), 4, 12), ((16, 256), 5, 12), ((16, 256), 6, 12), ((300, 64), 5, 4)]
)
def test_stages_in_bfloat16_are_as_accurate_as_the_definition(shape, steps, draws):
    """For each kind of matrix. The interpreter cannot round to bfloat16, so this does, and not for a GPU alone."""
    triples = (QUINTIC,) * steps
    lengths = {(1,) * steps, plan.segments_of(*shape, triples)}
    assert len(lengths) == 2
    drawn = [like_gradients(shape, seed) for seed in range(draws)]
    for kind in drawn[0]:
        matrices = [each[kind] for each in drawn]
        for segments in lengths:
            assert_accurate([in_bfloat16(matrix, triples, segments) for matrix in matrices], matrices, triples)


@pytest.mark.parametrize(
    "triples",
    [TRIPLES, TRIPLES[::-1], (QUINTIC,) * 4, ((0.0, 3.0, -2.0), QUINTIC, (0.0, 1.0, 0.5), QUINTIC)],
    ids=["every kind", "in reverse", "quintic", "no constant"],
)
@pytest.mark.parametrize("segments", [(1, 1, 1, 1), (2, 1, 1), (2, 2), (1, 2, 1)])
@pytest.mark.parametrize("shape", [(256, 384), (384, 256), (256, 256), (384, 128)])
def test_items_are_the_iteration(shape, segments, triples):
    """The list, worked off on whole tiles, gives what the definition gives."""
    (place,), (stages,), total = planned([shape], triples, segments)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) / 100
    rows, columns, scale = place.rows, place.columns, 0.5
    work = torch.full((total, 128, 128), float("nan"), dtype=torch.float64)
    work[: rows * columns] = (x / scale).reshape(rows, 128, columns, 128).transpose(1, 2).reshape(-1, 128, 128)
    result = torch.full(shape, float("nan"), dtype=torch.float64)
    factors = plan.factors_of([stages])
    for item in plan.work_order([place], [stages], TILE):
        form, left, left_step, right, right_step, count, added, target, mirror, number, _, row, column = item[:13]
        product = sum(FORMS[form](work[left + k * left_step], work[right + k * right_step]) for k in range(count))
        alpha, beta, gamma, power = factors[number]
        product = alpha * scale**power * product + (beta * work[added] if added >= 0 else 0)
        if row == column and gamma:
            product += gamma * torch.eye(128, dtype=torch.float64)
        if 0 <= mirror == target:
            product = product.triu() + product.triu(1).mT
        if target < 0:
            result[row : row + 128, column : column + 128] = product
        else:
            work[target] = product
        if mirror >= 0:
            work[mirror] = product.mT
    expected = x if shape[0] <= shape[1] else x.mT
    for a, b, c in triples:
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    expected = expected if shape[0] <= shape[1] else expected.mT
    assert (result - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.usefixtures("triton_kernels")
def test_a_result_does_not_depend_on_the_rest_of_the_list(device):
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator).to(device) for shape in ((130, 70), (20, 300), (128, 128))]
    together = kernels.newton_schulz(matrices)
    turned = kernels.newton_schulz(matrices[::-1])[::-1]
    alone = [kernels.newton_schulz(matrix) for matrix in matrices]
    assert all(map(torch.equal, together, alone))
    assert all(map(torch.equal, turned, alone))


def test_programs_that_are_said_to_fit_do(compiled_newton_schulz):
    """All have to be resident at once. Of registers there are enough for two of any that has 128 threads."""
    # of a processor, by NVIDIA's tables of compute capabilities; each program takes 1 KB more than it asks for
    for architecture, shared_memory in ((80, 164), (86, 100), (90, 228)):
        programs = 2 if divmod(architecture, 10) in newton_schulz_tiles.ROOM_FOR_TWO else 1
        needed = compiled_newton_schulz["newton_schulz_kernel", architecture].shared_memory + 1024
        assert programs * needed <= shared_memory * 1024


def test_small_tiles_where_there_are_few():
    few = [(1, 1), (1024, 1024), (1024, 2048), (4, 512, 512), (64, 128, 128), (3, 2, 200, 200)]
    many = [(2048, 2048), (64, 256, 256), (8, 512, 512), (64, 128, 512)]
    assert {plan.tile_of([shape]) for shape in few} == {plan.SMALL}
    assert {plan.tile_of([shape]) for shape in many} == {plan.LARGE}
    assert plan.tile_of([(1, 1)] * 264) == plan.SMALL
    assert plan.tile_of([(1, 1)] * 265) == plan.LARGE
    assert plan.tile_of([(64, 512 * 64)]) == plan.SMALL
    assert plan.tile_of([(64, 512 * 64 + 1)]) == plan.LARGE


@pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")
def test_small_tiles_give_the_bits_of_large_ones(device, large_tiles):
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 33, 20), (20, 100), (128, 128), (65, 300), (300, 65), (300, 192))
    matrices = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    calls = [(QUINTIC,) * 5, NAMED_COEFFICIENTS["polar_express"][:5], TRIPLES]
    assert {plan.segments_of(*shape, calls[0]) for shape in shapes[1:]} == {(1,) * 5, (2, 1, 2)}
    assert plan.tile_of(shapes) == plan.SMALL

    def results() -> list[torch.Tensor]:
        return [
            result
            for triples in calls
            for result in kernels.newton_schulz(matrices, steps=len(triples), coefficients=triples)
        ]

    small = results()
    large_tiles()
    assert plan.tile_of(shapes) == plan.LARGE
    assert all(map(torch.equal, small, results()))


@pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")
def test_batches_are_as_their_matrices(device):
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(2, 3, 5, 9, generator=generator).to(device)  # results at odd addresses
    results = kernels.newton_schulz([batch, batch[0, :1, :4, :8]], steps=2)
    assert results[0].is_contiguous()
    singly = torch.stack([kernels.newton_schulz(matrix, steps=2) for matrix in batch.flatten(0, 1)])
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
