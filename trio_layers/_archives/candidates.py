"""Lists the images of an archive or layout.

An OCI layout lists its images in ``index.json``, a docker-archive in ``manifest.json``. An archive
may have both lists, and some writers get one of the two wrong (moby issues 47065, 47210 and 51389).
So this module unites the lists. Entries with the same config describe the same image. If one
description of an image is unusable, the importer tries the other one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar, TypeVarTuple, final

import attrs
import trio

from .._digest import Digest, digest_of
from .._errors import (
    ArchiveError,
    InvalidReference,
    ManifestError,
    VerificationError,
)
from .._manifest import Descriptor, Index, Manifest, is_artifact
from .._printable import printable_value
from .._reference import Reference, parse_reference
from .._select import MAX_INDEX_DEPTH
from .documents import (
    DOCKER,
    INDEX,
    LAYOUT,
    VERSION,
    DockerImage,
    blob_path,
    check_layout,
    claimed_digest,
    decode_docker,
    decode_document,
    decode_index,
    is_dir_transport,
    is_id,
    name_of,
)
from .reading import LayoutDirectory, Source

__all__ = ["MAX_NAMES", "Candidate", "Listing", "decode", "list_images"]

MAX_NAMES: Final = 10_000
"""The limit on the names of all images of a source.

Each name takes a row in the store's catalog and an entry in its ``index.json``."""

MAX_LISTED: Final = 1_000_000
"""The limit on the entries that are read from all indexes of a source.

A manifest counts again for each index that leads to it through nested indexes."""

_MAX_COPIES: Final = 8  # the limit on the descriptions of one image
_SHOWN: Final = 10

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@attrs.define
class _Contents:
    """The images below some entries of ``index.json``.

    Attributes:
        configs: The descriptor of each image's manifest, by the digest of the image's config.
        manifests: The same descriptors, by the digests of the manifests.
        indexes: The digests of the indexes that lead to these manifests.
        is_whole: Whether all indexes, manifests and configs are present, and the first two valid.
        artifacts: The digests of the manifests that describe artifacts, not images.
    """

    configs: dict[Digest, Descriptor] = attrs.field(factory=dict)
    manifests: dict[Digest, Descriptor] = attrs.field(factory=dict)
    indexes: set[Digest] = attrs.field(factory=set)
    is_whole: bool = True
    artifacts: set[Digest] = attrs.field(factory=set)

    def add(self, other: _Contents) -> None:
        self.configs.update(other.configs)
        self.manifests.update(other.manifests)
        self.indexes |= other.indexes
        self.is_whole &= other.is_whole
        self.artifacts |= other.artifacts

    @property
    def is_artifact(self) -> bool:
        return bool(self.artifacts) and not self.manifests and self.is_whole

    @property
    def is_useless(self) -> bool:
        return not self.manifests and not self.is_whole


@attrs.define(eq=False)
class Candidate:
    """One image of a source, or the images of one entry for several platforms.

    Attributes:
        names: The full names of the image.
        tag: A name that is no full reference, usually a bare tag.
        roots: The entries of ``index.json`` that lead to the image.
        docker: The image's entries in ``manifest.json``, with the digests of their configs.
        contents: The images, indexes and artifacts below the roots.
        config: The config's digest. It is set only if ``index.json`` leads to no such image.
    """

    names: dict[Reference, None] = attrs.field(factory=dict)
    tag: str = ""
    roots: tuple[Descriptor, ...] = ()
    docker: dict[DockerImage, Digest | None] = attrs.field(factory=dict)
    contents: _Contents = attrs.field(factory=_Contents)
    config: Digest | None = None

    def __str__(self) -> str:
        """The image's names, or else its digests, for messages."""
        if self.names:
            return _listed(map(str, self.names))
        digests = [root.digest for root in self.roots]
        if self.config is not None and not digests:
            digests = [self.config]
        text = _listed(digests) or "an image without a config"
        return f"the tag {printable_value(self.tag)} ({text})" if self.tag else text

    @property
    def source(self) -> str:
        """The file that lists the image, for messages."""
        return INDEX if self.contents.manifests or not self.docker else DOCKER

    @property
    def identity(self) -> str:
        """The digests that identify the image in a message.

        This is the digest of its config, or the digests of its roots if it has several platforms.
        """
        if self.config is not None:
            return self.config
        if len(self.contents.configs) == 1:
            return next(iter(self.contents.configs))
        return _listed(root.digest for root in self.roots)

    def is_of(self, config: Digest | None) -> bool:
        """Whether the candidate has an image with this config."""
        return config is not None and (config == self.config or config in self.contents.configs)

    def digests(self) -> Iterator[Digest]:
        """The digests that choose this candidate: of manifests, indexes and configs."""
        if self.config is not None:
            yield self.config
        for root in self.roots:
            yield root.digest
        yield from self.contents.manifests
        yield from self.contents.indexes
        yield from self.contents.configs

    def describe(self, image: DockerImage, config: Digest | None) -> None:
        """Add an entry of ``manifest.json`` that describes an image of this candidate."""
        if len(self.docker) < _MAX_COPIES:
            self.docker.setdefault(attrs.evolve(image, tags=()), config)

    def part(self, digest: Digest) -> Candidate:
        """The image of this candidate that a digest from `digests` denotes."""
        roots = [root for root in self.roots if root.digest == digest]
        inner = self.contents.manifests.get(digest) or self.contents.configs.get(digest)
        if inner is None:
            return attrs.evolve(self, roots=tuple(roots)) if roots else self
        configs = {c: root for c, root in self.contents.configs.items() if root == inner}
        docker = dict(each for each in self.docker.items() if each[1] in configs)
        contents = _Contents(configs, {inner.digest: inner})
        return attrs.evolve(self, roots=(inner,), docker=docker, contents=contents)


