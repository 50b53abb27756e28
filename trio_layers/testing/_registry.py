"""The embedded registry: its content and its answers.

`Registry` takes requests and returns answers as values, without I/O and without waiting. Sockets
(``_serve``) or an httpx transport in memory (``_transport``) connect it to clients.
"""

from __future__ import annotations

import fnmatch
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final
from urllib.parse import parse_qs

import attrs
import httpx
import trio

from .._digest import Digest, digest_of
from .._nursery import open_hidden_nursery
from ._auth import TOKEN_PATH, Auth, Gate
from ._faults import Fault
from ._http import Answer, Blob, Exchange, Request, error_answer
from ._images import Built
from ._serve import serve
from ._transport import RegistryTransport

__all__ = ["Registry", "open_registry"]

# The grammar of names and references: OCI distribution specification, "Pulling manifests".
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_ROUTE = re.compile(
    rf"/v2/(?P<name>{_NAME})/(?P<kind>manifests|blobs|tags|referrers)/(?P<reference>[A-Za-z0-9_.:-]+)"
)
_NUMBER = re.compile(r"[0-9]{1,18}")
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@attrs.define(eq=False)
class _Repository:
    manifests: dict[Digest, tuple[str, Blob]] = attrs.field(factory=dict)
    tags: dict[str, Digest] = attrs.field(factory=dict)
    blobs: dict[Digest, Blob] = attrs.field(factory=dict)
    referrers: dict[str, dict[Digest, dict[str, object]]] = attrs.field(factory=dict)


@attrs.define(eq=False)
class _Rule:
    pattern: str
    faults: tuple[Fault, ...]
    method: str | None
    skip: int
    times: float


