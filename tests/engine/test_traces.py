"""The engine against what Docker's was recorded doing: `tests/cases/engine`, and more from the
directory that ``TRIO_LAYERS_CASES`` names. `FORMAT.md` beside the files says how to compare."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
from engine.seeds import run
from engine.world import World

SEEDS = range(24)
HERE = Path(__file__).parents[1] / "cases" / "engine"


def trace_files() -> list[Path]:
    files = sorted(HERE.glob("*.json"))
    more = os.environ.get("TRIO_LAYERS_CASES")
    if more:
        files += sorted((Path(more) / "engine").glob("*.json"))
    return files


FILES = trace_files()


@pytest.mark.parametrize("path", FILES, ids=[f"{i}-{p.stem}" for i, p in enumerate(FILES)])
def test_trace(path: Path) -> None:
    """A recorded scenario, replayed under many orders of scheduling, ends as recorded."""
    trace = json.loads(path.read_text())
    if trace["scenario"]["manager"].get("max_attempts") == 0:
        # Docker's engine tries once; for ours nothing is left to compare.
        with pytest.raises(ValueError, match="max_download_attempts"):
            run(World(trace["scenario"]).play)
        return
    expected = trace["ours"] if trace.get("quirk") else trace["expected"]
    # An empty list means that the reference forgot it, except where the trace is ours already.
    recorded_close = trace["expected"]["descriptor_close"]
    for seed in SEEDS:
        world = World(trace["scenario"])
        run(world.play, seed)
        problems = [*differences(world, expected, recorded_close), *broken_invariants(world)]
        assert not problems, f"{path.name}, seed {seed}:\n" + "\n".join(problems)


def test_every_file_is_an_item(request: pytest.FixtureRequest) -> None:
    """Not fewer traces are run than there are files."""
    items = [item for item in request.session.items if item.name.startswith("test_trace[")]
    selected = request.config.getoption("keyword") or any(
        "::" in arg for arg in request.config.args
    )
    assert FILES
    assert selected or len(items) >= len(trace_files())


# What is compared.


def differences(world: World, expected: dict, recorded_close: dict) -> list[str]:
    problems: list[str] = []
    words = beginning if has_gzip(world.scenario) else str

    def compare(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            problems.append(f"{what}:\n  ours     {ours}\n  expected {theirs}")

    compare("pulls", sorted(world.pulls), sorted(expected["pulls"]))
    for name, theirs in expected["pulls"].items():
        ours = world.pulls[name]
        compare(f"{name} end", ours["end"], rounded(theirs["end"]))
        compare(f"{name} diff IDs", ours["diff_ids"], theirs["diff_ids"])
        compare(f"{name} error", words(ours["error"]), words(theirs["error"]))
        compare(f"{name} layers", sorted(ours["progress"]), sorted(theirs["progress"]))
        for layer, events in theirs["progress"].items():
            seen = ours["progress"].get(layer, [])
            must_wait = waits_for_slot(world, name, layer)
            if not same_progress(seen, [rounded(event) for event in events], must_wait):
                compare(f"{name} progress of {layer}", seen, events)
    compare("downloads", by_text(world.downloads), by_text(expected["downloads"]))
    for source, times in expected["descriptor_close"].items():
        ours_closed = world.descriptor_close[source]
        if times:
            compare(f"close of {source}", ours_closed, rounded(times))
        elif ours_closed and recorded_close.get(source) == []:
            end = world.pulls[source.split("/")[0]]["end"]
            if ours_closed[0] > end:
                compare(f"close of {source}", ours_closed, f"not after {end}")
    reader_close = {k: v for k, v in world.reader_close.items() if not k.startswith("tar of")}
    compare("reader_close", reader_close, rounded(expected["reader_close"]))
    compare("registered", by_text(world.registered), by_text(expected["registered"]))
    for log in ("get", "release"):
        compare(log, by_text(world.store.log[log]), by_text(expected["store"][log]))
    registrations = [
        by_text([record | {"error": known_error(record["error"], world)} for record in records])
        for records in (world.store.log["register"], expected["store"]["register"])
    ]
    compare("register", *registrations)
    compare("final", world.final, expected["store"]["final"])
    return problems


def rounded(value):
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return value


def by_text(records: list) -> list[str]:
    return sorted(json.dumps(rounded(as_floats(record)), sort_keys=True) for record in records)


def as_floats(record):
    """Numbers as JSON may have written them, 1 for 1.0, made equal."""
    if isinstance(record, dict):
        return {key: as_floats(value) for key, value in record.items()}
    if isinstance(record, list):
        return [as_floats(value) for value in record]
    if isinstance(record, int) and not isinstance(record, bool):
        return float(record)
    return record


def known_error(error: str | None, world: World) -> str | None:
    """A registration's error; for damaged gzip just that there is one."""
    if error in (None, "context canceled") or not has_gzip(world.scenario):
        return error
    return "an error"


