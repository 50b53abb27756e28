"""What can be wrong with a registry's answers, one value for each.

A fault changes the request before the registry sees it, or the answer before it goes out. Tests
that need another one write it the same way.
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
    """No fault: what the others build on."""

    def change_request(self, request: Request) -> Request:
        """The request that the registry sees instead."""
        return request

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        """The answer that goes out instead."""
        return answer


@attrs.frozen
class Reply(Fault):
    """Something else is answered: an error of a proxy, a 429 with ``Retry-After``, a 404.

    Attributes:
        status: The HTTP status.
        headers: Such as ``{"Retry-After": "3"}``.
        body: What comes with it.
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
    """The client is sent elsewhere, as registries send it to a CDN.

    Attributes:
        to: Scheme, host and port, such as another registry's `~Registry.url`; path and query
            are the same there.
        status: Which kind of redirect it is.
    """

    to: str
    status: int = attrs.field(default=307, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        query = f"?{request.query}" if request.query else ""
        location = f"{self.to}{request.path}{query}"
        return Answer(status=self.status, headers={"Location": location, "Content-Length": "0"})


@attrs.frozen
class Challenge(Fault):
    """A 401, whatever the client knows, that tells it how to log in.

    Attributes:
        scheme: How: ``Basic``; ``Bearer``, for whose tokens the registry itself is named, which
            has some if its auth is a `TokenAuth`; or any other name.
        other: The same for a client that came with ``scheme``: what is wanted goes back and forth
            then. ``None``: it is told to do the same once more.
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
    """The connection is closed instead of an answer."""

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, dropped=True)


@attrs.frozen
class Delay(Fault):
    """The answer begins only after so many seconds of trio's time."""

    seconds: float

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, delay=self.seconds)


@attrs.frozen
class Cut(Fault):
    """The connection is closed after so many bytes of the body. Longer than the body: no cut.

    Attributes:
        after: How many.
        reset: It is reset, as by a host that crashed or a firewall: then some of the bytes may be
            lost on their way, and clients see another error.
    """

    after: int
    reset: bool = attrs.field(default=False, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, cut_after=self.after, cut_by_reset=self.reset)


@attrs.frozen
class Stall(Fault):
    """After so many bytes of the body nothing comes for some seconds; by default, for ever."""

    after: int
    seconds: float = math.inf

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, stall_after=self.after, stall_seconds=self.seconds)


@attrs.frozen
class NoLength(Fault):
    """The answer does not say how long it is: over a socket the body comes in chunks."""

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, headers=_without(answer.headers, "Content-Length"))


@attrs.frozen
class Slow(Fault):
    """The body goes out at so many bytes per second of trio's time. With a few of them it is what
    is called a slow loris.

    Attributes:
        bytes_per_second: How many.
        after: So many bytes go out at once before.
    """

    bytes_per_second: float
    after: int = attrs.field(default=0, kw_only=True)

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, bytes_per_second=self.bytes_per_second, slow_after=self.after)


@attrs.frozen
class SlowHead(Fault):
    """The status line and the header go out byte by byte, so many per second of trio's time. Over
    a transport without sockets they come all at once, after as long.
    """

    bytes_per_second: float

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, head_bytes_per_second=self.bytes_per_second)


@attrs.frozen
class Corrupt(Fault):
    """One byte goes out wrong; its offset is one in the blob, also where a range is sent."""

    offset: int = 0

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, flipped=answer.flipped | {self.offset})


@attrs.frozen
class IgnoreRange(Fault):
    """The whole is sent, with a 200, whatever range was asked for; ``Accept-Ranges`` is gone."""

    def change_request(self, request: Request) -> Request:
        return attrs.evolve(request, headers=_without(request.headers, "range"))

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, headers=_without(answer.headers, "Accept-Ranges"))


@attrs.frozen
class WrongRange(Fault):
    """A range other than the one asked for is sent, and honestly called so.

    Attributes:
        shift: By how many bytes it starts later; where negative, earlier.
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
    """What is sent has so many bytes more than it should have, and says so."""

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
    """What is sent has so many bytes less than it should have, and says so, if there are more than
    that: a range is continued by asking for the rest, which a whole is not taken to have.
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
    """A range is sent as one of another whole, which is so many bytes longer or shorter."""

    by: int = 1

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        if answer.status != 206:
            return answer
        total = answer.blob.size + self.by
        field = f"bytes {answer.start}-{answer.stop - 1}/{total}"
        return attrs.evolve(answer, headers={**answer.headers, "Content-Range": field})


@attrs.frozen
class Encoded(Fault):
    """The body is compressed for the way, though nobody asked for that (RFC 9110, 8.4)."""

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
    """These bytes come in place of an answer, whatever they are; then the connection is closed.

    Over a transport without sockets the client is told that the server broke the protocol.
    """

    data: bytes

    def change_answer(self, request: Request, answer: Answer) -> Answer:
        return attrs.evolve(answer, raw=self.data)


def _without(headers: Mapping[str, str], unwanted: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != unwanted}