@final
class Registry:
    """A registry to pull from (OCI distribution specification, the pull side).

    It serves manifests, blobs with ranges, tags and referrers, to GET and HEAD. `open_registry`
    opens a registry on a socket. A registry that you construct has no socket; its `transport`
    gives the same answers to a test with a `trio.testing.MockClock`.

    Args:
        host: The host in references.
        scheme: ``http`` or ``https``, for `url`.
        auth: The credentials that a pull needs; ``None`` for anonymous pulls.
        referrers: Whether the registry has the API that lists referrers. Older registries lack it.

    Attributes:
        host: Host and port, as in references.
        url: The same with the scheme, such as for a client's ``base_url``.
        requests: The requests so far, in order, with the state of their answers.
    """

    def __init__(
        self,
        host: str = "registry.test",
        *,
        scheme: str = "https",
        auth: Auth | None = None,
        referrers: bool = True,
    ) -> None:
        self.host = host
        self.url: str = f"{scheme}://{host}"
        self.requests: list[Exchange] = []
        self._gate = Gate(auth)
        self._has_referrers = referrers
        self._repositories: dict[str, _Repository] = {}
        self._rules: list[_Rule] = []

    def __repr__(self) -> str:
        active = sum(not exchange.ended for exchange in self.requests)
        return (
            f"<Registry {self.url}: {len(self._repositories)} repositories, "
            f"{len(self.requests)} requests, {active} active>"
        )

    def add(self, image: Built, name: str) -> str:
        """Make an image available.

        Args:
            image: An image, an index or an artifact.
            name: Repository and tag: ``library/demo:latest``; without a tag, it can be pulled by
                digest only.

        Returns:
            The reference for a pull: ``127.0.0.1:5000/library/demo:latest``.
        """
        repository, _, tag = name.partition(":")
        for digest, content in image.blobs.items():
            self.add_blob(repository, content, digest=digest)
        for descriptor, manifest in image.manifests:
            self.add_manifest(repository, manifest, media_type=descriptor.media_type)
        if not tag:
            return f"{self.host}/{repository}@{image.digest}"
        self._repository(repository).tags[tag] = image.digest
        return f"{self.host}/{name}"

    def add_manifest(
        self, repository: str, manifest: bytes, *, media_type: str, tag: str | None = None
    ) -> Digest:
        """Make bytes available as a manifest, even if they are none.

        A manifest with a subject becomes one of the subject's referrers.

        Args:
            repository: The repository.
            manifest: The bytes.
            media_type: The media type in answers.
            tag: A tag for the manifest.

        Returns:
            The digest of the bytes.
        """
        digest = digest_of(manifest)
        place = self._repository(repository)
        place.manifests[digest] = (media_type, Blob(manifest, len(manifest)))
        subject, referrer = _read_subject(manifest, media_type, digest)
        if subject is not None:
            place.referrers.setdefault(subject, {})[digest] = referrer
        if tag is not None:
            place.tags[tag] = digest
        return digest

    def add_blob(
        self, repository: str, content: bytes | Path, *, digest: Digest | None = None
    ) -> Digest:
        """Make a blob available.

        Args:
            repository: The repository.
            content: The bytes, or a file, which is read for each request.
            digest: The digest in requests, which may differ from the content's. By default, it is
                computed from the bytes. A file, which may be large, needs one.

        Raises:
            ValueError: if ``content`` is a file and ``digest`` is missing.
        """
        if isinstance(content, bytes):
            size = len(content)
            digest = digest_of(content) if digest is None else digest
        elif digest is None:
            raise ValueError(f"missing digest for {content}: a file needs one")
        else:
            size = content.stat().st_size
        self._repository(repository).blobs[digest] = Blob(content, size)
        return digest

    def remove(self, repository: str, digest: Digest) -> None:
        """Remove a blob or a manifest; requests for it get a 404 from now on.

        Raises:
            KeyError: if the repository does not have it.
        """
        place = self._repositories[repository]
        if digest in place.blobs:
            del place.blobs[digest]
        else:
            del place.manifests[digest]
            for referrers in place.referrers.values():
                referrers.pop(digest, None)

    def inject(
        self,
        pattern: str,
        *faults: Fault,
        method: str | None = None,
        skip: int = 0,
        times: int | None = 1,
    ) -> None:
        """Add a rule: answer matching requests with faults.

        Rules are tried in the order of the calls. The first rule that matches and is not used up
        decides. Faults come before the check of credentials, so ``/token`` can have them, too.

        Args:
            pattern: A pattern for the request's path, as in `fnmatch`: ``*`` matches slashes.
            faults: The faults, which are all applied. Where two contradict, the last one wins.
            method: Match only requests with this method, such as ``GET``.
            skip: The number of matching requests without faults at the beginning.
            times: The number of requests with faults; ``None`` for all from then on.
        """
        limit = float("inf") if times is None else times
        self._rules.append(_Rule(pattern, faults, method, skip, limit))

    def clear_faults(self) -> None:
        """Remove all rules. Answers that have begun keep their faults."""
        self._rules.clear()

    def revoke_tokens(self) -> None:
        """Refuse all tokens issued so far."""
        self._gate.revoke_tokens()

    @property
    def tokens_issued(self) -> int:
        """The number of tokens issued so far."""
        return self._gate.tokens_issued

    def transport(self) -> httpx.AsyncBaseTransport:
        """Return an httpx transport to this registry, without sockets, for any clock.

        The registry answers every request, for any host. Use httpx's ``mounts`` for a different
        transport per host. The transport respects the client's read timeout.

        Do not use blobs in files with a mock clock: threads read files, and a clock that jumps does
        not wait for threads.
        """
        return RegistryTransport(self.respond)

    def respond(self, request: Request, now: float) -> tuple[Answer, Exchange]:
        """Return the answer to a request, and record the request.

        Args:
            request: The request.
            now: The time, in trio's time.
        """
        exchange = Exchange(
            method=request.method,
            path=request.path,
            query=request.query,
            headers=request.headers,
            at=now,
        )
        self.requests.append(exchange)
        faults = self._faults_for(request)
        for fault in faults:
            request = fault.change_request(request)
        answer = self._answer(request, now)
        for fault in faults:
            answer = fault.change_answer(request, answer)
        if request.method == "HEAD":
            answer = attrs.evolve(answer, stop=answer.start)
        if not answer.dropped:
            exchange.status = answer.status
        return answer, exchange

    def _faults_for(self, request: Request) -> tuple[Fault, ...]:
        for rule in self._rules:
            if rule.method not in (None, request.method) or not rule.times:
                continue
            if fnmatch.fnmatchcase(request.path, rule.pattern):
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule.faults
        return ()

    def _answer(self, request: Request, now: float) -> Answer:
        if request.path == TOKEN_PATH:
            token = self._gate.issue(request, now)
            return token or error_answer(404, "NOT_FOUND", "this registry has no tokens")
        route = _ROUTE.fullmatch(request.path)
        refused = self._gate.check(request, route["name"] if route else None, now)
        if refused is not None:
            return refused
        if request.method not in ("GET", "HEAD"):
            return error_answer(405, "UNSUPPORTED", "this registry allows pulls only")
        if request.path in ("/v2", "/v2/"):
            return _complete_answer(Blob(b"{}", 2), {"Content-Type": "application/json"})
        if route is None:
            return error_answer(404, "NAME_INVALID", f"nothing is at {request.path}")
        repository = self._repositories.get(route["name"])
        if repository is None:
            return error_answer(404, "NAME_UNKNOWN", f"no repository {route['name']}")
        match route["kind"]:
            case "manifests":
                return _manifest_answer(repository, route["reference"])
            case "referrers" if self._has_referrers:
                return _referrers_answer(repository, route["reference"], request)
            case "referrers":
                return error_answer(404, "UNSUPPORTED", "this registry lists no referrers")
            case "blobs":
                return _blob_answer(repository, Digest(route["reference"]), request)
            case _:
                return _tags_answer(route["name"], repository, route["reference"], request)

    def _repository(self, name: str) -> _Repository:
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"invalid repository name {name!r}")
        return self._repositories.setdefault(name, _Repository())


