"""What must outlive a power cut: SQLite behind one writer thread, and files that are named by their digest.

``database`` owns the connection and the transactions; the other modules are plain functions on a :class:`Tx`,
so that a caller puts any number of them into one transaction. Nothing here decides what should happen: that
is ``domain``.
"""

from __future__ import annotations

from .database import Store, Tx

__all__ = ["Store", "Tx"]
