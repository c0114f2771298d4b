"""The benchmark core: contestants, correctness gate, interleaved timing, JSON rows.

The names imported here are for others who write result files.
"""

from .display import table
from .environment import commit, cpu_supports_bf16, device_name, versions

__all__ = ["commit", "cpu_supports_bf16", "device_name", "table", "versions"]
