"""Requests other than for images: digests of tags, lists of tags and referrers,
documents, blobs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs

import attrs
import httpx
import pytest
import trio
from registry.fakes import (
    OCI_INDEX,
    OCI_MANIFEST,
    Body,
    FakeRegistry,
    MemorySink,
    Network,
    as_json,
    describe,
)

from trio_layers import (
    AuthenticationError,
    Credentials,
    Descriptor,
    HostsError,
    InvalidDigest,
    InvalidReference,
    LayersError,
    ManifestError,
    NotFound,
    PlatformError,
    RegistryError,
    VerificationError,
    open_registry_client,
)
from trio_layers._digest import Digest
from trio_layers._registry import pagination as lists
from trio_layers._registry.pagination import next_query
from trio_layers.testing import (
    BasicAuth,
    Registry,
    TokenAuth,
    build_artifact,
    build_image,
    open_registry,
)

HOST = "https://registry.example"
APP = "registry.example/team/app"
SBOM, SIGNATURE = "application/spdx+json", "application/vnd.dev.cosign.simplesigning.v1+json"


def with_referrers(registry: Registry) -> tuple[str, Descriptor, list[Descriptor]]:
    image = build_image([[]])
    reference = registry.add(image, "team/app:1")
    artifacts = [
        build_artifact(text.encode(), kind, subject=image.descriptor, annotations={"text": text})
        for kind, text in ((SBOM, "bill"), (SIGNATURE, "first"), (SIGNATURE, "second"))
    ]
    for artifact in artifacts:
        registry.add(artifact, "team/app")
    entries = [artifact.descriptor for artifact in artifacts]
    return reference, image.descriptor, entries


def in_memory(registry: Registry) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=registry.transport())


# Digests.


async def test_the_digest_of_a_tag_costs_a_head_request() -> None:
    registry = Registry()
    reference, image, _ = with_referrers(registry)
    async with in_memory(registry) as http, open_registry_client(client=http) as client:
        assert await client.resolve(reference) == image
        assert await client.resolve(f"{reference}@{image.digest}") == image
        with pytest.raises(NotFound, match="answered 404 for the manifest of"):
            await client.resolve("registry.test/team/app:2")
    asked = [(each.method, each.path.rpartition("/")[2]) for each in registry.requests]
    assert asked == [("HEAD", "1"), ("HEAD", image.digest), ("HEAD", "2"), ("GET", "2")]
    assert all(each.ended for each in registry.requests)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        *[(status, {}) for status in (400, 401, 403, 404, 405, 406, 410, 429, 500, 501, 503)],
        (200, {"Content-Type": OCI_MANIFEST, "Content-Length": "7"}),
        (200, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": "sha512:" + 128 * "0"}),
        (200, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": describe(b"").digest}),
        (200, {"Docker-Content-Digest": describe(b"").digest, "Content-Length": "7"}),
        (
            200,
            {
                "Content-Type": OCI_MANIFEST,
                "Docker-Content-Digest": describe(b"").digest,
                "Content-Length": "0",
            },
        ),
    ],
)
async def test_who_does_not_answer_that_is_asked_for_the_document(
    status: int, headers: Mapping[str, str]
) -> None:
    registry = FakeRegistry()
    image = registry.add_image(tag="latest")

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "HEAD":
            return httpx.Response(status, headers=headers)
        return registry(request)

    network = Network(**{HOST: handler})
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.resolve(APP) == image
    assert [request.method for request in network.requests] == ["HEAD", "GET"]


async def test_a_digest_that_is_not_the_references() -> None:
    registry = FakeRegistry()
    image = registry.add_image()
    other = describe(b"other").digest
    registry.manifests[other] = registry.manifests[image.digest]
    network = Network(**{HOST: registry})
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(VerificationError, match=f"sent {image.digest} .* should be {other}"):
            await client.resolve(f"{APP}@{other}")
        with pytest.raises(VerificationError, match=f"sent {image.digest} .* should be {other}"):
            await client.get_manifest(f"{APP}@{other}")
        assert client.statistics().active == 0


async def test_head_requests_are_authenticated_and_redirected() -> None:
    registry = Registry(auth=TokenAuth())
    reference, image, _ = with_referrers(registry)
    async with in_memory(registry) as http, open_registry_client(client=http) as client:
        assert await client.resolve(reference) == image
    assert [each.method for each in registry.requests] == [
        "HEAD",
        "GET",
        "HEAD",
    ]  # with GET, the first request asks for a token

    fake = FakeRegistry()
    fake.add_image(tag="latest")

    def away(request: httpx.Request) -> httpx.Response:
        return httpx.Response(307, headers={"Location": f"https://cdn.test{request.url.path}"})

    network = Network(**{HOST: away, "https://cdn.test": fake})
    async with network.client() as http, open_registry_client(client=http) as client:
        await client.resolve(APP)
    assert [request.method for request in network.requests] == ["HEAD", "HEAD"]


# Tags.


async def test_all_tags_come_page_by_page() -> None:
    registry = Registry()
    image = build_image([[]])
    names = [f"v{number:04}" for number in range(2500)]
    for name in names:
        registry.add(image, f"team/app:{name}")
    async with in_memory(registry) as http, open_registry_client(client=http) as client:
        assert await client.tags("registry.test/team/app") == tuple(names)
        with pytest.raises(NotFound, match="answered 404 for the tags of"):
            await client.tags("registry.test/team/none")
    assert [each.query for each in registry.requests[:3]] == [
        "n=1000",
        "n=1000&last=v0999",
        "n=1000&last=v1999",
    ]


def tags_server(pages: Mapping[str, tuple[object, str | None]]) -> Network:
    """Return a server with pages by the value of ``last``, each with its ``Link`` field."""

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v2/team/app/tags/list"
        [last] = parse_qs(request.url.query.decode()).get("last", [""])
        body, link = pages[last]
        return httpx.Response(200, json=body, headers={} if link is None else {"Link": link})

    return Network(**{HOST: handler})


async def tags_of(network: Network) -> tuple[str, ...]:
    async with network.client() as http, open_registry_client(client=http) as client:
        return await client.tags(APP)


@pytest.mark.parametrize(
    "link",
    [
        '</v2/team/app/tags/list?last=b&n=2>; rel="next"',
        "<list?last=b>;rel=next",
        "<https://elsewhere.test/v2/other/tags/list?last=b>",
        '</first?last=x>; rel="first", <?last=b>; title="a, b"; REL="last next"',
        '/v2/team/app/tags/list?last=b&n=2; rel="next"',
        "https://elsewhere.test/v2/team/app/tags/list?last=b ; rel=next",
        '/first?last=x; rel="prev", /next?last=b;rel=next',
        '/first?last=x;rel=prev,<?last=b>;rel="next"',
        "?last=b",
        '"?last=b"; rel="next"',
        "<?last=b>; rel='next'",
        '<?last=b> ; title="a; rel=prev" ;rel = "next"',
        ', <?last=x>; rel="first" , , <?last=b>; rel="next" ,',
        '<?last=x>; rel="prev"; rel="next", <?last=b>; rel="next"',
        "<?last=b#there>; rel=next",
    ],
)
async def test_only_the_query_of_a_link_counts(link: str) -> None:
    """The host, the path and the spelling of a link do not matter."""
    network = tags_server({"": ({"tags": ["a", "b"]}, link), "b": ({"tags": ["b", "c"]}, None)})
    assert await tags_of(network) == ("a", "b", "c")


async def test_several_link_fields() -> None:
    """Any of several ``Link`` fields may name the next page."""

    def handler(request: httpx.Request) -> httpx.Response:
        if "last" in str(request.url):
            return httpx.Response(200, json={"tags": ["b"]})
        links = [("Link", '<?last=x>; rel="prev"'), ("link", '<?last=a>; rel="next"')]
        return httpx.Response(200, json={"tags": ["a"]}, headers=links)

    assert await tags_of(Network(**{HOST: handler})) == ("a", "b")


async def test_a_link_is_no_way_to_write_a_url() -> None:
    assert next_query(["<?last=\x1b[0m a>"], "list") == "last=%1B%5B0m%20a"
    assert next_query(["<?last=%2B+b>"], "list") == "last=%2B+b"
    assert next_query(['<?last=a>; rel="prev"'], "list") is None
    assert next_query([" , "], "list") is None
    assert next_query([], "list") is None


@pytest.mark.parametrize(
    "link",
    [
        "nonsense",
        '</v2/team/app/tags/list/page2>; rel="next"',
        '<?last=b; rel="next"',
        '?last=b>; rel="next"',
        '; rel="next"',
        '<?last=b> rel="next"',
    ],
)
async def test_a_link_that_cannot_be_read(link: str) -> None:
    """An unreadable link is an error, because pages would be missing."""
    network = tags_server({"": ({"tags": ["a", "b"]}, link), "b": ({"tags": ["c"]}, None)})
    with pytest.raises(RegistryError, match="a link to the next page that cannot be read"):
        await tags_of(network)


@pytest.mark.parametrize(
    "link",
    [
        "</v2/team/app/tags/list?last=b&n=2>; rel=next",
        "<?n=5&last=b>",
        "?last=%62; rel=next",
        "<?last=c>; rel=next",
        "<>; rel=next",
    ],
)
async def test_a_last_page_that_links_to_itself(link: str) -> None:
    """The list contains each tag once."""
    pages = {
        "": ({"tags": ["a", "b"]}, "<?last=b&n=2>; rel=next"),
        "b": ({"tags": ["c"]}, link),
        "c": ({"tags": ["c"]}, link),
    }
    assert await tags_of(tags_server(pages)) == ("a", "b", "c")


@pytest.mark.parametrize("link", ["</v2/team/app/tags/list>; rel=next", "<?n=1000>", "<?n=50>"])
async def test_an_only_page_that_links_to_itself(link: str) -> None:
    assert await tags_of(tags_server({"": ({"tags": ["a", "b"]}, link)})) == ("a", "b")


@pytest.mark.parametrize("status", [400, 422])
async def test_a_registry_that_does_not_take_the_number(status: int) -> None:
    """A registry that refuses ``n`` is asked for pages without it."""

    def handler(request: httpx.Request) -> httpx.Response:
        query = parse_qs(request.url.query.decode())
        if int(query.get("n", ["1"])[0]) > 100:
            return httpx.Response(status, json={"errors": [{"code": "PAGINATION_NUMBER_INVALID"}]})
        if "last" in query:
            return httpx.Response(200, json={"tags": ["b"]})
        return httpx.Response(200, json={"tags": ["a"]}, headers={"Link": "<?last=a&n=100>"})

    network = Network(**{HOST: handler})
    assert await tags_of(network) == ("a", "b")
    assert [str(each.url.query, "ascii") for each in network.requests] == [
        "n=1000",
        "",
        "last=a&n=100",
    ]
    with pytest.raises(RegistryError, match="answered 400"):
        await tags_of(Network(**{HOST: lambda request: httpx.Response(400)}))


@pytest.mark.parametrize(
    "body", [{"tags": None}, {"tags": []}, {"name": "team/app"}, {}, {"errors": [], "tags": None}]
)
async def test_no_tags(body: object) -> None:
    assert await tags_of(tags_server({"": (body, None)})) == ()


async def test_what_is_no_tag_is_left_out() -> None:
    strange = ["ok", "", "a b", "\x1b[2J", "x" * 129, 7, None, "-a", "é"]
    assert await tags_of(tags_server({"": ({"tags": strange}, None)})) == ("ok",)


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        {"tags": "a"},
        {"tags": {}},
        {"tags": False},
        {"errors": [{"code": "UNKNOWN"}]},
        "<html>",
    ],
)
async def test_what_is_no_list(body: object) -> None:
    with pytest.raises(RegistryError, match=r"registry\.example sent something else than a list"):
        await tags_of(tags_server({"": (body, None)}))


async def test_a_list_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    circle = {
        "": ({"tags": ["a"]}, "<?last=a>"),
        "a": ({"tags": ["b"]}, "<?last=b>"),
        "b": ({"tags": ["c"]}, "<?last=a>"),
    }
    with pytest.raises(RegistryError, match="followed by one that was there before"):
        await tags_of(tags_server(circle))

    def ever_on(request: httpx.Request) -> httpx.Response:
        page = len(network.requests)
        return httpx.Response(200, json={"tags": []}, headers={"Link": f"<?last={page}>"})

    monkeypatch.setattr(lists, "MAX_PAGES", 30)
    network = Network(**{HOST: ever_on})
    with pytest.raises(RegistryError, match=r"registry\.example sent more than .* 30 pages"):
        await tags_of(network)

    far = tags_server({"": ({"tags": ["a"]}, f"<?last={'a' * 66_000}>")})
    with pytest.raises(RegistryError, match="a next page of more than 8192 characters"):
        await tags_of(far)

    large = Body([b"[" * 1024 * 1024] * 8)
    network = Network(**{HOST: lambda _: httpx.Response(200, stream=large)})
    with pytest.raises(RegistryError, match="a page of more than 4194304 bytes for the tags of"):
        await tags_of(network)
    assert large.read == 5
    assert large.closed


# Referrers.


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_referrers(by: str) -> None:
    registry = Registry()
    reference, image, entries = with_referrers(registry)
    if by == "digest":
        reference = f"registry.test/team/app@{image.digest}"
    async with in_memory(registry) as http, open_registry_client(client=http) as client:
        assert await client.referrers(reference) == tuple(entries)
        assert await client.referrers(reference, artifact_type=SBOM) == (entries[0],)
        assert await client.referrers(reference, artifact_type="none") == ()
        found, data = await client.get_manifest(f"registry.test/team/app@{entries[1].digest}")
        [layer] = json.loads(data)["layers"]
        assert found.media_type == OCI_MANIFEST
        assert await client.get_blob(reference, layer["digest"]) == b"first"
    queries = [each.query for each in registry.requests if "/referrers/" in each.path]
    assert queries == ["", "artifactType=application%2Fspdx%2Bjson", "artifactType=none"]


async def test_referrers_by_tag_where_there_is_no_api() -> None:
    registry = Registry(referrers=False)
    reference, image, entries = with_referrers(registry)
    async with in_memory(registry) as http, open_registry_client(client=http) as client:
        assert await client.referrers(reference) == ()  # nor does the registry have the tag
        index = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                as_json(entry, artifactType=entry.artifact_type, annotations=entry.annotations)
                for entry in entries
            ],
        }
        tag = image.digest.replace(":", "-")
        add = registry.add_manifest
        add("team/app", json.dumps(index).encode(), media_type=OCI_INDEX, tag=tag)
        assert await client.referrers(reference) == tuple(entries)
        assert await client.referrers(reference, artifact_type=SIGNATURE) == tuple(entries[1:])
        add("team/app", entries[0].digest.encode(), media_type=OCI_INDEX, tag=tag)
        with pytest.raises(ManifestError, match=f"the referrers of {reference}: .*JSON"):
            await client.referrers(reference)
        add("team/app", build_image([]).manifest, media_type=OCI_MANIFEST, tag=tag)
        with pytest.raises(ManifestError, match="is not an index"):
            await client.referrers(reference)


@pytest.mark.parametrize(
    ("status", "media_type", "listed"),
    [
        (404, "application/json", False),
        (400, "application/json", False),
        (405, "text/plain", False),
        (200, "text/html", False),
        (200, OCI_INDEX, True),
    ],
)
async def test_who_has_the_api(status: int, media_type: str, listed: bool) -> None:
    """Some servers answer every path with a page."""
    fake = FakeRegistry()
    image = fake.add_image(tag="latest")
    of_api, of_tag = (build_artifact(text, SBOM).descriptor for text in (b"api", b"tag"))
    tag = image.digest.replace(":", "-")
    fake.add_index([as_json(of_tag, artifactType=SBOM)], tag=tag)
    entry = as_json(of_api, artifactType=SBOM)
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}

    def handler(request: httpx.Request) -> httpx.Response:
        if "/referrers/" not in request.url.path:
            return fake(request)
        if "page" not in str(request.url):
            link = {"Link": "<?page=2>; rel=next"} if listed else {}
            headers = {"Content-Type": media_type, **link}
            return httpx.Response(status, headers=headers, content=json.dumps(body))
        return httpx.Response(200, headers={"Content-Type": OCI_INDEX}, content=json.dumps(body))

    network = Network(**{HOST: handler})
    async with network.client() as http, open_registry_client(client=http) as client:
        found = await client.referrers(f"{APP}@{image.digest}")
    wanted = [of_api] if listed else [of_tag]
    assert [each.digest for each in found] == [each.digest for each in wanted]


@pytest.mark.parametrize("status", [401, 403, 500])
async def test_a_failure_is_no_empty_list(status: int) -> None:
    network = Network(**{HOST: lambda _: httpx.Response(status)})
    async with (
        network.client() as http,
        open_registry_client(client=http, retry_tick=0.001) as client,
    ):
        with pytest.raises(RegistryError, match=f"registry.example answered {status} for the ref"):
            await client.referrers(f"{APP}@{describe(b'').digest}")


async def test_referrers_and_tags_are_asked_of_those_who_may_tell(tmp_path: Path) -> None:
    """If a mirror lacks the API, the registry is still asked."""
    (tmp_path / "registry.test").mkdir()
    hosts = tmp_path / "registry.test" / "hosts.toml"
    hosts.write_text(
        'server = "https://registry.test"\n'
        '[host."https://content.test"]\ncapabilities = ["pull"]\n'
        '[host."https://mirror.test"]\n'
    )
    mirror, registry = Registry("mirror.test", referrers=False), Registry()
    reference, _, entries = with_referrers(registry)
    with_referrers(mirror)
    mounts = {
        "https://mirror.test": mirror.transport(),
        "https://registry.test": registry.transport(),
        "https://content.test": Registry("content.test").transport(),
    }
    async with (
        httpx.AsyncClient(mounts=mounts) as http,
        open_registry_client(client=http, hosts_dir=tmp_path) as client,
    ):
        assert await client.referrers(reference) == tuple(entries)
        assert await client.tags(reference) == ("1",)
    asked = [each.path.removeprefix("/v2/team/app/").split("/")[0] for each in mirror.requests]
    assert asked == ["manifests", "referrers", "tags"]
    asked = [each.path.removeprefix("/v2/team/app/").split("/")[0] for each in registry.requests]
    assert asked == ["referrers"]


async def test_nobody_may_tell_of_referrers(tmp_path: Path) -> None:
    (tmp_path / "_default").mkdir()
    hosts = tmp_path / "_default" / "hosts.toml"
    hosts.write_text('server = "https://registry.test"\ncapabilities = ["pull"]\n')
    registry = Registry()
    _, image, _ = with_referrers(registry)
    async with (
        in_memory(registry) as http,
        open_registry_client(client=http, hosts_dir=tmp_path) as client,
    ):
        with pytest.raises(HostsError, match="'pull' and 'resolve' among its capabilities"):
            await client.referrers(f"registry.test/team/app@{image.digest}")


# Servers that answer every path with a page, and redirects to invalid URLs.


def with_mirror(directory: Path) -> Path:
    (directory / "_default").mkdir()
    hosts = directory / "_default" / "hosts.toml"
    hosts.write_text(f'server = "{HOST}"\n[host."https://mirror.example"]\n')
    return directory


async def test_a_page_is_no_manifest(tmp_path: Path) -> None:
    """After a wrong answer of a mirror the registry is asked. A wrong answer of the registry is an
    error.
    """
    fake = FakeRegistry()
    image = fake.add_image(tag="latest")

    def page(request: httpx.Request) -> httpx.Response:
        headers = {"Docker-Content-Digest": image.digest, "Content-Type": "text/html"}
        return httpx.Response(200, headers=headers, content=b"<html>sign in")

    network = Network(**{HOST: fake, "https://mirror.example": page})
    async with network.client() as http:
        async with open_registry_client(client=http, hosts_dir=with_mirror(tmp_path)) as client:
            assert await client.resolve(APP) == image
            assert (await client.get_manifest(APP))[0] == image
            found = await client.resolve_image(APP, platform="linux/amd64", head_first=True)
            assert found.descriptor == image
        network.hosts[HOST] = page
        async with open_registry_client(client=http) as client:
            for method in (client.resolve, client.get_manifest):
                with pytest.raises(ManifestError, match=rf"{APP}:latest: .* sent a page of text"):
                    await method(APP)


async def test_what_head_says_of_a_known_document_may_be_wrong() -> None:
    """Then the document is fetched as if it were not known."""
    fake = FakeRegistry()
    fake.add_image(tag="latest")

    def handler(request: httpx.Request) -> httpx.Response:
        response = fake(request)
        if request.method == "HEAD":
            response.headers["Content-Type"] = "application/json"
        return response

    async def known(digest: str) -> bytes | None:
        return fake.manifests[digest][1] if digest in fake.manifests else None

    network = Network(**{HOST: handler})
    async with network.client() as http, open_registry_client(client=http) as client:
        found = await client.resolve_image(
            APP, platform="linux/amd64", known=known, head_first=True
        )
    assert found.descriptor.media_type == OCI_MANIFEST


NO_URLS = {
    "no host": "https:foo",
    "another scheme": "foo:bar",
    "too long": "/" + 65_530 * "a",
    "too long once it is escaped": "https://h/" + 20_000 * "é",
}


@pytest.mark.parametrize("location", NO_URLS.values(), ids=NO_URLS)
async def test_a_redirect_to_what_is_no_url(location: str, tmp_path: Path) -> None:
    fake = FakeRegistry()
    image = fake.add_image(tag="latest")

    def away(request: httpx.Request) -> httpx.Response:
        return httpx.Response(302, headers=[(b"Location", location.encode())])

    network = Network(**{HOST: fake, "https://mirror.example": away})
    async with network.client() as http:
        async with open_registry_client(client=http, hosts_dir=with_mirror(tmp_path)) as client:
            assert await client.resolve(APP) == image
        network.hosts[HOST] = away
        async with open_registry_client(client=http) as client:
            with pytest.raises(RegistryError, match=r"registry\.example (could not|redirects)"):
                await client.get_blob(APP, describe(b"content"))
            assert client.statistics().active == 0


async def test_a_challenge_that_no_url_can_answer() -> None:
    challenges = {
        'Bearer realm="https://auth.test/token",scope="' + 15_000 * "é" + '"': "more than a URL",
        'Bearer realm="https://auth.test/' + 15_000 * "é" + '"': "no HTTPS URL",
    }
    for challenge, words in challenges.items():
        headers = [(b"WWW-Authenticate", challenge.encode("latin-1"))]
        network = Network(**{HOST: lambda _, sent=headers: httpx.Response(401, headers=sent)})
        async with network.client() as http, open_registry_client(client=http) as client:
            with pytest.raises(AuthenticationError, match=words):
                await client.resolve(APP)


# Documents and blobs.


async def test_any_document_as_it_is() -> None:
    fake = FakeRegistry()
    odd = fake.add_manifest({"strange": True}, "application/vnd.example+json", tag="odd")
    network = Network(**{HOST: fake})
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.get_manifest(f"{APP}:odd") == (odd, b'{"strange": true}')
        with pytest.raises(ManifestError, match="neither that of an image manifest"):
            await client.resolve_image(f"{APP}:odd")
        fake.manifests["large"] = (OCI_MANIFEST, bytes(4 * 1024 * 1024 + 1))
        with pytest.raises(ManifestError, match=f"{APP}:large: the manifest is larger than"):
            await client.get_manifest(f"{APP}:large")


async def test_a_small_blob() -> None:
    fake = FakeRegistry()
    blob, digest = describe(b"content"), describe(b"content").digest
    fake.blobs[digest] = b"content"
    network = Network(**{HOST: fake})
    async with network.client() as http, open_registry_client(client=http) as client:
        assert await client.get_blob(APP, blob) == b"content"
        assert await client.get_blob(APP, digest, max_size=7) == b"content"
        with pytest.raises(VerificationError, match="has 7 bytes, which is more than 6"):
            await client.get_blob(APP, blob, max_size=6)
        assert len(network.requests) == 2
        with pytest.raises(VerificationError, match="has more than 6 bytes"):
            await client.get_blob(APP, digest, max_size=6)
        for size in (6, 8):
            with pytest.raises(VerificationError, match="the digest or size differs"):
                await client.get_blob(APP, Descriptor("x/y", digest, size))
        fake.blobs[digest] = b"CONTENT"
        with pytest.raises(VerificationError, match="the digest or size differs"):
            await client.get_blob(APP, blob)
        with pytest.raises(NotFound):
            await client.get_blob(APP, describe(b"nothing"))
        with pytest.raises(InvalidDigest):
            await client.get_blob(APP, "md5:" + 32 * "0")
        assert client.statistics().active == 0


def serving(*chunks: bytes, error: Exception | None = None) -> tuple[Network, Body]:
    body = Body(chunks, error)
    return Network(**{HOST: lambda _: httpx.Response(200, stream=body)}), body


async def test_a_blob_piece_by_piece() -> None:
    network, body = serving(b"con", b"tent")
    blob = describe(b"content")
    async with network.client() as http, open_registry_client(client=http) as client:
        for wanted in (blob, blob.digest):
            async with client.open_blob(APP, wanted) as stream:
                assert client.statistics().active == 1
                assert [chunk async for chunk in stream] == [b"con", b"tent"]
                assert [chunk async for chunk in stream] == []
                assert repr(stream) == f"<BlobChunks: 7 bytes of {blob.digest}>"
            assert client.statistics().active == 0
        async with client.open_blob(APP, blob) as stream:
            assert await anext(stream) == b"con"  # leave the block before the body's end
        assert body.closed
        assert client.statistics().active == 0


@pytest.mark.parametrize("algorithm", ["sha384", "sha512"])
async def test_a_digest_of_another_algorithm(algorithm: str) -> None:
    """A blob that is not stored is verified by its own algorithm."""
    digest = Digest(f"{algorithm}:{hashlib.new(algorithm, b'content').hexdigest()}")
    blob = Descriptor("x/y", digest, 7)
    network, body = serving(b"con", b"tent")
    async with network.client() as http, open_registry_client(client=http) as client:
        for wanted in (blob, digest):
            assert await client.get_blob(APP, wanted) == b"content"
            async with client.open_blob(APP, wanted) as stream:
                assert [chunk async for chunk in stream] == [b"con", b"tent"]
        body.chunks = [b"con", b"TENT"]
        for wanted in (blob, digest):
            with pytest.raises(VerificationError, match=algorithm):
                await client.get_blob(APP, wanted)
            async with client.open_blob(APP, wanted) as stream:
                with pytest.raises(VerificationError, match=algorithm):
                    [chunk async for chunk in stream]
        asked = len(network.requests)
        sink = MemorySink()
        for refused in (blob, attrs.evolve(blob, digest=Digest(f"{algorithm}:00"))):
            with pytest.raises(InvalidDigest):
                await client.fetch_blob(APP, refused, sink)
        assert len(network.requests) == asked


@pytest.mark.parametrize(
    ("chunks", "error", "raised", "arrived"),
    [
        ([b"con", b"TENT"], None, VerificationError, [b"con", b"TENT"]),
        ([b"con", b"ten"], None, VerificationError, [b"con", b"ten"]),
        ([b"con", b"tent", b"s"], None, VerificationError, [b"con", b"tent"]),
        ([b"con"], httpx.ReadError("reset"), RegistryError, [b"con"]),
    ],
)
async def test_a_blob_that_turns_out_wrong(
    chunks: list[bytes],
    error: Exception | None,
    raised: type[LayersError],
    arrived: list[bytes],
) -> None:
    network, _ = serving(*chunks, error=error)
    came: list[bytes] = []
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(raised, match=r"registry\.example"):
            async with client.open_blob(APP, describe(b"content")) as stream:
                async for chunk in stream:
                    came.append(chunk)
        assert client.statistics().active == 0
    assert came == arrived


async def test_what_the_block_of_a_blob_raises_is_what_comes_out() -> None:
    network, body = serving(b"con", b"tent")
    async with network.client() as http, open_registry_client(client=http) as client:
        with pytest.raises(KeyError, match="mine"):
            async with client.open_blob(APP, describe(b"content")) as stream:
                await anext(stream)
                raise KeyError("mine")
        assert body.closed
        with trio.CancelScope() as scope:
            async with client.open_blob(APP, describe(b"content")) as stream:
                await anext(stream)
                scope.cancel()
                await anext(stream)
        assert scope.cancelled_caught
        assert client.statistics().active == 0


async def test_references_as_text() -> None:
    async with open_registry_client() as client:
        for method in (client.resolve, client.tags, client.referrers, client.get_manifest):
            with pytest.raises(InvalidReference):
                await method("Not A Reference")
            with pytest.raises(InvalidDigest):
                await method(f"{APP}@sha512:{128 * '0'}")
        with pytest.raises(PlatformError):
            await client.resolve_image(APP, platform="linux/amd64/v1/more")


# Requests with a login.


@pytest.mark.parametrize("auth", [BasicAuth("user", "password"), TokenAuth("user", "password")])
async def test_over_a_socket_with_a_login(auth: BasicAuth | TokenAuth) -> None:
    async with open_registry(auth=auth) as registry:
        reference, image, entries = with_referrers(registry)
        async with open_registry_client() as client:
            with pytest.raises(AuthenticationError, match="answered 401"):
                await client.resolve(reference)
        async with open_registry_client(credentials=Credentials("user", "password")) as client:
            assert await client.resolve(reference) == image
            assert await client.tags(reference) == ("1",)
            assert await client.referrers(reference) == tuple(entries)
