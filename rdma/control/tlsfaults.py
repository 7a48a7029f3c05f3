"""What an error of TLS means for two hosts, and what to do about it. OpenSSL's own words name neither.

Certificates are checked by both ends, and with TLS 1.3 the reader's end is through with the handshake before the agent
has looked at the reader's certificate: its refusal comes later, as an alert in place of the first answer.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

__all__ = ["meaning"]

_SAME_CA: Final = "sign both hosts' certificates by a CA that is in the tls_ca of both"
_DATES: Final = "renew it, or correct that host's clock"

CHECKED_HERE: Final[dict[int, str]] = {  # X509_V_ERR_…
    9: f"the other end's certificate is not valid yet: {_DATES}",
    10: f"the other end's certificate has expired: {_DATES}",
    18: f"the other end's certificate is signed by itself: {_SAME_CA}",
    19: f"the CA of the other end's certificate is not in this host's tls_ca: {_SAME_CA}",
    20: f"the CA of the other end's certificate is not in this host's tls_ca: {_SAME_CA}",
    21: f"the CA of the other end's certificate is not in this host's tls_ca: {_SAME_CA}",
    26: "the other end's certificate is not made for that use: its extended key usage has to allow both ends of TLS",
}
"""What this end has found wrong with the other's certificate."""
NAMES: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and …_IP_ADDRESS_MISMATCH."""

ALERTS: Final[dict[str, str]] = {
    "UNKNOWN_CA": f"it refuses this host's certificate, whose CA is not in its tls_ca: {_SAME_CA}",
    "CERTIFICATE_REQUIRED": "it wants a certificate, and this host shows none: set tls_cert and tls_key",
    "CERTIFICATE_EXPIRED": f"it refuses this host's certificate, which has expired: {_DATES}",
    "CERTIFICATE_REVOKED": "it refuses this host's certificate, which was revoked: have another one made",
    "BAD_CERTIFICATE": "it refuses this host's certificate as no good one (not valid yet, or not made for this use): "
    "look at its own log",
    "CERTIFICATE_UNKNOWN": "it refuses this host's certificate: look at its own log",
    "UNSUPPORTED_CERTIFICATE": "it refuses this host's certificate, which is not made for this use: its extended key "
    "usage has to allow both ends of TLS",
    "DECRYPT_ERROR": "it could not check this host's signature: do tls_cert and tls_key here belong together?",
    "PROTOCOL_VERSION": "the two ends have no version of TLS in common; kvplug speaks 1.3",
    "HANDSHAKE_FAILURE": "the two ends have no way of encrypting in common: compare the OpenSSL of both",
}
"""What the other end has found wrong; OpenSSL writes TLSV1_ALERT_…, TLSV13_ALERT_… or SSLV3_ALERT_… before it."""
_ALERT: Final = re.compile(r"(?:TLSV1|TLSV13|SSLV3)_ALERT_(\w+)")

NO_TLS: Final = (
    "the other end does not speak TLS: set tls_cert, tls_key and tls_ca on both hosts, or on neither; or "
    "something else has this address"
)
REASONS: Final[dict[str, str]] = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "UNKNOWN_PROTOCOL": NO_TLS,
    "PACKET_LENGTH_TOO_LONG": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "HTTP_REQUEST": "the other end speaks HTTP, and this is no web server",
    "HTTPS_PROXY_REQUEST": "the other end takes this for a proxy of the web",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other end shows no certificate: set tls_cert and tls_key there",
    "UNSUPPORTED_PROTOCOL": ALERTS["PROTOCOL_VERSION"],
    "NO_SHARED_CIPHER": ALERTS["HANDSHAKE_FAILURE"],
    "UNEXPECTED_EOF_WHILE_READING": "the other end hung up while TLS was being agreed on: is it an agent, and are its "
    "tls_cert, tls_key and tls_ca set?",
}


def meaning(error: BaseException) -> str:
    """What is wrong and what to do, or "" if it is no error of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in NAMES:
            return (
                f"the other end's certificate does not name the address that was dialled ({error.verify_message}): "
                "dial an address that it names, or put this one into its subjectAltName"
            )
        return CHECKED_HERE.get(error.verify_code, f"the other end's certificate is no good: {error.verify_message}")
    if not isinstance(error, ssl.SSLError):
        return ""
    reason = error.reason or ""
    alert = _ALERT.fullmatch(reason)
    if alert is not None:
        return ALERTS.get(alert[1], f"it broke off ({alert[1].replace('_', ' ').lower()}): look at its own log")
    if isinstance(error, ssl.SSLEOFError):
        reason = "UNEXPECTED_EOF_WHILE_READING"
    return REASONS.get(reason, f"{reason.replace('_', ' ').lower() or error}: look at the other end's log too")
