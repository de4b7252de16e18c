from __future__ import annotations

import pytest
import torch

from kernels.segment_sum import CHUNK, id_dtype, segment_order, segment_sums, segment_totals

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")


def make(num_ids, entries, device):
    """Ids with many repeats, some of them `num_ids`, which is left out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, num_ids + 1, (entries,), generator=generator)
    ids[: entries // 2] = ids[: entries // 2] % 3 + (num_ids - 3)
    return ids.to(device, id_dtype(num_ids))


# 40,000 ids take an int32 and several blocks of the kernel that counts tasks; 5,000 several blocks alone.
@pytest.mark.parametrize("num_ids", [3, 130, 5_000, 40_000])
@pytest.mark.parametrize("entries", [1, 1_000])
def test_every_entry_is_in_one_task_of_its_id(num_ids, entries, device):
    ids = make(num_ids, entries, device)
    order = segment_order(ids, num_ids)
    kept = [entry for entry in order.entry_M.tolist() if ids[entry] < num_ids]
    assert kept == sorted(kept, key=lambda entry: (int(ids[entry]), entry))
    counts = torch.bincount(ids.cpu().long(), minlength=num_ids + 1)[:num_ids]
    assert order.first_entry_S1.cpu().diff().tolist() == counts.tolist()
    tasks = -(-counts // CHUNK)
    assert order.first_task_S1.cpu().diff().tolist() == tasks.tolist()
    owners = torch.repeat_interleave(torch.arange(num_ids), tasks)
    assert order.id_J.tolist() == owners.tolist() + [num_ids] * (len(order.id_J) - len(owners))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_totals_are_the_sums_of_the_rows(dtype, device):
    """Twice as many entries as rows: entry m stands for row m mod N."""
    num_ids, rows, channels = 7, 150, 70
    ids = make(num_ids, 2 * rows, device)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    table = torch.randn(num_ids, channels, device=device)
    scale = torch.tensor(0.5, device=device)
    order = segment_order(ids, num_ids)
    total, dot = segment_totals(segment_sums(x, order), order, 0, table, scale, with_dot=True)
    expected = torch.zeros(num_ids + 1, channels, dtype=torch.float64, device=device)
    expected.index_add_(0, ids.long(), x.double().repeat(2, 1))
    torch.testing.assert_close(total.double(), 0.5 * expected[:num_ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dot.double(), (expected[:num_ids] * table.double()).sum(), rtol=1e-4, atol=1e-3)
    later, none = segment_totals(segment_sums(x, order), order, 3, table[3:])
    assert none is None
    torch.testing.assert_close(later.double(), expected[3:num_ids], rtol=1e-5, atol=1e-5)
