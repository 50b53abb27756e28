"""A layer that cannot be unpacked causes a complete error message, and nothing else."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from cases.layers import maketar
from store.stores import Blob, Stream, arriving, describe, digest_of, layer_of, visible

from trio_layers import DecompressionError, LayersError, LimitExceeded, Limits, UnpackError
from trio_layers._digest import DiffID
from trio_layers._pull import open_puller
from trio_layers._store.directory import DirectoryStore, open_store
from trio_layers._store.layers import DirectoryLayer

GOOD = layer_of(good="good")


def tar(*entries: dict) -> bytes:
    return b"".join(maketar.iter_tar({"entries": list(entries)}))


def blob_of(data: bytes) -> Blob:
    return Blob(data, describe(data), DiffID(digest_of(data)))


def damaged_checksum(name: str) -> bytes:
    return tar({"name": name, "fields": {"chksum": "303030303030"}})


NOISE = random.Random(1).randbytes(100_000).hex()
PACKED = gzip.compress(tar({"name": "f", "text": {"hex": NOISE}}), mtime=0)

FAMILIES: dict[str, tuple[bytes, type[LayersError], str]] = {
    "checksum": (damaged_checksum("f"), UnpackError, "'f': .*checksum of its header"),
    "size": (
        tar({"name": "f", "size": 600, "text": "x"})[:1024],
        UnpackError,
        "'f': .*ends .*early",
    ),
    "two sizes": (
        tar({"name": "f", "text": "x", "pax": {"size": "0"}}),
        UnpackError,
        "'f': .*its size is 1 in the header, but 0 in a PAX record",
    ),
    "header": (tar({"name": "f"})[:100], UnpackError, "the archive ends within a header"),
    "type": (tar({"name": "f", "type": "M"}), UnpackError, "'f': .*unknown type 'M'"),
    "record": (tar({"name": "f", "pax_raw": "9 a=b\n"}), UnpackError, "'PaxHeaders.0/x': .*record"),
    "sparse": (
        tar({"name": "f", "pax": {"GNU.sparse.major": "2", "GNU.sparse.size": "1"}}),
        UnpackError,
        "'f': .*sparse map has an unknown version",
    ),
    "outside": (tar({"name": "../f"}), UnpackError, "'../f': the path leads out of the root"),
    "whiteout": (tar({"name": ".wh..."}), UnpackError, "the whiteout names nothing"),
    "hard link": (
        tar({"name": "f", "type": "hardlink", "linkname": "none"}),
        UnpackError,
        "'f': cannot link to 'none': the target does not exist",
    ),
    "name": (tar({"name": "n" * 256}), UnpackError, "'nnn.*File name too long"),
    "attribute": (
        tar({"name": "f", "pax": {f"SCHILY.xattr.user.{'k' * 300}": "v"}}),
        UnpackError,
        "'f': cannot set the attribute 'user.k+'",
    ),
    "bytes": (tar({"name": "f", "size": 1 << 30}), LimitExceeded, "'f': .*max_unpacked_bytes"),
    "ratio": (gzip.compress(tar() + bytes(1 << 20)), LimitExceeded, "max_ratio"),
    "entries": (tar(*[{"name": f"{n}"} for n in range(9)]), LimitExceeded, "'8': .*max_entries, 8"),
    "depth": (tar({"name": "a/b/c/d"}), LimitExceeded, "'a/b/c/d': .*max_depth is 3"),
    "gzip header": (b"\x1f\x8b\x08\x08" + b"n" * 600, DecompressionError, "gzip data, near byte 0"),
    "gzip data": (
        PACKED[:50_000] + b"\xff" + PACKED[50_001:],
        UnpackError,
        "'f', or soon after it: gzip data, near byte",
    ),
    "gzip end": (PACKED[:-4], UnpackError, "'f', or soon after it: gzip data, .* too early"),
    "gzip checksum": (PACKED[:-8] + b"\0" * 8, UnpackError, "gzip data, near byte"),
    "zstd header": (
        b"\x28\xb5\x2f\xfd\x08" + bytes(20),
        DecompressionError,
        "zstd data, near byte 0",
    ),
}

LIMITS = Limits(
    max_unpacked_bytes=64 << 20, max_entries=8, max_depth=3, max_ratio=500, max_ratio_from=1 << 19
)


async def register(store: DirectoryStore, blob: Blob, below: DirectoryLayer | None = None):
    parent = None if below is None else below.chain_id
    return await store.register(Stream(blob.data), parent, blob.descriptor)


@pytest.mark.parametrize("family", FAMILIES)
async def test_an_error_names_the_layer_the_entry_and_the_rule(family: str, tmp_path: Path) -> None:
    """… and leaves no tree, and the store works as before."""
    data, kind, text = FAMILIES[family]
    blob = blob_of(data)
    async with open_store(tmp_path, limits=LIMITS) as store:
        below = await register(store, GOOD)
        before = visible(tmp_path)
        for parent in (None, below):
            with pytest.raises(kind, match=rf"^layer {blob.digest}: .*{text}") as caught:
                await register(store, blob, parent)
            assert type(caught.value) is kind
            assert caught.value.layer == blob.digest
            again = caught.value.copy_to_raise()
            assert (str(again), again.layer) == (str(caught.value), blob.digest)
            # At most the blob is stored, and matches its digest.
            assert [name for name in visible(tmp_path) if name.startswith("trees/")] == [
                name for name in before if name.startswith("trees/")
            ]
            assert not [name for name in arriving(tmp_path) if "tree" in name]
        top = await register(store, layer_of(other="other"), below)
        rootfs = await store.rootfs(top.chain_id)
        assert await rootfs.read_bytes("good") == b"good"
        assert await rootfs.read_bytes("other") == b"other"


async def test_a_layer_that_nobody_describes_has_no_name(tmp_path: Path) -> None:
    """Its digest is known only after its last byte."""
    async with open_store(tmp_path, limits=LIMITS) as store:
        with pytest.raises(UnpackError, match=r"^'f': damaged") as caught:
            await store.register(Stream(damaged_checksum("f")), None)
        assert caught.value.layer is None
        assert visible(tmp_path) == []


async def test_limits_are_raised_when_a_store_is_opened(tmp_path: Path) -> None:
    """One program may unpack a layer that another refused, in the same store."""
    blob = blob_of(tar({"name": "a/b/c/d"}))
    async with open_store(tmp_path, limits=LIMITS) as store:
        with pytest.raises(LimitExceeded, match="max_depth"):
            await register(store, blob)
    async with open_store(tmp_path) as store:
        layer = await register(store, blob)
    async with open_store(tmp_path, limits=LIMITS) as store:
        assert (await register(store, blob)).chain_id == layer.chain_id


async def test_a_puller_passes_limits_on(tmp_path: Path) -> None:
    """The puller's limits are for a store that it opens. An open store has its own."""
    blob = blob_of(tar({"name": "a/b/c/d"}))
    async with open_puller(tmp_path, limits=LIMITS) as puller:
        with pytest.raises(LimitExceeded, match="max_depth"):
            await register(puller.store, blob)
    async with open_puller(tmp_path) as puller:
        await register(puller.store, blob)
    async with open_store(tmp_path) as store:
        with pytest.raises(ValueError, match="has its limits already"):
            async with open_puller(store, limits=LIMITS):
                pytest.fail("entered")
