"""Signals of raw frames, as a DBC file describes them. cantools reads the file; it is used where it is installed.

Reading the file blocks, and so does importing cantools: :func:`load` is for a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final

from edged.api import JsonValue, Reported
from edged.errors import Permanent, Reason
from edged_can.frames import Frame
from edged_can.transport import FRAME_BYTES

_CURE: Final = "pip install --target /opt/edged/plugins cantools"

Key = tuple[int, bool]


def load(
    path: str, signals: tuple[str, ...], commands: tuple[str, ...], every_s: float, *, fd: bool = False
) -> Signals:
    """The signals ``MESSAGE.SIGNAL`` of the file at ``path``: ``signals`` are reported, ``commands`` can be set. ``fd``: the
    bus carries CAN FD.

    Raises Permanent: UNSUPPORTED without cantools, CONFIG_INVALID for a file or a name that is not there, and for a command
    whose frame the bus does not carry.
    """
    try:
        from cantools import database
        from cantools.database import errors
    except ImportError as error:
        raise Permanent(Reason.UNSUPPORTED, f"dbc needs cantools: {error}; {_CURE}") from error
    try:
        found = database.load_file(path, database_format="dbc")
    except (OSError, UnicodeDecodeError, errors.Error) as error:
        text = str(error).splitlines()[0] if str(error) else repr(error)
        raise Permanent(Reason.CONFIG_INVALID, f"dbc: {path}: {text}") from error
    loaded = Signals(found, errors.Error, signals, commands, every_s)
    for name, (message, _) in loaded.commands.items():
        if _wants_fd(message) and not fd:
            text = f"commands: found {name!r}, whose frame of {message.length} bytes is of CAN FD"
            raise Permanent(Reason.CONFIG_INVALID, f"{text}; allowed: on a bus with a data bit rate")
    return loaded


class Signals:
    """The signals of one device. A frame is told of at most every ``every_s`` seconds for each identifier, and for each page
    of a multiplexed one."""

    def __init__(
        self,
        database: Any,
        library_error: type[Exception],
        signals: tuple[str, ...],
        commands: tuple[str, ...],
        every_s: float,
    ) -> None:
        self._database = database
        self._unfit = (library_error, ValueError, KeyError, TypeError, OverflowError)
        self._every_s = every_s
        self._wanted: dict[Key, set[str]] = {}
        self._due: dict[Hashable, float] = {}
        for name in signals:
            message, signal = self._find(name)
            self._wanted.setdefault((message.frame_id, message.is_extended_frame), set()).add(signal)
        self.commands = {name: self._find(name) for name in commands}

    @property
    def ids(self) -> frozenset[Key]:
        """The frames to listen for."""
        return frozenset(self._wanted)

    def decode(self, frame: Frame, now: Callable[[], float]) -> Iterator[Reported]:
        """What the frame says, of the signals that are wanted; nothing where it cannot be decoded."""
        key = frame.id, frame.extended
        message = self._database.get_message_by_frame_id(frame.id, force_extended_id=frame.extended)
        has_pages = message.is_multiplexed()
        if not has_pages and not self._is_due(key, now()):
            return
        try:
            values = message.decode(frame.data, decode_choices=True)
        except self._unfit:
            # too short, or a multiplexer that the file does not know: another sender's frame
            return
        if has_pages and not self._is_due((key, frozenset(values)), now()):
            return
        for signal in message.signals:
            if signal.name in self._wanted[key] and signal.name in values:
                yield Reported(
                    f"{message.name}.{signal.name}", _plain(values[signal.name]), signal.unit or None
                )

    def encode(self, name: str, value: JsonValue) -> Frame:
        """The frame that sets a command; its other signals have their initial values.

        Raises Permanent(REQUEST_INVALID) for a value that the signal cannot hold.
        """
        message, wanted = self.commands[name]
        values = {signal.name: signal.raw_initial or 0 for signal in message.signals}
        raw = {name: message.get_signal_by_name(name).raw_to_scaled(raw) for name, raw in values.items()}
        try:
            data = message.encode(raw | {wanted: value}, strict=True)
        except self._unfit as error:
            raise Permanent(Reason.REQUEST_INVALID, f"{name}: found {value!r}; {error}") from error
        fd = _wants_fd(message)
        size = next((size for size in FRAME_BYTES if size >= len(data)), len(data)) if fd else len(data)
        return Frame(message.frame_id, bytes(data).ljust(size, b"\0"), message.is_extended_frame, fd)

    def _is_due(self, what: Hashable, now: float) -> bool:
        """Whether ``what`` is to be told; it is due again after ``every_s``."""
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + self._every_s
        return True

    def _find(self, name: str) -> tuple[Any, str]:
        title, _, signal = name.partition(".")
        try:
            message = self._database.get_message_by_name(title)
            message.get_signal_by_name(signal)
        except KeyError:
            known = ", ".join(
                sorted(f"{each.name}.{one.name}" for each in self._database.messages for one in each.signals)
            )
            text = f"signals: found {name!r}; the file has {known or 'none'}"
            raise Permanent(Reason.CONFIG_INVALID, text) from None
        return message, signal


def _plain(value: Any) -> JsonValue:
    """A number, or the word that the file has for it; None for a number that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else str(value)


def _wants_fd(message: Any) -> bool:
    """The file says so, or it is too long for any other frame."""
    return bool(message.is_fd) or message.length > 8
