"""The JSON decoder accepts RFC 8259's grammar, and refuses ambiguous documents."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable

import pytest
from _tools.calls import calls_of

from trio_layers._archives.documents import check_layout, decode_docker
from trio_layers._errors import ArchiveError, ManifestError, RegistryError
from trio_layers._gocompat import without_surrogates
from trio_layers._json import MAX_DEPTH, AmbiguousJSON, dismantle, parse_json
from trio_layers._manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_SIZE,
    decode_config,
    decode_manifest,
)
from trio_layers._registry.pagination import decode_tags

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
POINTER = f'"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{DIGEST}","size":1'
LAYER = f'"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{DIGEST}","size":1'


def manifest(extra: str = "", pointer: str = POINTER, layer: str = LAYER) -> bytes:
    text = f'{{"schemaVersion":2,"config":{{{pointer}}},"layers":[{{{layer}}}]{extra}}}'
    return text.encode()


def index(extra: str = "", entry: str = "") -> bytes:
    manifest = MANIFEST_TYPES[0]
    text = (
        f'{{"schemaVersion":2,"manifests":[{{"mediaType":"{manifest}","digest":"{DIGEST}",'
        f'"size":1{entry}}}]{extra}}}'
    )
    return text.encode()


def config(extra: str = "", rootfs: str = "") -> bytes:
    text = (
        '{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":'
        f'["{DIGEST}"]{rootfs}}}{extra}}}'
    )
    return text.encode()


def as_manifest(data: bytes) -> object:
    return decode_manifest(data, MANIFEST_TYPES[0])


def as_index(data: bytes) -> object:
    return decode_manifest(data, INDEX_TYPES[0])


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (as_manifest, manifest(',"layers":[]')),
        (as_manifest, manifest(f',"config":{{{POINTER}}}')),
        (as_manifest, manifest(',"schemaVersion":2')),
        (as_manifest, manifest(',"\\u006cayers":[]')),
        (as_manifest, manifest(pointer=f'{POINTER},"digest":"{OTHER}"')),
        (as_manifest, manifest(layer=f'{LAYER},"size":1')),
        (as_manifest, manifest(',"x":[{"y":{"z":1,"z":1}}]')),
        (as_manifest, manifest(',"annotations":{"a":"1","a":"2"}')),
        (as_manifest, manifest(',"annotations":{"\\ud800":"1","\\udfff":"2"}')),
        (as_manifest, manifest(',"annotations":{},"Annotations":{"a":"b"}')),
        (as_manifest, manifest(layer=f'{LAYER},"urls":[],"URLs":["https://example.org"]')),
        (as_manifest, manifest(layer=f'{LAYER},"dige\u017ft":"{OTHER}"')),
        (as_index, index(',"manifests":[]')),
        (as_index, index(entry=',"platform":{"os":"linux","architecture":"arm64","os":"b"}')),
        (as_index, index(entry=',"platform":{"os":"linux","architecture":"arm64","OS":"b"}')),
        (as_index, index(entry=',"platform":{},"Platform":{"os":"linux"}')),
        (decode_config, config(f',"rootfs":{{"type":"layers","diff_ids":["{OTHER}"]}}')),
        (decode_config, config(rootfs=',"diff_ids":[]')),
        (decode_config, config(rootfs=',"Diff_IDs":[]')),
        (decode_config, config(',"os":"windows"')),
        (decode_config, config(',"Os":"windows"')),
        (decode_config, config(',"config":{"User":"0","User":"1"}')),
        (decode_config, config(',"config":{"User":"0","user":"1"}')),
        (decode_config, config(',"config":{"Labels":{"a":"1","a":"2"}}')),
        (decode_config, config(',"history":[{"comment":"a","comment":"b"}]')),
        (check_layout, b'{"imageLayoutVersion":"1.0.0","imageLayoutVersion":"2.0.0"}'),
        (decode_docker, b'[{"Config":"a","Layers":["b"],"Layers":[]}]'),
        (decode_docker, b'[{"Config":"a","Layers":["b"],"layers":[]}]'),
        (decode_docker, b'[{"Config":"a","config":"b"}]'),
    ],
    ids=range(29),
)
def test_a_member_that_readers_find_twice_is_refused(
    decode: Callable[[bytes], object], data: bytes
) -> None:
    with pytest.raises((ManifestError, ArchiveError), match="ambiguous, since"):
        decode(data)


def test_a_list_of_tags_with_two_lists_is_refused() -> None:
    assert decode_tags(b'{"name":"a","tags":["1"]}', "host") == ["1"]
    with pytest.raises(RegistryError, match="something else"):
        decode_tags(b'{"tags":["1"],"tags":["2"]}', "host")


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (as_manifest, manifest(',"annotations":{"a":"1","A":"2"}')),
        (decode_config, config(',"config":{"Labels":{"a":"1","A":"2"},"Env":["a=1","A=2"]}')),
        (decode_config, config(',"config":{"user":"1"},"container_config":{"User":"0"}')),
        (as_manifest, manifest(f',"x":{{{LAYER}}},"y":{{{LAYER}}}')),
    ],
    ids=range(4),
)
def test_names_that_differ_are_no_doubles(decode: Callable[[bytes], object], data: bytes) -> None:
    """A mapping's keys may differ only in case, as in Go."""
    decode(data)