@attrs.frozen
class Listing:
    """The images of a source.

    Attributes:
        candidates: The images.
        artifacts: The signatures, attestations and other artifacts beside the images.
    """

    candidates: Sequence[Candidate]
    artifacts: Sequence[Candidate]


async def list_images(source: Source) -> Listing:
    """Read the lists of a source.

    Raises:
        ArchiveError: if the source has no list of images, or no readable one.
        ManifestError: if ``index.json`` is not valid, and the other list has no images.
        VerificationError: if a config does not match the digest in its path.
    """
    union = _Union(source)
    failure: Exception | None = None
    entries: Sequence[Descriptor] | None = None
    images: Sequence[DockerImage] | None = None
    docker = await source.read(DOCKER)
    try:
        entries = await _read_index(source, is_layout=docker is None)
    except (ArchiveError, ManifestError) as error:
        failure = error
    try:
        images = None if docker is None else await decode(source, decode_docker, docker)
    except ArchiveError as error:
        failure = failure or error
    if not entries and not images:
        if await _is_dir_transport(source):
            raise ArchiveError(
                f"{source.name} is a directory of skopeo's dir: transport, and no image archive or "
                "layout: convert it by skopeo copy dir:DIRECTORY oci-archive:FILE:NAME"
            )
        if failure is not None:
            raise failure
        if entries is None and images is None:
            raise await _no_list(source)
    paths = [] if entries else [image.config for image in images or ()]
    if isinstance(source, LayoutDirectory) and None in map(claimed_digest, paths):
        raise ArchiveError(
            f"{source.name} is a docker-archive that was unpacked, and the paths in it are not "
            "opened: pack it by tar -C DIRECTORY -c ., and import that"
        )
    await union.add_index(entries or ())
    await union.add_docker(images or ())
    return union.listing()


async def _read_index(source: Source, *, is_layout: bool) -> Sequence[Descriptor] | None:
    """Read the entries of ``index.json``; ``is_layout``: ``oci-layout`` is required."""
    layout, index = await source.read(LAYOUT), await source.read(INDEX)
    if index is None or (layout is None and is_layout):
        return None
    if layout is not None:
        await decode(source, check_layout, layout)
    return (await decode(source, decode_index, index)).images


async def _is_dir_transport(source: Source) -> bool:
    try:
        return is_dir_transport(await source.read(VERSION))
    except ArchiveError:
        return False  # larger than a document may be, so not skopeo's file


async def _no_list(source: Source) -> ArchiveError:
    there = ", ".join(map(printable_value, await source.names()))
    return ArchiveError(
        f"{source.name} is neither an OCI layout, with {LAYOUT} and {INDEX}, nor a "
        f"docker-archive, with {DOCKER}: it has {there or 'nothing'}"
    )


