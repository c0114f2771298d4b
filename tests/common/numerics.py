"""The one rule that says whether a result is close enough.

An implementation may err as much as eager torch does in the same dtype, not more: its error against an fp64
reference stays within 2x (largest) and 1.5x (RMS) of eager's. Nobody picks a tolerance.
"""

from __future__ import annotations

import torch

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5

# Where eager happens to be exact, 2x of nothing is nothing: the allowed (largest, RMS) error is never below
# this many eps of the dtype, times the (largest, RMS) magnitude of what is expected. In 16 bits one rounding
# is at most 0.5 eps, and 1 eps of RMS would let a factor of 1.01 through in bf16 (eps = 0.0078).
# fp64 is compared with itself, so its floor stands for the whole rounding error of a long sum.
FLOOR_EPS = {
    torch.bfloat16: (1.0, 0.5),
    torch.float16: (1.0, 0.5),
    torch.float32: (4.0, 2.0),
    torch.float64: (64.0, 32.0),
}


def assert_close_as_eager(
    actual: torch.Tensor, expected_fp64: torch.Tensor, eager: torch.Tensor, what: str = ""
) -> None:
    """Assert that `actual` is as close to `expected_fp64` as `eager` is.

    Args:
        actual: the result under test, any shape, 0-dimensional and empty included.
        expected_fp64: the reference's result on fp64 copies of the same inputs.
        eager: what eager torch makes of the very same inputs in their own dtype.
        what: the name of the result, for the message.

    Raises:
        AssertionError: shape or dtype differ from eager's, NaN or infinities stand elsewhere than in eager's
            result, or an error is too large. The message names both errors and the worst element.
    """
    prefix = f"{what}: " if what else ""
    actual, expected, eager = (torch.as_tensor(t).detach().cpu() for t in (actual, expected_fp64, eager))
    for name, t in (("actual", actual), ("expected", expected)):
        assert t.shape == eager.shape, (
            f"{prefix}{name} has shape {tuple(t.shape)}, eager {tuple(eager.shape)}"
        )
    assert actual.dtype == eager.dtype, f"{prefix}dtype {actual.dtype}, eager {eager.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, eager), f"{prefix}integers differ from eager's"
        return
    assert expected.dtype == torch.float64, f"{prefix}expected_fp64 has dtype {expected.dtype}"
    if actual.numel() == 0:
        return
    _assert_same_non_finite(actual, eager, prefix)
    finite = torch.isfinite(eager) & torch.isfinite(expected)
    if not finite.any():
        return
    target = expected.where(finite, 0.0)
    error = (actual.double().where(finite, 0.0) - target).abs()
    eager_error = (eager.double().where(finite, 0.0) - target).abs()
    eps = torch.finfo(actual.dtype).eps
    floor_max, floor_rms = FLOOR_EPS[actual.dtype]
    allowed_max = max(MAX_FACTOR * float(eager_error.max()), floor_max * eps * float(target.abs().max()))
    allowed_rms = max(RMS_FACTOR * _rms(eager_error), floor_rms * eps * _rms(target))
    if float(error.max()) <= allowed_max and _rms(error) <= allowed_rms:
        return
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    raise AssertionError(
        f"{prefix}further from fp64 than eager {actual.dtype} is, shape {tuple(actual.shape)}\n"
        f"  max error {float(error.max()):.3e}, eager {float(eager_error.max()):.3e}, "
        f"allowed {allowed_max:.3e}\n"
        f"  RMS error {_rms(error):.3e}, eager {_rms(eager_error):.3e}, allowed {allowed_rms:.3e}\n"
        f"  worst at {at}: actual {float(actual[at])!r}, eager {float(eager[at])!r}, "
        f"expected {float(expected[at])!r}"
    )


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def _assert_same_non_finite(actual: torch.Tensor, eager: torch.Tensor, prefix: str) -> None:
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(eager)
        if differs.any():
            at = tuple(int(i) for i in differs.nonzero()[0])
            raise AssertionError(
                f"{prefix}{name} in {int(test(actual).sum())} places, eager in {int(test(eager).sum())}; "
                f"first at {at}: actual {float(actual[at])!r}, eager {float(eager[at])!r}"
            )
