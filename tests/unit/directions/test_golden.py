"""Golden vectors: what this release draws is what every release draws."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fedtune.directions import Pool, reference
from fedtune.directions.philox import philox
from fedtune.directions.quantiles import compute, quantiles

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The three known-answer vectors of the Random123 library."""
    low = np.array([counter[0] | counter[1] << 32], np.uint64)
    got = philox(low, counter[2], counter[3], key)
    assert " ".join(f"{int(word):08x}" for word in got[:, 0]) == expected


def test_quantile_table_is_what_anyone_computes():
    assert np.array_equal(compute(), quantiles())
    assert hashlib.sha256(quantiles().tobytes()).hexdigest() == GOLDEN["quantiles"]
    both = np.concatenate([quantiles(), -quantiles().astype(np.float64)]) / 4096
    assert abs(both.var() - 1) < 3e-5
    assert abs((both**4).mean() - 3) < 1e-3


@pytest.mark.parametrize("case", GOLDEN["directions"], ids=lambda c: f"{c['kind']}-{c['size']}-{c['k']}-{c['first']}")
def test_directions(case):
    pool = Pool(case["kind"], int(case["seed"]), case["size"])
    z = reference.direction(pool, case["k"], case["first"], 5000)
    assert z[:16].tolist() == case["begins"]
    assert hashlib.sha256(z.astype("<i4").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", GOLDEN["replays"], ids=lambda c: f"{c['kind']}-{c['size']}")
def test_replay(case):
    pool = Pool(case["kind"], int(case["seed"]), case["size"])
    out = np.empty(300, np.float32)
    reference.replay(pool, coefficients(pool.size), 24, weights(300), 8192, out)
    assert hashlib.sha256(out.tobytes()).hexdigest() == case["sha256"]


def coefficients(size):
    """Some int32 numbers, by a formula."""
    return ((np.arange(size, dtype=np.int64) * 2654435761 % 2**32) >> 14).astype(np.int32) - 2**17


def weights(count):
    """Some float32 numbers, by a formula."""
    return (np.arange(count) % 97 - 48).astype(np.float32) / 1024
