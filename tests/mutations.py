# SPDX-License-Identifier: Apache-2.0
"""Damage to files, drawn from a seed: what a disk, an editor or a converter may do."""

import copy
import json
import random
import re
import struct

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**70,
    10**400,
    0.5,
    -1.5,
    1e-300,
    float("inf"),
    float("nan"),
    "",
    "8",
    "none",
    "\ud7ff\x00",
    [],
    [[]],
    [None, 1],
    {},
    {"": {}},
)
"""What a value is replaced by."""
WORDS = (0, 1, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with another value, or without one; now and then no JSON any more."""
    if rng.random() < 0.3:
        return damage_text(content, rng)

    tree = json.loads(content)
    places = list(_places(tree))
    owner, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[_slipped(key, rng)] = owner.pop(key)
    elif kind == 2:
        other, there = rng.choice(places)
        owner[key] = copy.deepcopy(other[there])
    elif kind == 3:
        owner[key] = [owner[key]]
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))

    return json.dumps(tree).encode()


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines, one of them damaged."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines) - 1)
    lines[number] = damage_json(lines[number], rng)

    return b"\n".join(lines)


def damage_text(content: bytes, rng: random.Random) -> bytes:
    """Text with some of its bytes wrong, or missing, or there twice."""
    at = rng.randrange(len(content) + 1)
    to = min(len(content), at + rng.randrange(1, 40))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[to:]
    if kind == 2:
        return content[:to] + content[at:]
    if kind == 3:
        return content[:at] + b"[" * 100_000 + content[at:]

    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def damage_python(content: bytes, rng: random.Random) -> bytes:
    """A program, more often than not with another number in it."""
    numbers = list(re.finditer(rb"\d+\.\d+", content))
    if rng.random() < 0.4:
        return damage_text(content, rng)

    number = rng.choice(numbers)
    value = repr(rng.choice(VALUES)).encode()

    return content[: number.start()] + value + content[number.end() :]


def damage_bytes(content: bytes, rng: random.Random, head: int) -> bytes:
    """A binary file, most often damaged in its first `head` bytes."""
    size = len(content) if rng.random() < 0.1 else min(head, len(content))
    at = rng.randrange(size)
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return (
            content[:at]
            + bytes([content[at] ^ 1 << rng.randrange(8)])
            + content[at + 1 :]
        )
    if kind == 2:
        return content[:at] + content[at + rng.randrange(1, 9) :]
    if kind == 3:
        return content[:at] + bytes(rng.randrange(1, 9)) + content[at:]

    form = rng.choice(("<I", "<Q"))
    word = struct.pack(form, rng.choice(WORDS) % 256 ** struct.calcsize(form))

    return content[:at] + word + content[at + len(word) :]


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file, whose header is JSON behind its length."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.4:
        return damage_bytes(content, rng, head=8 + length)

    head = damage_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(head)) + head + content[8 + length :]


def _places(tree, depth=0):
    """All values of a tree, each as what holds it and where."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    # Of a long list, as a vocabulary is, a few stand for all.
    for key, value in list(pairs)[: 40 if depth else None]:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


def _slipped(key: str, rng: random.Random) -> str:
    at = rng.randrange(len(key) + 1)
    return key[:at] + rng.choice(["", "x", "_", "S"]) + key[at + 1 :]
