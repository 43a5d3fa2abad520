"""The node's sides of TLS: towards devices, and towards a broker. Reads files, so it is called off the event loop."""

from __future__ import annotations

import ssl

from edged.api import Env
from edged.errors import Permanent, Reason
from edged_mqtt.config import BrokerConfig, ListenConfig


def server_context(config: ListenConfig, env: Env) -> ssl.SSLContext:
    """The side of a listener. Raises ``Permanent(CONFIG_INVALID)``."""
    context = _context(ssl.Purpose.CLIENT_AUTH)
    key = env.credential_file(config.key_credential)
    try:
        context.load_cert_chain(config.certificate, key)
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            required = config.client_certificates == "required"
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    except (OSError, ValueError) as exc:
        text = f"certificate {config.certificate} with the key in credential {config.key_credential!r}: {exc}"
        raise Permanent(Reason.CONFIG_INVALID, text) from exc
    return context


def client_context(config: BrokerConfig, env: Env) -> ssl.SSLContext:
    """The side of a broker's client. Raises ``Permanent(CONFIG_INVALID)``."""
    try:
        context = _context(ssl.Purpose.SERVER_AUTH, config.ca)
        if config.certificate:
            context.load_cert_chain(config.certificate, env.credential_file(config.key_credential))
    except (OSError, ValueError) as exc:
        raise Permanent(Reason.CONFIG_INVALID, f"keys of the broker's connection: {exc}") from exc
    return context


def _context(purpose: ssl.Purpose, ca: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cafile=ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 sets it: then an authority without the extension keyUsage, or without key identifiers, vouches for nobody. A
    # plant's own authority is often such, by OpenSSL's plain commands, and its devices outlive the node's Debian 12.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
