"""Images and trust: what may be installed, and the proof of it.

Knows nothing of the daemon: it is given bytes, folders and the time, and never asks for them.
"""
