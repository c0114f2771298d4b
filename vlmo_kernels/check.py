"""`vlmo-kernels check`: every op and implementation against fp64 on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bench import probe
from .bench.display import progress, table
from .bench.error import MAX_FACTOR, RMS_FACTOR, Verdict, judge, worst
from .runtime.dispatch import IMPLEMENTATIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 gradients of sums over many rows overflow nothing here: operands are of order 1 and rows are few.


@dataclass(frozen=True)
class Case:
    """A batch with the reason it is here.

    Attributes:
        runs: for every sample its runs of modalities.
        width: of the model.
        strided: activations are views, neither contiguous nor at the start of their storage.
    """

    name: str
    runs: tuple[tuple[tuple[str, int], ...], ...]
    width: int = 64
    strided: bool = False


_PAIR = (("text", 5), ("image", 9))
CASES = {
    case.name: case
    for case in (
        Case("no tokens", ((),)),
        Case("1 token: the image expert is empty", ((("text", 1),),)),
        Case("63 tokens: below every tile", ((("text", 23), ("image", 40)),)),
        Case("237 tokens: a padded VLMo pair", ((("text", 40), ("image", 197)),)),
        Case("all tokens to one expert", ((("image", 17),), (("image", 9),))),
        Case("single modalities in one batch", ((("text", 7),), (("image", 9),), _PAIR)),
        Case("an empty sample among others", (_PAIR, (), _PAIR)),
        Case("one-token alternation", ((("text", 1), ("image", 1)) * 12,)),
        Case("width 34: no multiple of 16", (_PAIR, _PAIR[::-1]), width=34),
        Case("strided input with an offset", (_PAIR, _PAIR), strided=True),
    )
}


def run(device: str = "", ops: Sequence[str] = (), dtypes: Sequence[str] = (), cases: Sequence[str] = ()) -> int:
    """Check, print a table, and answer 1 if anything failed, else 0."""
    for kind, names, known in (("op", ops, probe.OPS), ("case", cases, CASES), ("dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise ValueError(f"check: {kind} must be one of {', '.join(known)}, got {name!r}")
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if "cuda" in devices and not torch.cuda.is_available():
        raise RuntimeError("check: device cuda needs a GPU that torch can use, none was found")
    chosen = {name: DTYPES[name] for name in dtypes or DTYPES}
    plan = [
        (d, op, impl, name) for d in devices for op in ops or probe.OPS for impl in IMPLEMENTATIONS for name in chosen
    ]
    lines, failures, checks = [], [], 0
    with progress("check", len(plan)) as bar:
        for device_, op, impl, name in plan:
            bar.step(f"{op}, {impl}, {name}, {device_}")
            why = _why_not(op, impl, device_, chosen[name])
            where = [op, impl, name, device_]
            if why:
                lines.append([*where, "-", "-", f"not here: {why}"])
                continue
            verdicts = {case: check_case(op, impl, chosen[name], CASES[case], device_) for case in cases or CASES}
            bad = {case: v for case, v in verdicts.items() if not v.ok}
            checks += len(verdicts)
            failures += [f"{op} {impl} {name} {device_}, {case}: {v.why}" for case, v in bad.items()]
            closest = worst(list(verdicts.values()))
            share = closest.max_err / closest.max_allowed if closest.max_allowed else 0.0
            said = f"{len(bad)} of {len(verdicts)} FAILED" if bad else f"{len(verdicts)} ok"
            lines.append([*where, f"{closest.max_err:.1e}", f"{share:.0%}", said])
    columns = ["op", "implementation", "dtype", "device", "max error", "of allowed", "cases"]
    table("check: output and every gradient against fp64", columns, lines,
          f"allowed: {MAX_FACTOR:g}x (largest) and {RMS_FACTOR:g}x (RMS) of the error of eager torch in the same dtype")  # fmt: skip
    print("\n".join(failures) if failures else f"{checks} checks, all passed")
    return int(bool(failures) or not checks)


def _why_not(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why an implementation cannot run, or nothing."""
    parts = probe.EXPLAINED_OPS if op == "mome_block" else (op,)
    for part in parts:
        found = probe.explain_op(part, device, dtype, impl)
        if found.chosen is None:
            return found.rejected.get(impl, "no reason given")
    return ""


def check_case(op: str, impl: str, dtype: torch.dtype, case: Case, device: str) -> Verdict:
    """Output and all gradients of one case; an exception is a failure like any other."""
    layout = probe.make_layout([list(sample) for sample in case.runs], device)
    call = probe.make_call(op, layout, case.width, dtype, case.strided)
    try:
        expected = _results(call.to(torch.float64), "reference")
        eager = _results(call.to(dtype), EAGER)
        actual = _results(call.to(dtype), impl)
    except Exception as error:  # the table must go on to the other cases
        nan = float("nan")
        return Verdict(nan, nan, nan, nan, f"{type(error).__name__}: {error}")
    found = []
    for name in expected:
        v = judge(actual[name], expected[name], eager[name])
        found.append(v if v.ok else Verdict(v.max_err, v.rms_err, v.max_allowed, v.rms_allowed, f"{name}: {v.why}"))
    return worst(found)


EAGER = "eager"


def _results(call: probe.Call, impl: str) -> dict[str, torch.Tensor]:
    if impl == EAGER:
        from .bench.eager import run as eager

        y = eager(call)
    else:
        y = call(impl)
    generator = torch.Generator().manual_seed(4)
    dy = torch.randn(y.shape, generator=generator).to(y.device, torch.bfloat16).to(y.dtype)
    y.backward(dy)
    grads = {f"grad of {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in call.tensors.items()}
    return {"output": y.detach(), **grads}
