"""A token server on loopback. Its tokens are signed, so docker-registry accepts them."""

from __future__ import annotations

import base64
import datetime
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

ISSUER = "tokens of the tests"
SERVICE = "registry of the tests"


class Signer:
    """A key that signs tokens, and the certificate that verifies them."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        self._certificate = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .sign(self._key, hashes.SHA256())
        )

    def write_certificate(self, path: Path) -> None:
        path.write_bytes(self._certificate.public_bytes(Encoding.PEM))

    def token(self, subject: str, scopes: list[str]) -> str:
        """Return a JSON Web Token (RFC 7519, distribution's ``spec/auth/jwt.md``)."""
        now = int(time.time())
        certificate = base64.b64encode(self._certificate.public_bytes(Encoding.DER)).decode()
        header = {"typ": "JWT", "alg": "ES256", "x5c": [certificate]}
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": SERVICE,
            "iat": now,
            "nbf": now - 10,
            "exp": now + 300,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        signed = f"{_encode(json.dumps(header))}.{_encode(json.dumps(claims))}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _encode(data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@attrs.define
class TokenServer:
    """A running server. Its attributes may be changed at any time.

    Attributes:
        realm: Its URL.
        signer: Signs the tokens.
        passwords: The passwords by user.
        refresh_tokens: The user of each refresh token. Each is valid once, and replaced by the
            next.
        post_status: The status of all POST requests; ``None`` for the usual one.
        requests: The method of each request, and the kind of login that it contained.
        given: All issued tokens and refresh tokens.
    """

    realm: str
    signer: Signer
    passwords: dict[str, str]
    refresh_tokens: dict[str, str] = attrs.field(factory=dict)
    post_status: int | None = None
    requests: list[tuple[str, str]] = attrs.field(factory=list)
    given: list[str] = attrs.field(factory=list)

    def config(self, certificate: Path) -> str:
        """Return the settings that make docker-registry use this token server."""
        self.signer.write_certificate(certificate)
        return (
            f"auth: {{token: {{realm: {self.realm}, service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: {certificate}}}}}\n"
        )

    def answer(
        self, method: str, fields: dict[str, list[str]], authorization: str
    ) -> tuple[int, dict[str, object]]:
        scopes = " ".join(fields.get("scope", [])).split()
        assert fields["service"] == [SERVICE]
        more: dict[str, object] = {}
        if method == "POST":
            self.requests.append(("POST", fields["grant_type"][0]))
            if self.post_status is not None:
                return self.post_status, {}
            assert fields["client_id"] != [""]
            [refresh] = fields["refresh_token"]
            user = self.refresh_tokens.pop(refresh, None)
            if user is None:
                return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "used up"}]}
            following = secrets.token_hex(16)
            self.refresh_tokens[following] = user
            self.given.append(following)
            more["refresh_token"] = following
        else:
            self.requests.append(("GET", authorization.partition(" ")[0]))
            pair = base64.b64decode(authorization.removeprefix("Basic ")).decode()
            user, _, password = pair.partition(":")
            known = self.passwords.get(user) == password or self.refresh_tokens.get(password)
            if not known:
                return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}
        token = self.signer.token(user, scopes)
        self.given.append(token)
        name = "access_token" if method == "POST" else "token"
        return 200, {name: token, "expires_in": 300, **more}


@contextmanager
def run_token_server(**passwords: str) -> Iterator[TokenServer]:
    """Run a token server in a thread, on a port that the system chooses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET", urlsplit(self.path).query)

        def do_POST(self) -> None:
            self._answer("POST", self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _answer(self, method: str, query: str) -> None:
            authorization = self.headers.get("Authorization", "")
            status, document = server.answer(method, parse_qs(query), authorization)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = TokenServer(f"http://127.0.0.1:{http.server_port}/token", Signer(), passwords)
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
