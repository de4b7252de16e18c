"""Tensor ops of the training package: public functions over Triton kernels and their PyTorch definitions.

`GOLF_KERNELS` picks which of the two runs; see `kernels.dispatch`.
"""

from kernels.add_rms_norm import add_rms_norm
from kernels.bigram_hash import bigram_hash, bigram_hash_embed
from kernels.cast_weights import cast_weights
from kernels.input_stage import input_stage
from kernels.int6 import dequantize_int6, fake_quantize_int6, quantize_int6
from kernels.int6_packing import pack_int6, unpack_int6
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.newton_schulz import newton_schulz
from kernels.qk_norm_rotary import qk_norm_rotary
from kernels.smear_gate import smear_gate
from kernels.squared_relu_mlp import squared_relu_mlp
from kernels.squared_relu_mlp_fp8 import squared_relu_mlp_fp8

__all__ = [
    "add_rms_norm",
    "bigram_hash",
    "bigram_hash_embed",
    "cast_weights",
    "dequantize_int6",
    "fake_quantize_int6",
    "input_stage",
    "linear_cross_entropy",
    "newton_schulz",
    "pack_int6",
    "qk_norm_rotary",
    "quantize_int6",
    "smear_gate",
    "squared_relu_mlp",
    "squared_relu_mlp_fp8",
    "unpack_int6",
]
