"""What a process is charged for: the bytes that the kernel cannot take back.

Here is the probe. Budgets, leases and their enforcement are the memory issue's; they stand on it.
"""

from __future__ import annotations

from raypipe.memory.probe import anon_bytes

__all__ = ["anon_bytes"]
