"""Which implementation of an op runs, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache

import torch

IMPLEMENTATIONS = ("triton", "cpu", "reference")
_FOLDER = {"triton": "kernels", "cpu": "cpu", "reference": "reference"}
_explaining: ContextVar[bool] = ContextVar("explaining", default=False)


@dataclass(frozen=True)
class Explanation:
    """What `vlmo_kernels.explain` answers.

    Attributes:
        op: name of the op.
        chosen: the implementation that runs, or None if none can; "mixed" where the parts of an op differ.
        rejected: implementation to the reason why it does not run.
        how: what the chosen implementation computes with, where it has a choice.
        parts: for an op made of others (`mome_block`), what runs for each.
        configurations: kernel launch to where its tile sizes come from: the heuristics or a measured table.
    """

    op: str
    chosen: str | None
    rejected: dict[str, str] = field(default_factory=dict)
    how: str | None = None
    parts: tuple[Explanation, ...] = ()
    configurations: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no implementation can run'}"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        lines += [f"  {self.chosen} runs {self.how}"] if self.how else []
        lines += [f"  configuration of {launch}: {source}" for launch, source in self.configurations.items()]
        return "\n".join(lines + ["  " + line for part in self.parts for line in str(part).splitlines()])


class _Explained(Exception):
    def __init__(self, explanation: Explanation, request: Request) -> None:
        self.explanation, self.request = explanation, request


@dataclass(frozen=True)
class Request:
    """The properties of a call that decide which implementation can take it."""

    op: str
    device: torch.device
    dtype: torch.dtype
    features: frozenset[str] = frozenset()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(request: Request) -> str | None:
    if request.device.type != "cuda" and not interpreting():
        return f"needs a CUDA device (or TRITON_INTERPRET=1), got {request.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if request.device.type == "cuda" and torch.cuda.get_device_capability(request.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernels for {request.dtype}"
    return None


def _why_not_cpu(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"needs CPU tensors, got {request.device.type}"
    return load(request.op, "cpu").why_not(request)


_WHY_NOT = {"triton": _why_not_triton, "cpu": _why_not_cpu, "reference": lambda request: None}


def load(op: str, implementation: str):
    """The module of one implementation of one op, with `forward` and `backward`."""
    return importlib.import_module(f"vlmo_kernels.{_FOLDER[implementation]}.{op}")


def implementation(op: str, impl: str, x: torch.Tensor, *features: str):
    """The module that computes an op whose main argument is `x`; compiled code arrives here with "auto"."""
    if impl == "auto":
        impl = select(Request(op, x.device, x.dtype, frozenset(features)), impl)
    return load(op, impl)


def check_impl(op: str, impl: str) -> str:
    """`impl` as it is, if it names an implementation or "auto"."""
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{op}: `impl` must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl


@cache
def _explanation(request: Request, impl: str) -> Explanation:
    if impl != "auto":
        why = _WHY_NOT[impl](request)
        rejected = {name: "another was asked for" for name in IMPLEMENTATIONS if name != impl}
        return Explanation(request.op, None, {impl: why}) if why else Explanation(request.op, impl, rejected)
    rejected: dict[str, str] = {}
    # The interpreter proves kernels; it is far too slow to be anybody's default.
    candidates = ("triton",) if request.device.type != "cpu" else ("cpu", "reference")
    for name in IMPLEMENTATIONS:
        if name in candidates:
            why = _WHY_NOT[name](request)
            if why is None:
                later = IMPLEMENTATIONS[IMPLEMENTATIONS.index(name) + 1 :]
                rejected |= {other: f"{name} comes first" for other in later}
                return Explanation(request.op, name, rejected)
            rejected[name] = why
        else:
            rejected[name] = _WHY_NOT[name](request) or f"never chosen by itself on {request.device.type}"
    return Explanation(request.op, None, rejected)


def select(request: Request, impl: str) -> str:
    """The implementation to run. Under `torch.compile` "auto" stays "auto": the op itself chooses when it runs.

    Raises:
        ValueError: no such implementation.
        RuntimeError: none can; the message names the reasons and the ways out.
    """
    check_impl(request.op, impl)
    if torch.compiler.is_compiling():
        return impl
    explanation = _explanation(request, impl)
    if _explaining.get():
        raise _Explained(explanation, request)
    if explanation.chosen is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in explanation.rejected.items())
        raise RuntimeError(
            f"{request.op}: no implementation can run impl={impl!r} on {request.device} in {request.dtype} "
            f"({reasons}). Hint: impl='reference' runs anywhere, slowly"
        )
    return explanation.chosen


def _configurations(found: _Explained, given: dict[str, object]) -> dict[str, str]:
    """Launch to the source of its configuration, for the ops that have tables."""
    tables = importlib.import_module("vlmo_kernels.tuning.tables")
    problems = getattr(load(found.request.op, "triton"), "problems", None)
    known = problems(given, found.request.dtype) if problems else []
    return {str(problem): tables.source(problem, found.request.device) for problem in known}


def _how(found: _Explained) -> str | None:
    """What the CPU path computes with, where it has a choice."""
    if found.explanation.chosen != "cpu":
        return None
    how = getattr(load(found.request.op, "cpu"), "how", None)
    return how(found.request) if how else None


def _by_name(function, args, kwargs) -> dict[str, object]:
    """All arguments of a call, defaults included."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def explain(op: str, *args, **kwargs) -> Explanation:
    """Which implementation of `op` would run for these arguments, and why the others would not.

    The arguments are checked as in a call; nothing is computed.

    Args:
        op: name of a public op, for example "routed_ffn".
        *args, **kwargs: what the op would be called with.

    Raises:
        ValueError: no such op.
        TypeError: arguments that the op does not have, or not all that it needs.
        Whatever a call would raise about its arguments.

    Example:
        >>> print(explain("routed_linear", x, weights, biases, layout))  # doctest: +SKIP
        routed_linear: cpu
          not triton: needs a CUDA device (or TRITON_INTERPRET=1), got cpu
          not reference: cpu comes first
    """
    ops = importlib.import_module("vlmo_kernels.ops")
    names = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
    if op not in names:
        raise ValueError(f"explain: `op` must be one of {', '.join(names)}, got {op!r}")
    function = getattr(ops, op)
    try:
        given = _by_name(function, args, kwargs)
    except TypeError as error:
        raise TypeError(
            f"explain: after {op!r} must come what {op} takes, {', '.join(inspect.signature(function).parameters)}; "
            f"{error}"
        ) from None
    if op == "mome_block":
        calls = importlib.import_module("vlmo_kernels.ops.mome_block").calls
        parts = tuple(explain(name, *a, **k) for name, a, k in calls(given))
        chosen = {part.chosen for part in parts}
        agreed = chosen.pop() if len(chosen) == 1 else None if None in chosen else "mixed"
        return Explanation(op, agreed, parts=parts)
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as found:
        sources = _configurations(found, given) if found.explanation.chosen == "triton" else {}
        return replace(found.explanation, how=_how(found), configurations=sources)
    finally:
        _explaining.reset(token)
    raise RuntimeError(f"explain: {op} asked for no implementation")
