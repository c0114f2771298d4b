"""`python -m vlmo_kernels.bench SUITE`: the same as `vlmo-kernels bench`, for machines without typer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .run import DTYPES, SUITES, run

parser = argparse.ArgumentParser(prog="python -m vlmo_kernels.bench", description=__doc__)
parser.add_argument("suite", choices=SUITES)
parser.add_argument("--device", default="cpu")
parser.add_argument("--json", type=Path)
parser.add_argument("--dtype", action="append", default=[], choices=DTYPES)
parser.add_argument("--case", action="append", default=[])
parser.add_argument("--rounds", type=int, default=10)
a = parser.parse_args()
sys.exit(run(a.suite, a.device, a.json, a.dtype, a.case, a.rounds))
