"""The privileged helper: upgrades the package and restarts the node, for the daemon, which may do neither.

Runs as root in a process and a control group of its own, started by its socket. It takes fixed verbs from root and from the
daemon's user and is given no file, no path and no command by them: what is installed comes from repositories that apt trusts.

Imports nothing of edged but ``edged_firmware.durable``, and nothing that Python does not bring. All of it is imported before
the first request, since the files that it was loaded from are replaced while it works.
"""
