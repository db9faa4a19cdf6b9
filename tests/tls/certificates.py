"""Certificates for tests. The only place that makes valid and invalid ones."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization

__all__ = ["Certificates"]

KEY_PASSWORD = "k&y p@ss"
NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificates:
    """A CA that both sides trust, and another one that neither side trusts; the files are in `folder`."""

    folder: Path
    ca: trustme.CA
    stranger: trustme.CA

    @classmethod
    def made(cls, folder: Path) -> Certificates:
        made = cls(folder, trustme.CA(), trustme.CA())
        made.ca.cert_pem.write_to_path(made.ca_file)
        made.stranger.cert_pem.write_to_path(made.stranger_file)
        client = made.ca.issue_cert("client@example.org")
        client.private_key_and_cert_chain_pem.write_to_path(made.client_file)
        client.cert_chain_pems[0].write_to_path(folder / "client.crt")
        client.private_key_pem.write_to_path(folder / "client.key")
        key = serialization.load_pem_private_key(client.private_key_pem.bytes(), None)
        encryption = serialization.BestAvailableEncryption(KEY_PASSWORD.encode())
        form = serialization.PrivateFormat.PKCS8
        (folder / "client-encrypted.key").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, form, encryption)
        )
        return made

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def stranger_file(self) -> Path:
        return self.folder / "stranger.pem"

    @property
    def client_file(self) -> Path:
        """Certificate and key of a client, in one file."""
        return self.folder / "client.pem"

    def server(self, *names: str, expired: bool = False, wants_client: bool = False) -> ssl.SSLContext:
        """The certificate of a server, by default for this machine, and whether it requires a client
        certificate."""
        end = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) if expired else None
        begin = datetime.datetime(2019, 1, 1, tzinfo=datetime.UTC) if expired else None
        shown = self.ca.issue_cert(*(names or NAMES), not_before=begin, not_after=end)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.configure_cert(context)
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.ca.configure_trust(context)
        return context
