"""Tensor ops of the training package: public functions over Triton kernels and their PyTorch definitions.

`GOLF_KERNELS` picks which of the two runs; see `kernels.dispatch`.
"""

from kernels.bigram_hash import bigram_hash as bigram_hash
from kernels.bigram_hash import bigram_hash_embed as bigram_hash_embed
from kernels.int6 import dequantize_int6 as dequantize_int6
from kernels.int6 import fake_quantize_int6 as fake_quantize_int6
from kernels.int6 import pack_int6 as pack_int6
from kernels.int6 import quantize_int6 as quantize_int6
from kernels.int6 import unpack_int6 as unpack_int6
from kernels.newton_schulz import newton_schulz as newton_schulz
from kernels.smear_gate import smear_gate as smear_gate
