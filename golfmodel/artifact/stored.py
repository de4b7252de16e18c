"""One parameter as the artifact holds it.

R rows, C columns of a weight matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from golfmodel.model.parameters import Storage

CODE_LIMIT = {Storage.INT6: 31, Storage.INT8: 127}
VALUE_DTYPE = {
    Storage.INT6: torch.int8,
    Storage.INT8: torch.int8,
    Storage.FP16: torch.float16,
    Storage.FP32: torch.float32,
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A parameter in its storage scheme, on the CPU.

    Attributes:
        storage: INT6, INT8, FP16 or FP32.
        values: int8 codes `[R, C]` for INT6 and INT8; float16 or float32 of any shape otherwise.
        scale_R: float16 `[R]`, the weight of one code step in each row; None for FP16 and FP32.
    """

    storage: Storage
    values: Tensor
    scale_R: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's own shape."""
        return tuple(self.values.shape)

    @property
    def raw_bytes(self) -> int:
        """Bytes before compression, scales included."""
        return self.values.nbytes + (0 if self.scale_R is None else self.scale_R.nbytes)

    def problem(self) -> str | None:
        """What breaks the scheme's rules (dtype, rank, range), or None for a sound tensor."""
        if self.storage not in VALUE_DTYPE:
            return f"has scheme {self.storage.value!r}, which is never stored"
        dtype = VALUE_DTYPE[self.storage]
        if self.values.dtype != dtype:
            return f"holds {_dtype(self.values)}; {self.storage.value} needs {str(dtype).removeprefix('torch.')}"
        if self.values.numel() == 0:
            return f"is empty, shape {list(self.shape)}"
        if self.storage in CODE_LIMIT:
            return self._quantized_problem(CODE_LIMIT[self.storage])
        if self.scale_R is not None:
            return f"has a scale, which {self.storage.value} does not use"
        if count := int((~self.values.isfinite()).sum()):
            return f"holds {count} values that are not finite"
        return None

    def _quantized_problem(self, limit: int) -> str | None:
        if self.values.dim() != 2:
            return f"has codes of shape {list(self.shape)}; expected two dimensions"
        if self.scale_R is None:
            return f"has no scale, which {self.storage.value} needs"
        if self.scale_R.dtype != torch.float16 or self.scale_R.shape != self.values.shape[:1]:
            return (
                f"has a {_dtype(self.scale_R)} scale of shape {list(self.scale_R.shape)}; "
                f"expected float16 of shape [{self.values.size(0)}]"
            )
        if not bool((self.scale_R.isfinite() & (self.scale_R > 0)).all()):
            return "has a scale that is not finite and positive"
        low, high = (int(bound) for bound in self.values.aminmax())
        if low < -limit or high > limit:
            return f"has codes from {low} to {high}; {self.storage.value} allows -{limit} to {limit}"
        return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
