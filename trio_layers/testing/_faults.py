"""Faults of a registry's answers, as values.

A fault changes the request before the registry sees it, or the answer before it is sent. Tests
can define other faults in the same way.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping

import attrs

from ._auth import TOKEN_PATH
from ._http import Answer, Blob, Request, error_answer

__all__ = [
    "Challenge",
    "Corrupt",
    "Cut",
    "Delay",
    "Drop",
    "Encoded",
    "Fault",
    "IgnoreRange",
    "Longer",
    "NoLength",
    "Raw",
    "Redirect",
    "Reply",
    "Shorter",
    "Slow",
    "SlowHead",
    "Stall",
    "WrongRange",
    "WrongTotal",
]


@attrs.frozen
class Fault:
    """The base class of all faults. It changes nothing."""

    def change_request(self, request: Request) -> Request:
        """Return the request that the registry sees instead."""
        return request

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        """Return the answer that is sent instead."""
        return answer


@attrs.frozen
class Reply(Fault):
    """Sends another answer: a proxy's error, a 429 with ``Retry-After``, a 404.

    Attributes:
        status: The HTTP status.
        headers: The headers, such as ``{"Retry-After": "3"}``.
        body: The body.
    """

    status: int
    headers: Mapping[str, str] = attrs.field(factory=dict, kw_only=True, hash=False)
    body: bytes = attrs.field(default=b"", kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        size = len(self.body)
        return Answer(
            status=self.status,
            headers={"Content-Length": str(size), **self.headers},
            blob=Blob(self.body, size),
            stop=size,
        )


@attrs.frozen
class Redirect(Fault):
    """Redirects the client to another server, as registries do with a CDN.

    Attributes:
        to: Scheme, host and port, such as another registry's `~Registry.url`. Path and query
            stay the same.
        status: The HTTP status of the redirect.
    """

    to: str
    status: int = attrs.field(default=307, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        query = f"?{request.query}" if request.query else ""
        location = f"{self.to}{request.path}{query}"
        return Answer(status=self.status, headers={"Location": location, "Content-Length": "0"})


@attrs.frozen
class Challenge(Fault):
    """Sends a 401 that asks for a login, even if the client has credentials.

    Attributes:
        scheme: The scheme that the 401 asks for: ``Basic``, ``Bearer`` or any other name. For
            ``Bearer``, it names the registry itself as the server for tokens; the registry has
            tokens if its auth is a `TokenAuth`.
        other: The scheme for a client that used ``scheme``, so that the two schemes alternate.
            ``None`` asks for ``scheme`` again.
    """

    scheme: str
    other: str | None = None

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        used = request.headers.get("authorization", "").partition(" ")[0]
        scheme = self.scheme
        if self.other is not None and used.lower() == scheme.lower():
            scheme = self.other
        realm = f"{request.origin}{TOKEN_PATH}" if scheme.lower() == "bearer" else "here"
        challenge = {"WWW-Authenticate": f'{scheme} realm="{realm}"'}
        return error_answer(401, "UNAUTHORIZED", "authentication required", challenge)


@attrs.frozen
class Drop(Fault):
    """Closes the connection without an answer."""

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, dropped=True)


@attrs.frozen
class Delay(Fault):
    """Delays the answer by some seconds of trio's time."""

    seconds: float

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, delay=self.seconds)


@attrs.frozen
class Cut(Fault):
    """Closes the connection after some bytes of the body.

    Attributes:
        after: The number of bytes. If the body is not longer, nothing happens.
        reset: Reset the connection, as a crashed host or a firewall does. Then bytes may be lost
            on their way, and clients see another error.
    """

    after: int
    reset: bool = attrs.field(default=False, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, cut_after=self.after, cut_by_reset=self.reset)


@attrs.frozen
class Stall(Fault):
    """Stops after ``after`` bytes of the body for some seconds, or for ever."""

    after: int
    seconds: float = math.inf

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, stall_after=self.after, stall_seconds=self.seconds)


@attrs.frozen
class NoLength(Fault):
    """Omits the ``Content-Length``; over a socket, the body comes in chunks."""

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, headers=_without(answer.headers, "Content-Length"))


