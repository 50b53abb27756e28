"""The engine against recorded traces of Docker's engine.

The traces are in `tests/cases/engine`, and in the directory that ``TRIO_LAYERS_CASES`` names.
`FORMAT.md` beside the files says how to compare.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.recorded_world import World
from engine.seeds import run

SEEDS = range(24)
HERE = Path(__file__).parents[1] / "cases" / "engine"


def trace_files() -> list[Path]:
    files = sorted(HERE.glob("*.json"))
    more = os.environ.get("TRIO_LAYERS_CASES")
    if more:
        files += sorted((Path(more) / "engine").glob("*.json"))
    return files


FILES = trace_files()


IN_BOTH_WAYS = pytest.mark.parametrize("staged", [False, True], ids=["streamed", "staged"])


@IN_BOTH_WAYS
@pytest.mark.parametrize("path", FILES, ids=[f"{i}-{p.stem}" for i, p in enumerate(FILES)])
def test_trace(path: Path, staged: bool) -> None:
    """A recorded scenario ends as recorded under many orders of scheduling. With layers that are
    unpacked while they arrive, it ends likewise, and no later.
    """
    trace = json.loads(path.read_text())
    if trace["scenario"]["manager"].get("max_attempts") == 0:
        # Docker's engine makes one attempt; ours refuses the value, so there is nothing to compare.
        with pytest.raises(ValueError, match="max_download_attempts"):
            run(World(trace["scenario"], staged=staged).play)
        return
    expected = trace["ours"] if trace.get("quirk") else trace["expected"]
    # An empty list means that Docker's engine forgot to close, except in traces of our own engine.
    recorded_close = trace["expected"]["descriptor_close"]
    for seed in SEEDS:
        world = World(trace["scenario"], staged=staged)
        run(world.play, seed)
        if staged:
            problems = staged_differences(world, expected, recorded_close)
        else:
            problems = differences(world, expected, recorded_close)
        problems += broken_invariants(world)
        assert not problems, f"{path.name}, seed {seed}:\n" + "\n".join(problems)


def test_every_file_is_an_item(request: pytest.FixtureRequest) -> None:
    """Each trace file is one test."""
    items = [item for item in request.session.items if item.name.startswith("test_trace[")]
    selected = request.config.getoption("keyword") or any(
        "::" in arg for arg in request.config.args
    )
    assert FILES
    assert selected or len(items) >= 2 * len(trace_files())


# The comparisons.


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


def staged_differences(world: World, expected: dict, recorded_close: dict) -> list[str]:
    """The forbidden differences between a staged run and the recorded, streamed one.

    DESIGN: both runs agree in outcome, errors, diff IDs, downloads, closes, and the order of words
    and of registrations. Ends and registrations may come earlier, never later. FORMAT.md: after a
    pull's failure or cancellation a staged run may lack changes to the store that the streamed run
    still made.
    """
    problems: list[str] = []
    words = beginning if has_gzip(world.scenario) else str
    failed_at = min(
        (
            min(rounded(theirs["end"]), world.pulls[name]["end"])
            for name, theirs in expected["pulls"].items()
            if theirs["error"] is not None
        ),
        default=None,
    )

    def compare(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            problems.append(f"{what}:\n  ours     {ours}\n  expected {theirs}")

    def not_later(what: str, ours: list, theirs: list) -> None:
        problems.extend(later_or_more(what, ours, theirs, None))

    def not_later_nor_more(what: str, ours: list, theirs: list) -> None:
        problems.extend(later_or_more(what, ours, theirs, failed_at))

    compare("pulls", sorted(world.pulls), sorted(expected["pulls"]))
    for name, theirs in expected["pulls"].items():
        ours = world.pulls[name]
        not_later(f"{name} end", [[ours["end"]]], [[theirs["end"]]])
        compare(f"{name} diff IDs", ours["diff_ids"], theirs["diff_ids"])
        compare(f"{name} error", words(ours["error"]), words(theirs["error"]))
        compare(f"{name} layers", sorted(ours["progress"]), sorted(theirs["progress"]))
        for layer, events in theirs["progress"].items():
            seen = ours["progress"].get(layer, [])
            must_wait = waits_for_slot(world, name, layer)
            if ours["error"] is not None:
                # The layer is unpacked before it is registered.
                while seen and seen[-1][1] == "Extracting":
                    seen = seen[:-1]
            if not same_words(seen, [rounded(event) for event in events], must_wait):
                compare(f"{name} progress of {layer}", seen, events)
    compare("downloads", by_text(world.downloads), by_text(expected["downloads"]))
    for source, times in expected["descriptor_close"].items():
        if times:
            not_later(f"close of {source}", [[t] for t in world.descriptor_close[source]], [times])
        elif recorded_close.get(source) == []:
            end = world.pulls[source.split("/")[0]]["end"]
            not_later(f"close of {source}", [[t] for t in world.descriptor_close[source]], [[end]])
    compare("streams of downloads", [k for k in world.reader_close if "/" in k], [])
    not_later_nor_more("registered", world.registered, expected["registered"])
    compare("get", by_text(world.store.log["get"]), by_text(expected["store"]["get"]))
    not_later_nor_more("release", world.store.log["release"], expected["store"]["release"])
    ours_registered = registrations(world.store.log)
    theirs_registered = registrations(expected["store"])
    not_later_nor_more("register", ours_registered, theirs_registered)
    problems += out_of_order(ours_registered, theirs_registered)
    final = expected["store"]["final"]
    if failed_at is None:
        compare("final", world.final, final)
    for chain, references in world.final.items():
        if references > final.get(chain, 0):
            compare("final", world.final, final)
    return problems


def later_or_more(what: str, ours: list, theirs: list, may_lack_from: float | None) -> list[str]:
    """Return the problems with records of ``ours`` that are missing, later or too many.

    Both arguments are lists of [time, ...]. Records of ``theirs`` at ``may_lack_from`` or later
    may be missing in ``ours``.
    """
    problems = []
    times: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for index, records in enumerate((ours, theirs)):
        for time, *record in records:
            times[json.dumps(as_floats(record), sort_keys=True)][index].append(rounded(time))
    for record, (mine, other) in times.items():
        mine.sort(), other.sort()
        needed = [t for t in other if may_lack_from is None or t < may_lack_from]
        # Any of the optional records may be missing, so the times are also paired from the end.
        pairs = [*zip(mine, needed, strict=False), *zip(mine[::-1], other[::-1], strict=False)]
        if not len(needed) <= len(mine) <= len(other) or any(a > b for a, b in pairs):
            problems.append(f"{what} {record}:\n  ours     {mine}\n  expected {other}")
    return problems


def out_of_order(ours: list, theirs: list) -> list[str]:
    """Return the problems with registrations of ``ours`` in the opposite order to ``theirs``.

    Both arguments are lists of [time, chain, parent], in which a chain may occur repeatedly.
    """
    place = {occurrence: index for index, (_, occurrence) in enumerate(by_occurrence(ours))}
    known = [(time, each) for time, each in by_occurrence(theirs) if each in place]
    return [
        f"{above} is registered before {chain}"
        for time, chain in known
        for later, above in known
        if rounded(time) < rounded(later) and place[chain] > place[above]
    ]


def by_occurrence(records: list) -> list[tuple[float, tuple[str, int]]]:
    """Return each registration's time, by its chain and its number among those of this chain."""
    seen: Counter[str] = Counter()
    result = []
    for time, chain, _ in records:
        result.append((time, (chain, seen[chain])))
        seen[chain] += 1
    return result


