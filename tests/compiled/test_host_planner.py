"""The pybind11 planner: the plain twin, malformed lengths, and both routes of ModalityLayout."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import weakref
from array import array

import pytest
import torch

import vlmo_kernels as vk
from tests.common.cases import CASES, MODALITIES
from tests.compiled import twin
from vlmo_kernels.runtime import compiled

planner = compiled.host_planner()
pytestmark = pytest.mark.skipif(planner is None, reason=f"host planner: {compiled.why_not('host_planner')}")


def q(values) -> array:
    return array("q", values)


def by_module(runs: list[list[tuple[int, int]]], starts: list[int]) -> tuple[int, dict[str, list[int]]] | None:
    flat = [run for sample in runs for run in sample]
    try:
        length, *tables = planner.plan(
            q(m for m, _ in flat), q(n for _, n in flat), q(map(len, runs)), q(starts)
        )
    except ValueError:
        return None
    return length, {name: list(memoryview(table)) for name, table in zip(twin.TABLES, tables, strict=True)}


def random_batch(rng: random.Random) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Zero to six samples of zero to six runs; now and then starts, which collide in about half of the cases."""
    modalities = rng.randint(1, 4)
    longest = rng.choice((1, 3, 20))
    runs = [
        [(rng.randrange(modalities), rng.randint(0, longest)) for _ in range(rng.randint(0, 6))]
        for _ in range(rng.randint(0, 6))
    ]
    starts = [-1] * modalities
    if rng.random() < 0.4:
        starts = [rng.choice((-1, 0, rng.randint(0, 60))) for _ in starts]
    return runs, starts


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_batches_are_the_twin(cases: int) -> None:
    rng = random.Random(cases)
    plans = 0
    for _ in range(cases):
        runs, starts = random_batch(rng)
        expected = twin.plan(runs, starts, len(starts))
        assert by_module(runs, starts) == expected, (runs, starts)
        plans += expected is not None
    assert cases * 0.7 < plans < cases, "both plans and refusals must be among the cases"


def malformed(rng: random.Random) -> list[array]:
    """Four buffers of numbers that rarely fit together; no plan of more than a few thousand tokens among them."""
    wild = (-1, -(2**63), 2**63 - 1, 2**62, 2**31, 2**31 - 1, 2**32, -5)

    def number(most: int) -> int:
        return rng.choice(wild) if rng.random() < 0.15 else rng.randint(0, most)

    count = rng.randint(0, 6)
    modality = q(number(2) for _ in range(count))
    length = q(number(5) for _ in range(count if rng.random() < 0.8 else rng.randint(0, 6)))
    of_sample = q(number(3) for _ in range(rng.randint(0, 4)))
    starts = q(rng.choice((-1, 0, 4, 9, *wild)) for _ in range(rng.randint(0, 3)))
    # Legal, and gigabytes: a start just below 2^31 pads every sample to it.
    return [modality, length, of_sample, q(s if s < 2**30 else 2**40 for s in starts)]


@pytest.mark.parametrize("cases", [5_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_malformed_lengths_are_errors(cases: int) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(cases):
        arguments = malformed(rng)
        try:
            length, *tables = planner.plan(*arguments)
        except ValueError as error:
            assert str(error).startswith("host_planner: ") and ", got " in str(error)
            refused += 1
        else:
            rows = memoryview(tables[1])
            assert sorted(rows) == list(range(len(rows))) and length >= 0
    assert cases * 0.5 < refused < cases


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [-1], [1], [-1]), "a length is negative, got -1"),
        (([0], [2**31 - 1], [1], [-1]), "a length is too large, got 2147483647"),
        (([0, 0], [2**31 - 2, 1], [2], [-1]), "a sample is too long, got 2147483647"),
        (([0] * 2, [2**30] * 2, [1] * 2, [-1]), "too many tokens, got 2147483648"),
        (([0] * 3, [2**30, 1, 1], [1] * 3, [-1]), "B * N is 2^31 - 1 or more, with N, got 1073741824"),
        (([1], [1], [1], [-1]), "a modality is out of range, got 1"),
        (([-1], [1], [1], [-1]), "a modality is out of range, got -1"),
        (([0], [1], [], [-1]), "the numbers of runs must add up to the runs, got 1"),
        (([0], [1], [2], [-1]), "the numbers of runs must add up to the runs, got 2"),
        (([0], [1], [2**63 - 1, 1], [-1]), "the numbers of runs must add up to the runs"),
        (([0], [1, 2], [1], [-1]), "every run must have a modality and a length, got 1 and 2"),
        (([0, 1], [3, 3], [2], [0, 2]), "positions collide at, got 2"),
        (([0], [1], [1], []), "the number of modalities must be 1 to 65536, got 0"),
        (([0], [1], [1], [-2]), "a start is out of range, got -2"),
    ],
)
def test_refusals_say_why(arguments, message: str) -> None:
    with pytest.raises(ValueError, match="host_planner: ") as caught:
        planner.plan(*map(q, arguments))
    assert message in str(caught.value)


