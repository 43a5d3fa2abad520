"""What the two ways to a device have in common: an endpoint of our own, and a broker. A session knows this module only."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from edged.errors import EdgedError


class Proof(StrEnum):
    """How a device shows who it is."""

    TOKEN = "token"
    PASSWORD = "password"
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a device must show. ``name``: its user name, or its certificate's common name; ``secret``: the access token that it
    gives as user name, or its password."""

    proof: Proof
    name: str
    secret: str = ""

    def key(self) -> bytes:
        """What it is found by: a digest, so that the time of a look-up tells nothing of a secret."""
        shown = self.secret if self.proof is Proof.TOKEN else self.name
        return digest(self.proof, shown)

    def admits(self, password: bytes | None) -> bool:
        """Whether ``password`` belongs to it; takes the same time whatever is wrong with it."""
        if self.proof is not Proof.PASSWORD:
            return True
        return hmac.compare_digest(_sha256(password or b""), _sha256(self.secret.encode()))


def digest(proof: Proof, shown: str) -> bytes:
    """The key under which a device that shows ``shown`` is found."""
    return _sha256(f"{proof} {shown}".encode())


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Guest(Protocol):
    """Who has a device's seat: a session. All methods are called on the event loop and return at once.

    A device that is there already when a session takes its seat has not arrived by that: its connection is an older one.
    """

    def seated(self, seat: Seat) -> None:
        """It has its seat; called first, before there is any news."""
        ...

    def arrived(self) -> None:
        """The device is there, on a connection that it did not have before."""
        ...

    def left(self, why: str) -> None:
        """It is not there any more."""
        ...

    def over(self, fault: EdgedError) -> None:
        """The wire came to an end; nothing is heard from now on."""
        ...

    def heard(self, topic: str, payload: bytes, meaning: object = None) -> bool:
        """It sent a message. ``topic`` is without any prefix; ``meaning``: what :meth:`Seat.foresee` was given for just this
        message. False: no more for now, until :meth:`Seat.more`."""
        ...


class Seat(Protocol):
    """One device's place on a wire. ``silence_s``: so long may the device take nothing of what it is sent, where the wire can
    tell; its session says so."""

    silence_s: float

    @property
    def present(self) -> bool:
        """Whether the device is there, as far as the wire can tell."""
        ...

    @property
    def largest_bytes(self) -> int:
        """So large may the payload of one message to the device be."""
        ...

    @property
    def ready(self) -> bool:
        """Whether :meth:`packed` and :meth:`send_now` may be called: the device is there, and nothing has to be waited for."""
        ...

    async def send(self, topic: str, payload: bytes | memoryview) -> None:
        """Raises ``Transient``: LINK_LOST where the device is not there, NO_RESPONSE where it took nothing for ``silence_s``,
        and was cut off for that."""
        ...

    def packed(self, topic: str, payload: bytes | memoryview) -> bytes:
        """A message as it goes over the device's present connection, for :meth:`send_now`."""
        ...

    def send_now(self, message: bytes) -> None:
        """:meth:`send` at once what was :meth:`packed`; only where the seat is ``ready``."""
        ...

    def foresee(self, topic: str, payload: bytes, meaning: object) -> None:
        """What the device is likely to send next, and what it means: where it comes it is known by its bytes and need not be
        parsed, and is treated as any other message."""
        ...

    async def stream(self, topic: str, length: int, parts: AsyncIterator[bytes]) -> None:
        """A message of ``length`` bytes that are not in memory at once. Where ``parts`` fails the connection is of no more use,
        and the device never sees a message. Errors as :meth:`send`, and what ``parts`` raises."""
        ...

    def tell(self, topic: str, payload: bytes) -> None:
        """:meth:`send` without waiting and without an error, for a farewell."""
        ...

    def more(self) -> None:
        """The guest has room again."""
        ...

    def expel(self, why: str) -> None:
        """End the device's connection, where it has one of its own, for what it did: it is not let in again at once."""
        ...

    def dismiss(self, why: str) -> None:
        """The same of a device that did nothing wrong."""
        ...


class Wire(Protocol):
    """A listener or a broker's connection, shared by many devices."""

    @property
    def address(self) -> str: ...

    @property
    def exclusive(self) -> bool: ...

    def seat(self, name: str, credential: Credential, guest: Guest) -> AbstractAsyncContextManager[Seat]:
        """Take the place of the device ``name``, and hear of it from then on.

        Raises ``Transient(LINK_BUSY)`` where somebody has it, and ``Permanent(CONFIG_INVALID)`` where another device has the
        same credential.
        """
        ...

    def is_present(self, name: str) -> bool:
        """Whether the device ``name`` is there, as far as the wire can tell; also while no session has its seat."""
        ...

    def is_remembered(self, name: str) -> bool:
        """Whether the device ``name`` is there, and what its memory holds was said on the connection that it has now."""
        ...

    async def hears(self, name: str, limit_s: float) -> bool:
        """Whether the device ``name`` says anything within ``limit_s``, beside a session that may have its seat, and without
        taking anything from it. Raises ``Transient(LINK_LOST)``."""
        ...

    def refused(self, name: str) -> str:
        """Who was not let in lately, from where and why, for an operator who misses ``name``; empty where nobody was, or where
        it is not known, as on a broker."""
        ...

    def memory(self, name: str) -> dict[str, object]:
        """Where a session leaves what the next one of the same device should know; as old as the wire."""
        ...