@attrs.frozen
class Slow(Fault):
    """Sends the body slowly; a few bytes per second make a slow loris.

    Attributes:
        bytes_per_second: Bytes per second of trio's time.
        after: The number of bytes that are sent at full speed before.
    """

    bytes_per_second: float
    after: int = attrs.field(default=0, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, bytes_per_second=self.bytes_per_second, slow_after=self.after)


@attrs.frozen
class SlowHead(Fault):
    """Sends the status line and the header byte by byte.

    ``bytes_per_second`` is in trio's time. Over a transport without sockets, all bytes come at
    once, after the same time.
    """

    bytes_per_second: float

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, head_bytes_per_second=self.bytes_per_second)


@attrs.frozen
class Corrupt(Fault):
    """Changes one byte. Its offset is in the blob, even if a range is sent."""

    offset: int = 0

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, flipped=answer.flipped | {self.offset})


@attrs.frozen
class IgnoreRange(Fault):
    """Sends the whole blob with a 200 for any range, and no ``Accept-Ranges``."""

    def change_request(self, request: Request) -> Request:
        return attrs.evolve(request, headers=_without(request.headers, "range"))

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, headers=_without(answer.headers, "Accept-Ranges"))


@attrs.frozen
class WrongRange(Fault):
    """Sends another range than requested, with a correct ``Content-Range``.

    Attributes:
        shift: The number of bytes by which the range starts later, or earlier if negative.
    """

    shift: int

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        if answer.status != 206:
            return answer
        size = answer.blob.size
        start = min(max(0, answer.start + self.shift), size - 1)
        stop = max(answer.stop, start + 1)
        headers = {
            **answer.headers,
            "Content-Range": f"bytes {start}-{stop - 1}/{size}",
            "Content-Length": str(stop - start),
        }
        return attrs.evolve(answer, start=start, stop=stop, headers=headers)


@attrs.frozen
class Longer(Fault):
    """Adds ``extra`` bytes to the body, with a correct ``Content-Length``."""

    extra: int = 1

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        if not isinstance(answer.blob.content, bytes) or answer.stop == answer.start:
            return answer
        content = answer.blob.content + b"\0" * self.extra
        stop = answer.stop + self.extra
        headers = {**answer.headers, "Content-Length": str(stop - answer.start)}
        if answer.status == 206:
            headers["Content-Range"] = f"bytes {answer.start}-{stop - 1}/{len(content)}"
        blob = Blob(content, len(content))
        return attrs.evolve(answer, blob=blob, stop=stop, headers=headers)


@attrs.frozen
class Shorter(Fault):
    """Omits the last ``by`` bytes of the body, with a correct ``Content-Length``.

    Shorter bodies are not changed. After a short range, clients ask for the rest; after a short
    answer with the whole blob, they do not.
    """

    by: int = 1

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        stop = answer.stop - self.by
        if stop <= answer.start:
            return answer
        headers = {**answer.headers, "Content-Length": str(stop - answer.start)}
        if answer.status == 206:
            headers["Content-Range"] = f"bytes {answer.start}-{stop - 1}/{answer.blob.size}"
        return attrs.evolve(answer, stop=stop, headers=headers)


@attrs.frozen
class WrongTotal(Fault):
    """Sends a range with a total size that is wrong by ``by`` bytes."""

    by: int = 1

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        if answer.status != 206:
            return answer
        total = answer.blob.size + self.by
        field = f"bytes {answer.start}-{answer.stop - 1}/{total}"
        return attrs.evolve(answer, headers={**answer.headers, "Content-Range": field})


@attrs.frozen
class Encoded(Fault):
    """Compresses the body without a request for it (RFC 9110, 8.4)."""

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        if not isinstance(answer.blob.content, bytes) or answer.stop == answer.start:
            return answer
        body = gzip.compress(answer.blob.content[answer.start : answer.stop], mtime=0)
        headers = {
            **answer.headers,
            "Content-Encoding": "gzip",
            "Content-Length": str(len(body)),
        }
        blob = Blob(body, len(body))
        return attrs.evolve(answer, blob=blob, start=0, stop=len(body), headers=headers)


@attrs.frozen
class Raw(Fault):
    """Sends arbitrary bytes in place of an answer, and closes the connection.

    Over a transport without sockets, the client gets an error about a broken protocol.
    """

    data: bytes

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, raw=self.data)


def _without(headers: Mapping[str, str], unwanted: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != unwanted}
