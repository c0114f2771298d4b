"""Random numbers that are a function of what they are for, not of who drew before.

A draw is a hash of (seed, step, purpose, global sample index, ...), so masks, negatives and DropPath are the same
whether one process has the whole batch or eight have a part each, and after a restart. Steele et al. 2014,
"Fast splittable pseudorandom number generators" (SplitMix64's finaliser).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * _FIRST & _MASK
    z = (z ^ (z >> 27)) * _SECOND & _MASK
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """The same on int64 tensors: products wrap, and shifts are masked because they carry the sign."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def key(seed: int, step: int, purpose: str) -> int:
    """int64 that stands for one kind of draw in one step."""
    z = zlib.crc32(purpose.encode())
    for part in (seed, step):
        z = _mix_int(z + (part + 1) * _GOLDEN)
    return _signed(z)


def uniform(key: int, *counters: Tensor) -> Tensor:
    """One number in [0, 1) for every combination of counters.

    key: from `key`. counters: int64 tensors of broadcastable shapes, on one device, sample indices first.
    Returns fp32 of the broadcast shape, multiples of 2^-24, on that device.
    """
    z = torch.full((), key, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        z = _mix(z + (counter + 1) * _signed(_GOLDEN))
    return ((z >> 40) & ((1 << 24) - 1)).float() * 2.0**-24