def registrations(log: dict) -> list:
    """Return [time, chain, parent] of each successful registration, in order of time."""
    return [
        [record["end"], record["chain"], record["parent"]]
        for record in sorted(log["register"], key=lambda record: record["end"])
        if record["error"] is None
    ]


def same_words(ours: list, theirs: list, must_wait: bool | None) -> bool:
    """Return whether ``ours`` has the words of ``theirs`` in their order.

    Some words may be left out, since earlier events may come together.
    """

    def optional(index: int) -> bool:
        # The words must be repeated in the trace, not only words that may come together.
        again = index > 0 and theirs[index - 1][1] == theirs[index][1]
        return (
            again
            or theirs[index][1] in ("Download complete", "Extracting")
            or may_be_left_out(theirs, index, must_wait)
        )

    words = [
        event
        for event, before in zip(ours, [[0, ""], *ours], strict=False)
        if event[1] != before[1]
    ]
    return is_thinned(words, theirs, optional, lambda mine, other: mine[1] == other[1])


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
    """Convert integers to floats, since JSON may have 1 for 1.0."""
    if isinstance(record, dict):
        return {key: as_floats(value) for key, value in record.items()}
    if isinstance(record, list):
        return [as_floats(value) for value in record]
    if isinstance(record, int) and not isinstance(record, bool):
        return float(record)
    return record