@final
class _Union:
    """Unites the two lists, in time linear in entries and names."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._known: dict[tuple[str, Digest, int], _Contents] = {}
        self._sizes: dict[Digest, int] = {}
        self._left = MAX_LISTED
        self._candidates: list[Candidate] = []
        self._by_name: dict[Reference, list[Candidate]] = {}
        self._by_config: dict[Digest, list[Candidate]] = {}
        self._useless: deque[Candidate] = deque()

    def listing(self) -> Listing:
        images = [each for each in self._candidates if not each.contents.is_artifact]
        artifacts = [each for each in self._candidates if each.contents.is_artifact]
        # A source with artifacts alone offers them as candidates: importing one either succeeds or
        # fails with an error that names its type.
        return Listing(images, artifacts) if images else Listing(artifacts, ())

    # index.json.

    async def add_index(self, entries: Iterable[Descriptor]) -> None:
        groups = await trio.to_thread.run_sync(_grouped, entries)
        # A Descriptor's hash leaves out its annotations, so _key is the key here.
        found = {_key(root): await self._find(root) for group in groups.values() for root in group}
        await trio.to_thread.run_sync(self._add_groups, groups, found)

    def _add_groups(
        self,
        groups: Mapping[Reference | str, Sequence[Descriptor]],
        found: Mapping[tuple[str, Digest, int], _Contents],
    ) -> None:
        one: dict[tuple[str, Digest, int], Candidate] = {}
        for name, group in groups.items():
            images = [root for root in group if not found[_key(root)].is_artifact]
            rest = group
            if len(images) > 1 and _are_platforms(images):
                # Entries with one name for different platforms form one image.
                self._add(name, images, [found[_key(root)] for root in images])
                rest = [root for root in group if found[_key(root)].is_artifact]
            for root in rest:
                same = one.get(_key(root))
                if same is None:
                    one[_key(root)] = self._add(name, [root], [found[_key(root)]])
                elif isinstance(name, Reference):
                    self._name(same, name)
                else:
                    same.tag = same.tag or name

    def _add(
        self,
        name: Reference | str,
        roots: Sequence[Descriptor],
        contents: Sequence[_Contents],
    ) -> Candidate:
        merged = _Contents() if len(contents) > 1 else contents[0]
        if len(contents) > 1:
            for each in contents:
                merged.add(each)
        candidate = Candidate(roots=tuple(roots), contents=merged)
        self._candidates.append(candidate)
        if isinstance(name, Reference):
            self._name(candidate, name)
        else:
            candidate.tag = name
            if merged.is_useless:
                self._useless.append(candidate)
        for config in merged.configs:
            self._by_config.setdefault(config, []).append(candidate)
        return candidate

    def _name(self, candidate: Candidate, name: Reference) -> None:
        candidate.names[name] = None
        names = [name]
        if name.tag and name.digest:
            # manifest.json has no place for a digest, so its entry has the tag alone.
            names.append(attrs.evolve(name, digest=None))
        for each in names:
            holders = self._by_name.setdefault(each, [])
            if len(holders) < _MAX_COPIES:
                holders.append(candidate)

    async def _find(self, root: Descriptor, depth: int = 0) -> _Contents:
        """Find the images below an entry of an index."""
        known = self._known.get(_key(root))
        if known is not None:
            await trio.lowlevel.checkpoint()
            return known
        found = self._known[_key(root)] = _Contents()
        data = None
        # Entries may claim many wrong sizes for one blob: its known size saves reading it again.
        if self._sizes.get(root.digest, root.size) == root.size:
            data = await self._source.read(blob_path(root.digest))
        document = None
        if data is not None:
            self._sizes[root.digest] = len(data)
            document = await trio.to_thread.run_sync(_document, data, root)
        if document is None:
            found.is_whole = False
        elif isinstance(document, Index):
            found.indexes.add(root.digest)
            for entry in document.images if depth < MAX_INDEX_DEPTH else ():
                below = await self._find(entry, depth + 1)
                self._left -= 1 + len(below.manifests)
                if self._left < 0:
                    raise ArchiveError(
                        f"{self._source.name} has more than {MAX_LISTED} entries in indexes"
                    )
                found.add(below)
        elif is_artifact(document):
            found.artifacts.add(root.digest)
        elif await self._source.digest(blob_path(document.config.digest)) is None:
            found.is_whole = False
        else:
            found.manifests[root.digest] = root
            found.configs[document.config.digest] = root
        return found

    # manifest.json.

    async def add_docker(self, images: Sequence[DockerImage]) -> None:
        configs: dict[str, Digest | None] = {}
        for path in dict.fromkeys(image.config for image in images):
            configs[path] = await self._source.digest(path)
        await trio.to_thread.run_sync(self._add_all, images, configs)

    def _add_all(self, images: Iterable[DockerImage], configs: Mapping[str, Digest | None]) -> None:
        useful = [config for config in configs.values() if config is not None]
        if useful and not any(each.contents.manifests for each in self._candidates):
            # The source lacks all images in index.json, so those entries give way to manifest.json.
            self._candidates = [each for each in self._candidates if each.contents.is_artifact]
            self._by_name.clear()
            self._useless.clear()
        if not useful and self._by_config:
            # The source lacks every config path in manifest.json. An entry is still useful if its
            # path names the config of an image in index.json: that image gets its names.
            images = [each for each in images if claimed_digest(each.config) in self._by_config]
        has_index = bool(self._candidates)
        for image in images:
            found = configs[image.config]
            claimed = claimed_digest(image.config)
            if has_index and claimed is not None and found not in (None, claimed):
                raise VerificationError(
                    f"{self._source.name}: {printable_value(image.config)} is damaged: "
                    f"what it holds is {found}",
                    digest=claimed,
                )
            config = found or claimed_digest(image.config, config=True)
            self._add_docker(image, config, is_there=found is not None)

    def _add_docker(self, image: DockerImage, config: Digest | None, *, is_there: bool) -> None:
        same = [] if config is None else self._by_config.setdefault(config, [])
        for candidate in same[:_MAX_COPIES]:
            candidate.describe(image, config)
        names = _parsed(image.tags)
        fresh = [name for name in names if not self._is_taken(name, image, config, is_there)]
        if names and not fresh:
            return
        if same:
            assert config is not None
            if fresh:
                target = self._alone(config, same)
                target.describe(image, config)
                for name in fresh:
                    self._name(target, name)
            return
        if self._useless and is_there:
            candidate = self._useless.popleft()
            candidate.config = config
        else:
            candidate = Candidate(config=config)
            self._candidates.append(candidate)
        candidate.describe(image, config)
        for name in fresh:
            self._name(candidate, name)
        if config is not None:
            self._by_config[config].append(candidate)

    def _is_taken(
        self, name: Reference, image: DockerImage, config: Digest | None, is_there: bool
    ) -> bool:
        """Whether the name already belongs to this image, or to one that may be it."""
        holders = self._by_name.get(name, ())
        if any(each.is_of(config) for each in holders):
            return True
        if not is_there:
            return bool(holders)
        broken = [each for each in holders if each.roots and not each.contents.is_whole]
        for candidate in broken:
            candidate.describe(image, config)
        return bool(broken)

    def _alone(self, config: Digest, same: list[Candidate]) -> Candidate:
        """Find or make the candidate for this image alone.

        The names in ``manifest.json`` mean one image, never all platforms of an index.
        """
        for candidate in same:
            if len(candidate.contents.configs) <= 1:
                return candidate
        root = same[0].contents.configs[config]
        candidate = Candidate(
            roots=(root,), contents=_Contents({config: root}, {root.digest: root})
        )
        self._candidates.append(candidate)
        same.insert(0, candidate)
        return candidate


def _grouped(entries: Iterable[Descriptor]) -> dict[Reference | str, list[Descriptor]]:
    """Group entries by name, with each blob once in a group."""
    groups: dict[Reference | str, dict[tuple[str, Digest, int], Descriptor]] = {}
    for entry in entries:
        groups.setdefault(name_of(entry), {}).setdefault(_key(entry), entry)
    return {name: list(group.values()) for name, group in groups.items()}


def _key(descriptor: Descriptor) -> tuple[str, Digest, int]:
    return descriptor.media_type, descriptor.digest, descriptor.size


def _document(data: bytes, root: Descriptor) -> Manifest | Index | None:
    """Decode an entry's document; ``None``: wrong size or digest, or not valid."""
    if len(data) != root.size or digest_of(data, root.digest) != root.digest:
        return None
    try:
        return decode_document(data, root.media_type)
    except ManifestError:
        return None


def _are_platforms(roots: Iterable[Descriptor]) -> bool:
    """Whether every entry has a platform, and no two have the same."""
    platforms = [root.platform for root in roots]
    return None not in platforms and len(set(platforms)) == len(platforms)


def _parsed(tags: Iterable[str]) -> tuple[Reference, ...]:
    names = []
    for tag in tags:
        try:
            if not is_id(tag):
                names.append(parse_reference(tag))
        except InvalidReference:
            pass
    return tuple(dict.fromkeys(names))


def _listed(texts: Iterable[str]) -> str:
    some = list(itertools.islice(texts, _SHOWN + 1))
    return ", ".join(some[:_SHOWN]) + ", …" * (len(some) > _SHOWN)


async def decode(source: Source, call: Callable[[bytes, *Ts], T], data: bytes, *args: *Ts) -> T:
    """Decode a document of a source in a worker thread."""
    try:
        return await trio.to_thread.run_sync(call, data, *args)
    except ArchiveError as error:
        raise ArchiveError(f"{source.name}: {error}") from error
