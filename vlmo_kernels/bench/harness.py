"""Contestants side by side: the correctness gate first, then interleaved rounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .ceiling import Ceiling, Product, best
from .error import Verdict, judge, worst

# Others may sum in another order than eager does and be a few times less exact: that is said, and they are timed.
# Ten times is a mistake. Our own contestants keep the rule itself.
PEER_FACTOR = 10.0


@dataclass
class Contestant:
    """One way to compute a case.

    Attributes:
        name: as in the results.
        forward: the timed call. Contestants may lay their outputs out differently.
        values: an output to the tensor all contestants share: valid tokens in one order.
        grad_out: gradient of the output for the training pass; without it the contestant skips that pass.
        leaves: name to tensor whose gradient is compared; `leaf_values` does for them what `values` does.
        leaf_values: by name, for leaves that are laid out differently.
        scope: a context manager the forward pass runs in.
        note: said beside the result.
        missing: why it cannot run here; it is then named with that reason and not tried.
        unseen_bytes: what it keeps for backward where autograd's hooks do not see it.
    """

    name: str
    forward: Callable[[], torch.Tensor]
    values: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    grad_out: torch.Tensor | None = None
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    leaf_values: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    note: str = ""
    missing: str = ""
    unseen_bytes: int = 0


@dataclass
class Result:
    """What was found about one contestant; `skipped` says why nothing was timed."""

    name: str
    times_ms: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    ceiling: Ceiling | None = None
    note: str = ""
    skipped: str = ""


def run_forward(contestant: Contestant) -> torch.Tensor:
    with torch.inference_mode():
        return contestant.forward()


def run_training(contestant: Contestant) -> torch.Tensor:
    """Forward and backward; gradients are dropped first, so that none accumulates."""
    for leaf in contestant.leaves.values():
        leaf.grad = None
    with torch.enable_grad():
        out = contestant.forward()
        out.backward(contestant.grad_out)
    return out


def results_of(contestant: Contestant, pass_: str) -> dict[str, torch.Tensor]:
    """Output and, in training, gradients in the shape that all contestants share."""
    if pass_ == "forward":
        return {"output": contestant.values(run_forward(contestant))}
    out = {"output": contestant.values(run_training(contestant).detach())}
    for name, leaf in contestant.leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        out[f"grad of {name}"] = contestant.leaf_values.get(name, lambda t: t)(grad).detach().clone()
        leaf.grad = None
    return out


def gate(contestants: Sequence[Contestant], expected: dict[str, torch.Tensor], pass_: str, eager: str) -> list[Result]:
    """Run every contestant once and judge it; the wrong and the failing are skipped from then on.

    Peers that are merely less exact than the rule grants are timed, and the note says so.

    Args:
        expected: the fp64 reference's results, named as `results_of` names them.
        eager: the contestant whose error sets the measure.
    """
    base = next(c for c in contestants if c.name == eager)
    measure = results_of(base, pass_)
    found = []
    for c in contestants:
        result = Result(c.name, note=c.note)
        found.append(result)
        if c.missing:
            result.skipped = f"not here: {c.missing}"
            continue
        if pass_ == "training" and c.grad_out is None:
            result.skipped = "inference only"
            continue
        try:
            with c.scope():
                actual = measure if c is base else results_of(c, pass_)
        except Exception as error:  # a contestant may need what is not here: a compiler, a kernel, memory
            result.skipped = f"failed: {type(error).__name__}: {_first_words(error)}"
            continue
        result.verdict = judge_all(actual, expected, measure)
        if not result.verdict.ok and (c.name.startswith("ours") or not _only_less_exact(result.verdict)):
            result.skipped = f"wrong, so not timed: {result.verdict.why}"
            continue
        if not result.verdict.ok:
            result.note = "; ".join(filter(None, (c.note, f"less exact than eager, {result.verdict.why}")))
        if pass_ == "training":
            result.saved_bytes = saved_bytes(c.forward, c.leaves.values()) + c.unseen_bytes
    return found


def _first_words(error: Exception) -> str:
    """The first line, and the next where the first only announces it, as those of torch.compile do."""
    lines = (str(error).strip() or "?").splitlines()
    return " ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1])[:200]


def _only_less_exact(verdict: Verdict) -> bool:
    return verdict.max_err <= PEER_FACTOR * verdict.max_allowed and verdict.rms_err <= PEER_FACTOR * verdict.rms_allowed


def judge_all(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]
) -> Verdict:
    """The verdict on the output; a rejected gradient overrules it, under its own name."""
    verdicts = {}
    for name in expected:
        if name not in actual:
            continue
        v = judge(actual[name], expected[name], eager[name])
        verdicts[name] = v if v.ok else Verdict(v.max_err, v.rms_err, v.max_allowed, v.rms_allowed, f"{name}: {v.why}")
    bad = [v for v in verdicts.values() if not v.ok]
    return worst(bad) if bad else verdicts["output"]


def saved_bytes(forward: Callable[[], object], parameters: Sequence[torch.Tensor] = ()) -> int:
    """Bytes a forward pass keeps for backward: unique storages, without those of `parameters`."""
    known = {p.untyped_storage().data_ptr() for p in parameters if p.dim() < 3 and isinstance(p, torch.nn.Parameter)}
    kept: dict[int, torch.Tensor] = {}  # the tensors are held, or their addresses would be given out again

    def pack(t: torch.Tensor) -> torch.Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known and not isinstance(t, torch.nn.Parameter):
            kept.setdefault(pointer, t)
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
        total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total


# Beyond it a call waits for the device itself (boolean masks do), and waiting longer would not help.
_LONGEST_QUEUE_MS = 10.0


class Clock:
    """Milliseconds of one call: wall time on the CPU; on a GPU the device's own time, by CUDA events.

    On a GPU the L2 cache is flushed before a call, and the device is kept busy until the host has queued all of it:
    otherwise a call of a few short kernels would be charged for the host's launch time, which a captured graph or the
    work queued before it hides. `host_ms` of a call is told apart.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            self.flush = torch.empty(3 * properties.L2_cache_size, dtype=torch.uint8, device=device)
            self.cycles_per_ms = getattr(properties, "clock_rate", 2_000_000)  # kHz

    def host_ms(self, call: Callable[[], object]) -> float:
        """Wall time until the call has returned; on a GPU its work may still be queued then."""
        if self.cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e3

    def __call__(self, call: Callable[[], object], host_ms: float = 0.0) -> float:
        if not self.cuda:
            return self.host_ms(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(int(min(1.5 * host_ms + 0.1, _LONGEST_QUEUE_MS) * self.cycles_per_ms))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleave(
    calls: dict[str, Callable[[], object]],
    device: torch.device | str,
    rounds: int,
    warmup: int = 1,
    budget_s: float | None = None,
    on_round: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Times in ms. Every round runs every contestant once, each round beginning with another one, so that
    whatever else the machine does meets all of them.

    Args:
        budget_s: no new round begins after this many seconds, except that there are always two.
    """
    clock = Clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    host = dict.fromkeys(names, 0.0)
    for _ in range(warmup + clock.cuda):  # on a GPU the second time tells what the host takes
        for name in names:
            host[name] = clock.host_ms(calls[name])
    begun = time.perf_counter()
    for r in range(rounds):
        if budget_s is not None and r >= 2 and time.perf_counter() - begun > budget_s:
            break
        on_round(f"round {r + 1} of {rounds}")
        turn = r % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            times[name].append(clock(calls[name], host[name]))
    return times


def measure(
    contestants: Sequence[Contestant],
    found: Sequence[Result],
    pass_: str,
    device: torch.device | str,
    rounds: int,
    warmup: int = 1,
    products: dict[str, Product] | None = None,
) -> None:
    """Time what passed the gate, interleaved, into its `Result`; on a GPU also peak memory.

    Args:
        products: bare GEMMs that run in the same rounds; the best rate among them is the ceiling of all results.
    """
    run = run_forward if pass_ == "forward" else run_training
    racing = [(c, r) for c, r in zip(contestants, found, strict=True) if not r.skipped]
    with contextlib.ExitStack() as stack:
        scopes = {c.name: _Scope(c, stack) for c, _ in racing}
        calls = {c.name: (lambda c=c: scopes[c.name](run)) for c, _ in racing}
        products = products or {}
        times = interleave(calls | {n: _inferring(p.call) for n, p in products.items()}, device, rounds, warmup)
        ceiling = best(products, times)
        for c, r in racing:
            r.times_ms, r.ceiling = times[c.name], ceiling
            if torch.device(device).type == "cuda":
                r.peak_bytes = peak_bytes(calls[c.name])
            for leaf in c.leaves.values():
                leaf.grad = None


def _inferring(call: Callable[[], object]) -> Callable[[], object]:
    """The call without autograd, which no product needs."""

    def inferring() -> object:
        with torch.inference_mode():
            return call()

    return inferring


class _Scope:
    """Runs a contestant in its own scope, entered once, so that what the scope caches is kept between rounds."""

    def __init__(self, contestant: Contestant, stack: contextlib.ExitStack) -> None:
        self.contestant = contestant
        self.context = None
        if contestant.scope is not contextlib.nullcontext:
            import contextvars

            # A context of its own: frozen weights must not leak into the other contestants.
            self.context = contextvars.copy_context()
            self.context.run(self._enter)
            stack.callback(self.context.run, self._leave)

    def _enter(self) -> None:
        self.manager = self.contestant.scope()
        self.manager.__enter__()

    def _leave(self) -> None:
        self.manager.__exit__(None, None, None)

    def __call__(self, run: Callable[[Contestant], object]) -> object:
        return run(self.contestant) if self.context is None else self.context.run(run, self.contestant)


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory a call takes on the GPU at most, beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
