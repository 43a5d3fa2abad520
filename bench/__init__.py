"""Benchmarks: ``python -m bench [NAME ...] [--quick]``.

Each figure is a ratio against a peer or a physical limit that was measured in the same run on the same machine, so that it
can be compared between machines. Nothing here is imported by the daemon.
"""
