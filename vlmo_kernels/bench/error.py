"""The rule that says whether a result is close enough, as a value rather than an assertion.

Nobody picks a tolerance: the error against fp64 stays within 2x (largest) and 1.5x (RMS) of what eager torch
makes of the same inputs in the same dtype. One call is judged here, where the tests pool many: a result of few numbers
is granted what chance makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5
# Where eager happens to be exact, 2x of nothing is nothing: (largest, RMS) are never asked to be below this
# many eps of the dtype, times the (largest, RMS) magnitude of what is expected.
FLOOR_EPS = {
    torch.bfloat16: (1.0, 0.5),
    torch.float16: (1.0, 0.5),
    torch.float32: (4.0, 2.0),
    torch.float64: (64.0, 32.0),
}


def hint(device: str) -> str:
    """What to do about an implementation of ours that errs."""
    return (
        f"Hint: `vlmo-kernels check --device {device}` tries every op on small inputs and names what errs; it may "
        "pass where a fault takes the inputs of this run to be seen. impl=\"reference\" is right by definition. "
        "Please report it with the output of `vlmo-kernels info`."
    )


@dataclass(frozen=True)
class Verdict:
    """Errors of a result against fp64, and whether the rule accepts them.

    Attributes:
        max_err, rms_err: of the result.
        max_allowed, rms_allowed: what the rule grants.
        why: empty where the result is accepted, else the reason.
    """

    max_err: float
    rms_err: float
    max_allowed: float
    rms_allowed: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why


def judge(
    actual: torch.Tensor,
    expected: torch.Tensor,
    eager: torch.Tensor,
    more: Sequence[tuple[float, float]] = (),
) -> Verdict:
    """Judge `actual` against `expected` (fp64) by the error of `eager` (the same inputs, op by op).

    Args:
        more: further (largest, RMS) errors that eager torch made of such results; the largest count.
    """
    actual, expected, eager = actual.detach(), expected.detach().to(actual.device), eager.detach()
    nan = float("nan")
    if actual.shape != expected.shape or eager.shape != expected.shape:
        shapes = f"{list(actual.shape)}, fp64 has {list(expected.shape)}, eager {list(eager.shape)}"
        return Verdict(nan, nan, nan, nan, f"shape {shapes}")
    if actual.dtype != eager.dtype:
        return Verdict(nan, nan, nan, nan, f"dtype {actual.dtype}, eager has {eager.dtype}")
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0)
    for what, test in (("NaN", torch.isnan), ("inf", torch.isinf)):
        if not torch.equal(test(actual), test(eager)):
            return Verdict(nan, nan, nan, nan, f"{what} in {int(test(actual).sum())} places, eager differs")
    finite = torch.isfinite(eager) & torch.isfinite(expected)
    target = expected.where(finite, 0.0)
    error = (actual.double().where(finite, 0.0) - target).abs()
    measures = [error_of(eager, expected), *more]
    eager_max, eager_rms = (max(m[i] for m in measures) for i in (0, 1))
    eps = torch.finfo(actual.dtype).eps
    floor_max, floor_rms = FLOOR_EPS[actual.dtype]
    max_allowed = max(MAX_FACTOR * eager_max, floor_max * eps * float(target.abs().max()))
    # An RMS of n numbers is itself uncertain, the ratio of two by 1 / sqrt(n): three times that is chance.
    chance = 1.0 + 3.0 / math.sqrt(actual.numel())
    rms_allowed = max(RMS_FACTOR * chance * eager_rms, floor_rms * eps * rms(target))
    verdict = Verdict(float(error.max()), rms(error), max_allowed, rms_allowed)
    if verdict.max_err > max_allowed or verdict.rms_err > rms_allowed:
        why = (
            f"max error {verdict.max_err:.2e} (allowed {max_allowed:.2e}), "
            f"RMS {verdict.rms_err:.2e} (allowed {rms_allowed:.2e})"
        )
        return Verdict(verdict.max_err, verdict.rms_err, max_allowed, rms_allowed, why)
    return verdict


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest, RMS) error against fp64 where both are finite."""
    if actual.numel() == 0:
        return 0.0, 0.0
    finite = torch.isfinite(actual) & torch.isfinite(expected)
    error = (actual.double() - expected).abs().where(finite, 0.0)
    return float(error.max()), rms(error)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The rejected one if there is one, else the one nearest to its limit."""
    if not verdicts:
        return Verdict(0.0, 0.0, 0.0, 0.0)
    rejected = [v for v in verdicts if not v.ok]
    return rejected[0] if rejected else max(verdicts, key=lambda v: v.max_err / (v.max_allowed or 1.0))


def rms(t: torch.Tensor) -> float:
    """Root mean square."""
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0
