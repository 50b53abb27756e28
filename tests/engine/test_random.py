"""Random scenarios, and the properties that hold in each of them."""

from __future__ import annotations

import random

import pytest
from engine.recorded_world import World, diff_id_of
from engine.seeds import run
from engine.test_traces import IN_BOTH_WAYS, broken_invariants

from trio_layers._digest import chain_id


def scenario(rng: random.Random) -> dict:
    def attempt() -> dict:
        result = rng.choice(["ok"] * 5 + ["error", "do_not_retry", "wrapped_do_not_retry"])
        body: dict = {}
        if rng.random() < 0.4:
            body = {"chunk": rng.randint(1, 9), "chunk_seconds": rng.choice([0, 0.25, 0.5])}
        if rng.random() < 0.1:
            body |= {"fail_after": rng.randint(0, 3), "error": "reset"}
            body |= {"certain": rng.random() < 0.5}
        return {
            "seconds": rng.choice([0, 0.5, 1.25, 4]),
            "progress": [
                {"at": at / 4, "action": "Downloading", "current": at, "total": 9}
                for at in range(rng.randint(0, 3))
            ],
            "result": result,
            "error": "broken",
            "size": rng.choice([0, 18]),
            "ignores_cancel": rng.random() < 0.15,
            "ignores_ranges": rng.random() < 0.3,
            "cancel_seconds": rng.choice([0, 0, 0.75]),
            "body": body,
        }

    names = "abcdef"
    layers = {}
    for name in names:
        content = f"content of layer {name}"
        known = rng.random() < 0.3
        layers[name] = {
            "id": name,
            "key": f"k:{rng.choice([name] * 6 + ['a'])}",
            "content": content,
            "diff_id": diff_id_of(content.encode()) if known else None,
            "registerer": rng.random() < 0.8,
            "attempts": [attempt() for _ in range(rng.randint(1, 3))],
        }
    base = ["the base"] if rng.random() < 0.5 else []
    chains = [[*base, layers["a"]["content"]]] if rng.random() < 0.5 else []
    chains += [base] if base else []
    pulls = []
    for index in range(rng.randint(1, 5)):
        at = rng.randint(0, 12) / 4
        pulls.append(
            {
                "name": f"p{index}",
                "at": at,
                "layers": [rng.choice(names) for _ in range(rng.randint(0, 5))],
                "cancel_at": at + rng.randint(0, 30) / 8 if rng.random() < 0.4 else None,
                "release_at": rng.choice([100, 200, 300]),
                "output_seconds": rng.choice([0, 0, 0.3]),
                "initial_rootfs": base,
            }
        )
    return {
        "manager": {"concurrency": rng.randint(0, 3), "max_attempts": rng.choice([None, 1, 2])},
        "store": {
            "chains": chains,
            "register": {"*": {"seconds": rng.choice([0, 0.5])}},
        },
        "layers": layers,
        "pulls": pulls,
        "set_concurrency": [
            {"at": rng.randint(0, 20) / 4, "value": rng.randint(0, 3)}
            for _ in range(rng.randint(0, 2))
        ],
    }


@IN_BOTH_WAYS
@pytest.mark.parametrize("seed", range(300))
def test_invariants(seed: int, staged: bool) -> None:
    """Sources and streams are closed once; the store ends with its first contents."""
    made = scenario(random.Random(seed))
    world = World(made, staged=staged)
    run(world.play, seed)
    assert not broken_invariants(world)
    assert all(pull["end"] is not None for pull in world.pulls.values())
    for pull in made["pulls"]:
        result = world.pulls[pull["name"]]
        if result["error"] is None:
            assert len(result["diff_ids"]) == len(pull["initial_rootfs"] + pull["layers"])
            above = result["diff_ids"][len(pull["initial_rootfs"]) :]
            for diff_id, name in zip(above, pull["layers"], strict=True):
                # Another source with the same key may have started its download.
                assert diff_id in {
                    diff_id_of(layer["content"].encode())
                    for layer in made["layers"].values()
                    if layer["key"] == made["layers"][name]["key"]
                }
    held = set()
    for chain in made["store"]["chains"]:
        diff_ids = [diff_id_of(content.encode()) for content in chain]
        held |= {chain_id(diff_ids[: size + 1]) for size in range(len(chain))}
    assert world.final.keys() == held