def has_gzip(scenario: dict) -> bool:
    bodies = (
        attempt.get("body", {}).get("base64", "")
        for layer in scenario["layers"].values()
        for attempt in layer["attempts"]
    )
    return any(base64.b64decode(body).startswith(b"\x1f\x8b") for body in bodies)


def beginning(error: str | None) -> str:
    """An error's text up to the words of the decompression library."""
    return str(error).split(": ")[0]


def waits_for_slot(world: World, pull: str, layer: str) -> bool | None:
    """Whether a pull's layer had to wait for its slot; ``None`` if it shared a transfer."""
    spec = next(each for each in world.scenario["pulls"] if each["name"] == pull)
    layers = world.scenario["layers"]
    indices = [i for i, name in enumerate(spec["layers"]) if layers[name]["id"] == layer]
    starts = [
        record["start"]
        for record in world.downloads
        if record["layer"] in {f"{pull}/{index}" for index in indices}
    ]
    events = world.pulls[pull]["progress"].get(layer)
    if not starts or not events:
        return None
    # It is asked for when the sink has taken "Pulling fs layer".
    return min(starts) > rounded(events[0][0] + (spec.get("output_seconds") or 0))


def same_progress(ours: list, theirs: list, must_wait: bool | None) -> bool:
    """Whether ``ours`` is ``theirs`` without some of those entries that may be left out."""

    def optional(index: int) -> bool:
        event = theirs[index]
        if event[1] == "Waiting" and "may" in event:
            return must_wait is not True
        if event[1] in ("Pulling fs layer", "Already exists"):
            return False
        follower = theirs[index + 1] if index + 1 < len(theirs) else None
        return "may" in event or (follower is not None and follower[0] == event[0])

    # reachable: how many of theirs may be used up after each of ours.
    reachable = {0}
    for event in ours:
        following = set()
        for start in reachable:
            for index in range(start, len(theirs)):
                if theirs[index][:5] == event:
                    following.add(index + 1)
                if not optional(index):
                    break
        reachable = following
    return any(all(optional(i) for i in range(end, len(theirs))) for end in reachable)


# What holds in every scenario.

DOWNLOAD = re.compile(r"Waiting|Downloading|Verifying Checksum|Download complete|Retrying in .*")


def broken_invariants(world: World) -> list[str]:
    problems = [
        f"{source} was closed at {times}"
        for source, times in world.descriptor_close.items()
        if len(times) != 1
    ]
    problems += [
        f"a stream of {body.name} was closed {body.closes} times"
        for body in world.bodies
        if body.closes != 1
    ]
    sharers = defaultdict(list)
    for pull in world.scenario["pulls"]:
        for layer in pull["layers"]:
            sharers[world.scenario["layers"][layer]["key"]].append(world.pulls[pull["name"]]["end"])
    ids = {name: layer["id"] for name, layer in world.scenario["layers"].items()}
    layers_of = {pull["name"]: pull["layers"] for pull in world.scenario["pulls"]}
    for record in world.downloads:
        pull, index = record["layer"].split("/")
        key = world.scenario["layers"][layers_of[pull][int(index)]]["key"]
        if record["start"] > max(sharers[key]):
            problems.append(f"{record} after its pulls had ended")
    for pull, result in world.pulls.items():
        for layer, events in result["progress"].items():
            actions = [event[1] for event in events]
            if actions.count("Pulling fs layer") > [ids[n] for n in layers_of[pull]].count(layer):
                problems.append(f"{pull} {layer}: {actions}")
            if "Pull complete" in actions[:-1] or (
                "Extracting" in actions
                and any(map(DOWNLOAD.fullmatch, actions[actions.index("Extracting") :]))
            ):
                problems.append(f"{pull} {layer}: illegal sequence {actions}")
    return problems