def test_other_buffers_are_refused() -> None:
    one = q([1])
    for wrong in (array("i", [1]), array("d", [1.0]), memoryview(q(range(4)))[::2], b"12345678", array("Q", [1])):
        with pytest.raises(TypeError, match="contiguous 64-bit integers"):
            planner.plan(q([0]), wrong, one, q([-1]))
    with pytest.raises(TypeError):
        planner.plan([0], [1], [1], [-1])


def assert_same(a: vk.ModalityLayout, b: vk.ModalityLayout) -> None:
    assert (a.modalities, a.batch, a.max_seqlen) == (b.modalities, b.batch, b.max_seqlen)
    for name in (*twin.TABLES, "host_offsets"):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) and x.dtype == y.dtype and x.is_contiguous(), name


def both_routes(monkeypatch, build):
    fast = build()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "host_planner", lambda: None)
        slow = build()
    return fast, slow


@pytest.mark.parametrize("name", CASES)
def test_layouts_are_those_of_torch(name: str, monkeypatch) -> None:
    assert_same(*both_routes(monkeypatch, CASES[name].layout))


def test_lengths_of_every_kind(monkeypatch) -> None:
    import numpy as np

    for lengths in (
        {"text": [3, 0, 2], "image": 4},
        {"text": torch.tensor([3, 0, 2]), "image": np.array([1, 2, 3])},
        {"text": np.int64(2), "image": 0},
        {"text": (1, 2), "image": range(2)},
        {"text": [], "image": 5},
    ):
        assert_same(*both_routes(monkeypatch, lambda lengths=lengths: vk.ModalityLayout.from_lengths(lengths)))


@pytest.mark.parametrize(
    ("error", "build"),
    [
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": [1, -1]})),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": [1, 2], "image": [1]})),
        (TypeError, lambda: vk.ModalityLayout.from_lengths({"text": [1, True]})),
        (TypeError, lambda: vk.ModalityLayout.from_lengths({"text": 1.5})),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": 2**70})),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": [2**31]})),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": 1}, starts={"text": -1})),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": 1}, starts={"image": 1})),
        (ValueError, lambda: vk.ModalityLayout.from_runs([[("text", 1)]], modalities=MODALITIES, starts={"sound": 0})),
        (ValueError, lambda: vk.ModalityLayout.from_runs([[("sound", 1)]], modalities=MODALITIES)),
        (ValueError, lambda: vk.ModalityLayout.from_lengths({"text": 4, "image": 1}, starts={"image": 2})),
    ],
)
def test_errors_are_those_of_torch(error: type[Exception], build, monkeypatch) -> None:
    said = []
    for route in (compiled.host_planner, lambda: None):
        with monkeypatch.context() as patch, pytest.raises(error) as caught:
            patch.setattr(compiled, "host_planner", route)
            build()
        said.append(str(caught.value))
    assert said[0] == said[1] and said[0].startswith("ModalityLayout")


def test_memory_is_kept_and_never_shared() -> None:
    """A freed plan's memory serves the next one, and only once every table of it is gone."""
    lengths = {"text": [7, 3, 11], "image": 5}
    first = vk.ModalityLayout.from_lengths(lengths)
    kept, gone = first.rows, weakref.ref(first)
    expected = kept.clone()
    del first
    assert gone() is None
    others = [vk.ModalityLayout.from_lengths({"text": [1, 9, 2], "image": n}) for n in range(8)]
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + 4 * t.numel())
        for layout in others
        for t in (getattr(layout, name) for name in twin.TABLES)
    )
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), "tables overlap"
    assert torch.equal(kept, expected)


def test_without_the_module_everything_works() -> None:
    program = (
        "import vlmo_kernels as vk\n"
        "from vlmo_kernels.runtime import compiled\n"
        "assert compiled.host_planner() is None and compiled.cpu_ops() is None\n"
        "assert 'VLMO_KERNELS_COMPILED=0' in compiled.why_not('host_planner')\n"
        "assert vk.ModalityLayout.from_lengths({'text': [2, 1], 'image': 3}).tokens == 9\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "VLMO_KERNELS_COMPILED": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
