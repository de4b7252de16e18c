"""Parameters to their stored form and back, each by its declared scheme.

R rows, C columns of a weight matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from golfmodel.artifact.stored import CODE_LIMIT, VALUE_DTYPE, StoredTensor
from golfmodel.model.parameters import Storage
from golfmodel.runtime.errors import ArtifactError
from golfmodel.runtime.progress import Progress
from kernels import dequantize_int6, quantize_int6

FP16_MAX = 65504.0
INT8_CLIP_QUANTILE = 0.9999984


def quantize_parameters(
    parameters: Mapping[str, tuple[Tensor, Storage]], *, show_progress: bool = False
) -> dict[str, StoredTensor]:
    """Every parameter in its storage scheme, computed in float32 where it lives and returned on the CPU.

    INT6: `scale = fp16(max |w| / 31)` a row, codes -31..31. INT8: `scale = fp16(clip / 127)` a row, where clip
    is the row's 99.99984% quantile of |w|, codes -127..127. FP16 and FP32: rounded to nearest. The result
    shares no memory with `parameters`.

    Args:
        parameters: name to (tensor, scheme), as `exported_parameters` gives them.
        show_progress: whether this process shows how far it has come.

    Raises:
        ArtifactError: a tensor holds values that are not finite or (FP16) above 65504, is empty, has a rank
            its scheme cannot store, or its scheme is NONE; names the tensor.
    """
    stored = {}
    with Progress("quantizing", len(parameters), unit="tensor", enabled=show_progress) as progress:
        for name, (tensor, storage) in parameters.items():
            stored[name] = _quantize(name, tensor.detach().to(torch.float32), storage)
            progress.update()
    return stored


def dequantize_parameters(
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The weights that the stored form stands for, in `dtype` on `device`; memory of their own.

    Codes times scale is exact in float32, so the result is the same on every device.
    """
    return {name: _dequantize(tensor, dtype, device) for name, tensor in stored.items()}


def quantize_int8(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[R, C]` and float16 scales `[R]` of a float32 matrix.

    `clip` is the row's 99.99984% quantile of |w| (linear interpolation), `scale = fp16(clip / 127)`, 1 where
    that is 0, at most 65504; `codes = w / scale` by the rounded scale, half to even, clamped to -127..127.
    """
    limit = CODE_LIMIT[Storage.INT8]
    clip_R = torch.quantile(weight_RC.abs(), INT8_CLIP_QUANTILE, dim=1)
    scale_R = (clip_R / limit).clamp(max=FP16_MAX).to(torch.float16)
    scale_R = torch.where(scale_R == 0, torch.ones_like(scale_R), scale_R)
    codes_RC = (weight_RC / scale_R.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return codes_RC, scale_R


def dequantize_int8(codes_RC: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale` `[R, C]`, computed in float32."""
    return (codes_RC.float() * scale_R.float()[:, None]).to(dtype)


def _quantize(name: str, weight: Tensor, storage: Storage) -> StoredTensor:
    if storage not in VALUE_DTYPE:
        raise ArtifactError(f"parameter {name!r} has scheme {storage.value!r}, which the artifact never stores")
    if weight.numel() == 0:
        raise ArtifactError(f"parameter {name!r} is empty: shape {list(weight.shape)}")
    if count := int((~weight.isfinite()).sum()):
        raise ArtifactError(f"parameter {name!r} holds {count} of {weight.numel()} values that are not finite")
    if storage in CODE_LIMIT:
        if weight.dim() != 2:
            raise ArtifactError(
                f"parameter {name!r} has shape {list(weight.shape)}; {storage.value} stores two dimensions"
            )
        codes_RC, scale_R = quantize_int6(weight) if storage is Storage.INT6 else quantize_int8(weight)
        return StoredTensor(storage, codes_RC.cpu(), scale_R.cpu())
    if storage is Storage.FP16 and (count := int((weight.abs() > FP16_MAX).sum())):
        raise ArtifactError(
            f"parameter {name!r} holds {count} of {weight.numel()} values beyond {FP16_MAX:.0f}, fp16's largest"
        )
    return StoredTensor(storage, weight.to("cpu", VALUE_DTYPE[storage], copy=True))


def _dequantize(stored: StoredTensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if stored.scale_R is None:
        return stored.values.to(device, dtype, copy=True)
    codes_RC, scale_R = stored.values.to(device), stored.scale_R.to(device)
    if stored.storage is Storage.INT6:
        return dequantize_int6(codes_RC, scale_R, dtype)
    return dequantize_int8(codes_RC, scale_R, dtype)
