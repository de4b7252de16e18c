"""Matrices for Newton-Schulz, what the iteration makes of them exactly, and how far from that a result may be."""

from __future__ import annotations

import numpy as np
import torch


def make(shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def with_singular_values(values, columns, seed=0):
    """A float64 matrix [len(values), columns] that has these singular values."""
    left = torch.linalg.qr(make((len(values), len(values)), seed=seed)).Q
    right = torch.linalg.qr(make((columns, len(values)), seed=seed + 1)).Q
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT


def svd(matrix):
    """U, S / (||G||_F + 1e-7) and V^T, by way of numpy in float64."""
    real = matrix.detach().cpu().to(torch.float64).numpy()
    u, s, vt = np.linalg.svd(real, full_matrices=False)
    return u, s / (np.linalg.norm(real) + 1e-7), vt


def truth(matrix, triples):
    """U p(S) V^T: the polynomial on the singular values instead of on the matrix."""
    u, s, vt = svd(matrix)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return torch.from_numpy(u * s @ vt)


def rounded_truth(matrix, triples):
    """The iteration in float64 with the start and every product rounded to bfloat16."""

    def to_bf16(array):
        return torch.from_numpy(array).to(torch.bfloat16).to(torch.float64).numpy()

    g = matrix.detach().cpu().to(torch.float64).numpy()
    if g.shape[0] > g.shape[1]:
        return rounded_truth(matrix.mT, triples).mT
    x = to_bf16(g / (np.linalg.norm(g) + 1e-7))
    for a, b, c in triples:
        gram = to_bf16(x @ x.T)
        polynomial = to_bf16(b * gram + c * (gram @ gram))
        x = to_bf16(a * x + polynomial @ x)
    return torch.from_numpy(x)


def rms(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt().item()


def assert_accurate(results, matrices, triples):
    """DESIGN.md's rule for matrix products, pooled over all matrices, beside products rounded once each."""
    truths = [truth(matrix, triples) for matrix in matrices]
    errors = [result.cpu().double() - exact for result, exact in zip(results, truths, strict=True)]
    allowed = [rounded_truth(matrix, triples) - exact for matrix, exact in zip(matrices, truths, strict=True)]
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert rms(errors) <= 2 * rms(allowed) + torch.finfo(torch.bfloat16).eps * rms(truths)


def like_gradients(shape, seed=0):
    """float32 matrices whose singular values differ much, as those of gradients do: by kind."""
    rows, columns = sorted(shape)
    index = np.arange(rows)
    spectra = {
        "a square root": (1 + index) ** -0.5,
        "a power": (1.0 + index) ** -1,
        "a steep power": (1.0 + index) ** -2,
        "a slow decay": 0.95**index,
        "a fast decay": 0.8**index,
        "one large": np.where(index < 1, 1.1, 0.1),
        "one very large": np.where(index < 1, 1.01, 0.01),
        "four large": np.where(index < 4, 1.1, 0.1),
    }
    matrices = {kind: with_singular_values(values, columns, 2 * seed) for kind, values in spectra.items()}
    noise = make((rows, columns), seed=seed)
    matrices["two and noise"] = make((rows, 2), seed=seed + 1) @ make((2, columns), seed=seed + 2) + 0.3 * noise
    matrices["unlike rows"] = make((rows, 1), seed=seed).mul(2).exp() * noise
    matrices["unlike columns"] = make((1, columns), seed=seed).mul(2).exp() * noise
    return {kind: (x if shape[0] <= shape[1] else x.mT).float() for kind, x in matrices.items()}
