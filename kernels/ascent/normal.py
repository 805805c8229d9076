"""Gaussian noise: each element from N(0, 1)."""

import triton
import triton.language as tl


@triton.jit
def direction(x, state, h):
    """The quantile of ``x`` by Giles' approximation of the inverse error function (2010).

    The coefficients are his times the root of 2, and the relative error is below 2e-7.
    """
    w = -tl.log((1 - x) * (1 + x))
    near = w - 2.5
    p = 3.97426023e-08 * near + 4.85462660e-07
    p = p * near - 4.98282267e-06
    p = p * near - 6.21052811e-06
    p = p * near + 3.09120031e-04
    p = p * near - 1.77303494e-03
    p = p * near - 5.90813403e-03
    p = p * near + 3.48802661e-01
    p = p * near + 2.12331355
    far = tl.sqrt(w) - 3
    q = -2.83145718e-04 * far + 1.42765648e-04
    q = q * far + 1.90825948e-03
    q = q * far - 5.19501232e-03
    q = q * far + 8.11688967e-03
    q = q * far - 1.07797881e-02
    q = q * far + 1.33485786e-02
    q = q * far + 1.41658104
    q = q * far + 4.00643424
    return x * tl.where(w < 5, p, q)


@triton.jit
def radius(rho, norm, total, h):
    return rho