def _read_subject(
    manifest: bytes, media_type: str, digest: Digest
) -> tuple[str | None, dict[str, object]]:
    """Read the subject's digest in a manifest, and make an entry for its referrers.

    See "Listing Referrers" in the OCI distribution specification.
    """
    try:
        document: object = json.loads(manifest)
    except (ValueError, RecursionError):
        return None, {}
    subject = document.get("subject") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(subject, dict):
        return None, {}
    config = document.get("config")
    kind = document.get("artifactType") or (isinstance(config, dict) and config.get("mediaType"))
    entry: dict[str, object] = {
        "mediaType": media_type,
        "digest": digest,
        "size": len(manifest),
        "artifactType": kind or "",
        "annotations": document.get("annotations") or {},
    }
    return str(subject.get("digest")), entry


@asynccontextmanager
async def open_registry(
    *,
    auth: Auth | None = None,
    ssl_context: ssl.SSLContext | None = None,
    referrers: bool = True,
) -> AsyncIterator[Registry]:
    """Open a registry on a free port of 127.0.0.1 for the block.

    Exceptions of the block are raised unchanged. Leaving the block does not wait: it cuts all
    answers that are still being sent.

    Cancellation: entering leaves no open port behind.

    Args:
        auth: The credentials that a pull needs: `BasicAuth` or `TokenAuth`; ``None`` for
            anonymous pulls.
        ssl_context: The context for TLS, with a certificate. By default, the registry speaks
            plain HTTP, which clients allow on loopback.
        referrers: Whether the registry has the API that lists referrers. Older registries lack it.
    """
    scheme = "http" if ssl_context is None else "https"
    async with open_hidden_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port: int = listeners[0].socket.getsockname()[1]
        registry = Registry(f"127.0.0.1:{port}", scheme=scheme, auth=auth, referrers=referrers)
        await nursery.start(serve, registry.respond, listeners, scheme, ssl_context)
        yield registry
        nursery.cancel_scope.cancel()