def fill(unit: str, begin: str = "[", end: str = "1]") -> bytes:
    """Repeat a unit up to the largest document size."""
    count = (MAX_DOCUMENT_SIZE - len(begin) - len(end)) // len(unit.encode())
    return (begin + unit * count + end).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 300_000,
        b'{"a":' * 100_000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"9" * 1_000_000,
        b"-" * 1_000_000,
        b"1." + b"9" * 1_000_000,
        b"1e" + b"9" * 1_000_000,
        b" " * 1_000_000,
        b'"' + b"\\n" * 1_000_000,
        b'"' + b"\\\\" * 1_000_000 + b"\\",
        b'"\x00"',
        b'"\n"',
        b'"\\x"',
        b'"\\u12"',
        b"\xed\xa0\x80",
        b'"\xed\xa0\x80"',
        b"\xff\xfe[\x00]\x00",
        b"\xef\xbb\xbf[]",
        b"[NaN]",
        b"[-Infinity]",
        b"[01]",
        b"[1,]",
        b"[,]",
        b'{"a":1,}',
        b"{1:2}",
        b"{'a':1}",
        b'{"a"}',
        b"[] []",
        b"nul",
        b"",
    ],
    ids=range(30),
)
def test_what_is_no_json_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ManifestError, match="manifest: not JSON") as caught:
        as_manifest(data)
    assert type(caught.value.__cause__) in (ValueError, UnicodeDecodeError)
    assert len(str(caught.value)) < 200


def test_values_that_no_reader_can_hold_are_typed_errors() -> None:
    for size in ("1e999", "9" * 5000, "-1", "1.5", "2e0"):
        with pytest.raises(ManifestError, match="not a number of bytes"):
            as_manifest(manifest(layer=LAYER.replace('"size":1', f'"size":{size}')))
    # Unknown members may hold such values, as in Go.
    as_manifest(manifest(',"x":[1e999,123456789012345678901234567890,"\\u0000","\\ud800"]'))


def test_the_deepest_document_is_read_wherever_it_is() -> None:
    """The decoder does not recurse, so it needs little of the stack."""
    data = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH

    def deep(levels: int) -> object:
        return parse_json(data) if levels == 0 else deep(levels - 1)

    assert deep(sys.getrecursionlimit() - 200) == json.loads(data)


@pytest.mark.parametrize("seed", range(2))
def test_it_agrees_with_the_standard_library(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [*'{}[]",:\\ \n0123eE.-+tfn', "true", "null", '"a"', '{"a":1}', "\\u0041", "\\ud83d"]
    pieces += ["\\ude00", "\x00", "é", "😀", "1.5", "-0", "NaN", "a" * 70_000, "\\n" * 5000, ""]
    good = json.dumps({"a": [1, {"b": "x\n", "c": None, "d": []}, {}], "e": 1.5e3, "f": "é"})

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({without_surrogates(name) for name, _ in pairs}) < len(pairs):
            raise AmbiguousJSON
        return dict(pairs)

    def refuse(name: str) -> object:
        raise ValueError(name)

    def normal(value: object) -> object:
        if isinstance(value, dict):
            return {without_surrogates(k): normal(v) for k, v in value.items()}
        if isinstance(value, list):
            return [normal(each) for each in value]
        return without_surrogates(value) if isinstance(value, str) else value

    def read(parse: Callable[[str], object]) -> str:
        try:
            return repr(parse(text))
        except ValueError:
            return "refused"

    for _ in range(3000):
        text = good
        for _ in range(chance.randint(0, 3)):
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(pieces) + text[at + chance.randint(0, 2) :]
        expected = read(
            lambda text: normal(json.loads(text, object_pairs_hook=unique, parse_constant=refuse))
        )
        assert read(lambda text: parse_json(text.encode())) == expected, text


@pytest.mark.parametrize("unit", ["{},", '"",', "[],", "1,", '{"a":[{}]},', "\\n"])
def test_a_document_is_read_in_linear_work_and_short_steps(unit: str) -> None:
    """The number of calls grows with the document, so threads can switch."""

    def calls(data: bytes) -> int:
        return calls_of(lambda: parse_json(data))

    begin, end = ('"', '"') if unit == "\\n" else ("[", "1]")
    small = calls(f"{begin}{unit * 2_000}{end}".encode())
    large = calls(f"{begin}{unit * 4_000}{end}".encode())
    assert large <= 2.2 * small
    if unit != "\\n":
        assert large >= 4_000


def test_a_config_of_a_million_entries_of_history_is_read() -> None:
    data = fill("{},", config(',"history":[').decode()[:-1], "{}]}")
    assert data.count(b"{}") > 1_000_000
    assert decode_config(data).diff_ids == (DIGEST,)


def test_a_document_is_taken_apart_and_its_empty_parts_are_shared() -> None:
    document = parse_json(b'{"a":[{},{},[],[1,[2]]],"b":{"c":[[]]}}')
    assert isinstance(document, dict)
    first, second, *_ = inner = document["a"]
    assert first is second
    dismantle(document)
    assert (document, inner, first) == ({}, [], {})
    assert parse_json(b"[{},[]]") == [{}, []]
