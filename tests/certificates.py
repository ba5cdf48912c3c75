"""Certificates of tests: an authority, and servers that it vouches for."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class ServerFiles:
    certificate: Path
    key: Path


class Authority:
    """Its own certificate is `file`; whoever trusts that, trusts the servers."""

    def __init__(self, folder: Path, name: str = "authority"):
        self._folder, self._ca = folder, trustme.CA()
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def certify(self, name: str, *hosts: str) -> ServerFiles:
        """A certificate for these hosts, and its key with mode 0600."""
        issued = self._ca.issue_cert(*hosts)
        files = ServerFiles(self._folder / f"{name}.cert.pem", self._folder / f"{name}.key.pem")
        files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        files.key.touch(mode=0o600)
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files
