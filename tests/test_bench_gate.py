"""The gate before every timing: who is wrong is not timed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from vlmo_kernels.bench import run
from vlmo_kernels.bench.cases import CASES, Case
from vlmo_kernels.bench.harness import Contestant, gate, measure

SIZE = 4096
EPS = torch.finfo(torch.float32).eps


def contestants():
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    exact = x.double().exp()

    def made(name, function):
        return Contestant(name, lambda: function(x))

    return {"output": exact}, [
        made("eager", torch.exp),
        made("coarse", lambda t: t.exp() * (1 + 12 * EPS)),
        made("mistaken", lambda t: t.exp() * 1.01),
        made("ours", lambda t: t.exp() * (1 + 12 * EPS)),
        made("broken", lambda t: t.reshape(0)),
    ]


def test_ours_keep_the_rule_peers_may_be_a_little_less_exact_and_nobody_may_be_wrong():
    expected, racing = contestants()
    found = {r.name: r for r in gate(racing, expected, "forward", "eager")}
    assert not found["eager"].skipped and not found["coarse"].skipped
    assert "less exact than eager" in found["coarse"].note
    assert found["ours"].skipped.startswith("wrong") and found["mistaken"].skipped.startswith("wrong")
    assert found["broken"].skipped.startswith("failed: RuntimeError")


def test_the_reason_is_said_and_not_only_announced():
    def failing():
        raise RuntimeError("backend raised:\nno such platform\nand much more")

    expected, racing = contestants()
    racing[1].forward, racing[2].missing = failing, "it needs a GPU"
    found = {r.name: r for r in gate(racing, expected, "forward", "eager")}
    assert found["coarse"].skipped == "failed: RuntimeError: backend raised: no such platform"
    assert found["mistaken"].skipped == "not here: it needs a GPU" and found["mistaken"].verdict is None


def test_every_round_runs_everybody_who_passed():
    expected, racing = contestants()
    found = gate(racing, expected, "forward", "eager")
    measure(racing, found, "forward", "cpu", rounds=3)
    assert {r.name: len(r.times_ms) for r in found} == {"eager": 3, "coarse": 3, "mistaken": 0, "ours": 0, "broken": 0}


@pytest.mark.parametrize("suite", run.SUITES)
def test_compiled_contestants_are_compiled_for_the_shapes_of_every_case(suite, monkeypatch):
    sizes = []  # of every case those of every graph

    def backend(graph, inputs):
        sizes[-1].append({type(n) for t in inputs if isinstance(t, torch.Tensor) for n in t.shape})
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for samples in (2, 3, 4):
        case = Case(f"{samples} samples", 32, 2, 64, (3,) * samples, (4,) * samples, 3, 4)
        monkeypatch.setitem(CASES, case.name, case)
        sizes.append([])
        run.run_case(suite, case.name, torch.float32, "forward", "cpu", rounds=1)
    graphs = 2 if suite == "attention" else 1  # `compile`, and there `flex`
    assert sizes == [[{int}] * graphs] * 3
