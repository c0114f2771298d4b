"""`python -m vlmo_kernels.tuning`: the same as `vlmo-kernels tune`, for machines without typer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .tune import DTYPES, MODELS, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m vlmo_kernels.tuning", description=__doc__)
    parser.add_argument("--model", default="base", choices=MODELS)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--out", type=Path, help="table to write; by default the user's cache")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter, to try the tuner itself")
    a = parser.parse_args()
    sys.exit(run(a.model, a.pairs, a.dtype, a.budget, a.out, a.device))
