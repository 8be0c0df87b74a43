"""Elementary functions of the Triton kernels."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(−v)) as the square of a reciprocal root: a division scales its operands against overflow, and exp
    treats subnormal results, which are nothing beside 1; 5 instructions instead of 10."""
    root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2E))
    return root * root


@triton.jit
def softplus(v):
    """log(1 + exp(v)), v beyond 20 as torch has it; log1p without libdevice, by Kahan's quotient."""
    e = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, small)
