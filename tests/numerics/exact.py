"""The Gaussian-mixture velocity in 100-digit decimal arithmetic, for one pixel: the textbook form with digits to spare.

Near t = 0 that form loses everything even in float64 (its logits are differences of numbers near 1/t^2). With 100
digits it is right to far beyond float64, t = 0 is the limit taken at t = 1e-25, and derivatives are central differences
with a step of 1e-20. Arrays: means_KC, logweights_K, x_src_C, x_C; numbers: logstd, s (noise level at the source), t.
"""

from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import ArrayLike

DIGITS = 100
TINY_T = Decimal(10) ** -25
STEP = Decimal(10) ** -20

_decimals = np.frompyfunc(lambda value: Decimal(float(value)), 1, 1)  # float64 and float32 values convert exactly


def decimals(values: ArrayLike) -> np.ndarray:
    return np.asarray(_decimals(np.asarray(values, dtype=np.float64)), dtype=object)


def _velocity(
    means_KC: np.ndarray,
    logstd: Decimal,
    logweights_K: np.ndarray,
    x_src_C: np.ndarray,
    s: Decimal,
    x_C: np.ndarray,
    t: Decimal,
) -> np.ndarray:
    t = max(t, TINY_T)
    a_t, a_s = (1 - t) / t, (1 - s) / s
    variance = (s * logstd.exp()) ** 2
    clean_KC = x_src_C - s * means_KC
    zeta = a_t * a_t - a_s * a_s
    nu_C = (1 - t) * x_C / (t * t) - (1 - s) * x_src_C / (s * s)
    precision = 1 / variance + zeta
    shift_KC = clean_KC / variance + nu_C
    logits = (shift_KC**2).sum(1) / (2 * precision) - (clean_KC**2).sum(1) / (2 * variance) + logweights_K
    top = max(logits)
    weights = np.array([(logit - top).exp() for logit in logits], dtype=object)
    x0_C = (weights[:, None] * shift_KC / precision).sum(0) / weights.sum()
    return (x_C - x0_C) / t


def _converted(pixel: tuple[ArrayLike, ...]) -> list:
    return [value if value.ndim else value.item() for value in map(decimals, pixel)]


def gm_velocity(*pixel: ArrayLike) -> np.ndarray:
    """u_C, float64, of (means_KC, logstd, logweights_K, x_src_C, s, x_C, t); log-weights may be -inf."""
    with localcontext(prec=DIGITS, Emin=-(10**15), Emax=10**15):
        return _velocity(*_converted(pixel)).astype(np.float64)


def gm_gradients(*pixel: ArrayLike, cotangent_C: ArrayLike) -> dict[str, np.ndarray]:
    """Derivatives of cotangent . u with respect to means, logstd, logweights and x (0 for a log-weight of -inf)."""
    with localcontext(prec=DIGITS, Emin=-(10**15), Emax=10**15):
        arguments = _converted(pixel)
        cotangent_C = decimals(cotangent_C)

        def slope(position: int, index: tuple[int, ...] | None) -> float:
            ends = []
            for step in (STEP, -STEP):
                moved = list(arguments)
                if index is None:
                    moved[position] = moved[position] + step
                else:
                    moved[position] = moved[position].copy()
                    moved[position][index] += step
                ends.append((_velocity(*moved) * cotangent_C).sum())
            return float((ends[0] - ends[1]) / (2 * STEP))

        names = {"means": 0, "logweights": 2, "x": 5}
        slopes = {name: np.zeros(arguments[position].shape) for name, position in names.items()}
        for name, position in names.items():
            for index in np.ndindex(slopes[name].shape):
                slopes[name][index] = slope(position, index)
        return slopes | {"logstd": np.array(slope(1, None))}
