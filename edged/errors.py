"""The exception tree of the daemon; its roots live in ``edged_firmware.errors``.

::

    EdgedError
    ├── Transient            try again: ``domain.retry`` decides when, the job row remembers
    ├── Permanent            stop, with the reason
    │   └── ConfigError      the configuration cannot be used: file, key, what was found, what is allowed
    └── Refused              not trusted or not allowed: nothing was sent, the audit trail has a row

A library's exception is translated once, in the adapter that imports the library, ``from exc``.
A bug in the core is none of these and is not caught: the process ends and systemd starts it again.
"""

from __future__ import annotations

from edged_firmware.errors import EdgedError, Permanent, Reason, Refused, Transient

__all__ = ["ConfigError", "EdgedError", "Permanent", "Reason", "Refused", "Transient", "meaning"]


class ConfigError(Permanent):
    """The configuration cannot be used.

    ``problems`` has one line for each fault: file, key, what was found, what is allowed.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(Reason.CONFIG_INVALID, "; ".join(problems))
        self.problems = problems


def meaning(error: BaseException) -> EdgedError:
    """What a plugin raised, as the core takes it: an ``EdgedError`` that is whole, or ``Permanent(PLUGIN_FAILED)``."""
    if (
        isinstance(error, EdgedError)
        and isinstance(getattr(error, "reason", None), Reason)
        and isinstance(getattr(error, "detail", None), str)
    ):
        return error
    return Permanent(Reason.PLUGIN_FAILED, repr(error))