def _complete_answer(blob: Blob, headers: dict[str, str]) -> Answer:
    return Answer(
        status=200,
        headers={**headers, "Content-Length": str(blob.size)},
        blob=blob,
        stop=blob.size,
    )


def _manifest_answer(repository: _Repository, reference: str) -> Answer:
    digest = repository.tags.get(reference, Digest(reference))
    found = repository.manifests.get(digest)
    if found is None:
        return error_answer(404, "MANIFEST_UNKNOWN", f"no manifest {reference}")
    media_type, blob = found
    headers = {
        "Content-Type": media_type,
        "Docker-Content-Digest": digest,
        "ETag": f'"{digest}"',
    }
    return _complete_answer(blob, headers)


def _blob_answer(repository: _Repository, digest: Digest, request: Request) -> Answer:
    blob = repository.blobs.get(digest)
    if blob is None:
        return error_answer(404, "BLOB_UNKNOWN", f"no blob {digest}")
    etag = f'"{digest}"'
    headers = {
        "Content-Type": "application/octet-stream",
        "Docker-Content-Digest": digest,
        "ETag": etag,
        "Accept-Ranges": "bytes",
    }
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    # A server may ignore a Range (RFC 9110, 14.2). This one does so for HEAD, for a list of ranges,
    # and for an If-Range with another ETag (13.1.5).
    if (
        asked is None
        or request.method == "HEAD"
        or request.headers.get("if-range", etag) != etag
        or not any(asked.groups())
    ):
        return _complete_answer(blob, headers)
    if asked[1]:
        start = int(asked[1])
        stop = min(int(asked[2]) + 1, blob.size) if asked[2] else blob.size
        if asked[2] and int(asked[2]) < start:
            return _complete_answer(blob, headers)
    else:
        start, stop = max(0, blob.size - int(asked[2])), blob.size
    if start >= blob.size or start >= stop:
        unsatisfied = {"Content-Range": f"bytes */{blob.size}"}
        return error_answer(416, "RANGE_INVALID", f"the blob has {blob.size} bytes", unsatisfied)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    headers["Content-Length"] = str(stop - start)
    return Answer(status=206, headers=headers, blob=blob, start=start, stop=stop)


def _tags_answer(name: str, repository: _Repository, reference: str, request: Request) -> Answer:
    if reference != "list":
        return error_answer(404, "NAME_INVALID", f"nothing is at {request.path}")
    query = parse_qs(request.query)
    last = query.get("last", [""])[0]
    tags = sorted(tag for tag in repository.tags if tag > last)
    headers = {"Content-Type": "application/json"}
    limit = query.get("n", [""])[0]
    if _NUMBER.fullmatch(limit) and int(limit) < len(tags):
        tags = tags[: int(limit)]
        if tags:
            following = f"/v2/{name}/tags/list?n={limit}&last={tags[-1]}"
            headers["Link"] = f'<{following}>; rel="next"'
    body = json.dumps({"name": name, "tags": tags}).encode()
    return _complete_answer(Blob(body, len(body)), headers)


def _referrers_answer(repository: _Repository, digest: str, request: Request) -> Answer:
    wanted = parse_qs(request.query).get("artifactType")
    found = [
        entry
        for entry in repository.referrers.get(digest, {}).values()
        if wanted is None or entry["artifactType"] in wanted
    ]
    headers = {"Content-Type": _INDEX}
    if wanted is not None:
        headers["OCI-Filters-Applied"] = "artifactType"
    body = json.dumps({"schemaVersion": 2, "mediaType": _INDEX, "manifests": found}).encode()
    return _complete_answer(Blob(body, len(body)), headers)
