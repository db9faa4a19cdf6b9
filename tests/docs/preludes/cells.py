"""What the producer of a deployment with cells has imported; afterwards sessions are spread over cells."""

import hashlib


def check():
    two, three = ["a", "b"], ["a", "b", "c"]
    sessions = [f"s{n}" for n in range(300)]
    moved = [s for s in sessions if cell_of(s, two) != cell_of(s, three)]
    assert {cell_of(s, three) for s in moved} == {"c"}
    assert 50 < len(moved) < 150