def known_error(error: str | None, world: World) -> str | None:
    """Return a registration's error. For damaged gzip, return only that there is an error."""
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
    """Return an error's text up to the words of the decompression library."""
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
    # The layer is requested when the sink has taken "Pulling fs layer".
    return min(starts) > rounded(events[0][0] + (spec.get("output_seconds") or 0))


def same_progress(ours: list, theirs: list, must_wait: bool | None) -> bool:
    """Whether ``ours`` is ``theirs`` without some of the entries that may be left out."""

    def optional(index: int) -> bool:
        return may_be_left_out(theirs, index, must_wait)

    return is_thinned(ours, theirs, optional, lambda mine, other: mine == other[:5])


def may_be_left_out(theirs: list, index: int, must_wait: bool | None) -> bool:
    event = theirs[index]
    if event[1] == "Waiting" and "may" in event:
        return must_wait is not True
    if event[1] in ("Pulling fs layer", "Already exists"):
        return False
    follower = theirs[index + 1] if index + 1 < len(theirs) else None
    return "may" in event or (follower is not None and follower[0] == event[0])


def is_thinned(
    ours: list,
    theirs: list,
    optional: Callable[[int], bool],
    same: Callable[[list, list], bool],
) -> bool:
    # reachable: the possible numbers of used entries of theirs after each entry of ours.
    reachable = {0}
    for event in ours:
        following = set()
        for start in reachable:
            for index in range(start, len(theirs)):
                if same(event, theirs[index]):
                    following.add(index + 1)
                if not optional(index):
                    break
        reachable = following
    return any(all(optional(i) for i in range(end, len(theirs))) for end in reachable)


@pytest.mark.parametrize(
    ("ours", "may_lack_from", "good"),
    [
        ([1, 5], None, True),
        ([1, 4], None, True),
        ([1, 6], None, False),
        ([1], None, False),
        ([1, 5, 5], None, False),
        ([1], 5, True),
        ([5], 5, False),
        ([1, 1], 1, True),
        ([5], 1, True),
        ([1, 5, 5], 1, False),
        ([6], 1, False),
    ],
)
def test_repeated_records_are_compared_one_by_one(
    ours: list, may_lack_from: float | None, good: bool
) -> None:
    """``theirs`` has records at seconds 1 and 5.

    A failed pull may lack the records from ``may_lack_from`` on.
    """
    records = [[[time, "chain"] for time in times] for times in (ours, [1, 5])]
    assert (later_or_more("it", *records, may_lack_from) == []) is good


def test_order_of_registrations_that_are_repeated() -> None:
    theirs = [[1, "a", ""], [2, "b", "a"], [3, "a", ""]]
    assert out_of_order([[1, "a", ""], [1, "b", "a"], [1, "a", ""]], theirs) == []
    assert out_of_order([[1, "a", ""], [1, "a", ""], [1, "b", "a"]], theirs) != []
    assert out_of_order([[1, "b", "a"], [1, "a", ""]], theirs) != []


# Properties of every scenario.

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
