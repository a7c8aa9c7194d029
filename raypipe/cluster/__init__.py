"""The only place that knows Ray: sessions, actor pools, descriptor datasets, the trainer.

Compute classes come in as ordinary Python and are wrapped here. Start reading at ``runner``.
"""

from __future__ import annotations
