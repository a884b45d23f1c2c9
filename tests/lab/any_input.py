"""Input of any kind, for hypothesis: answers that are spoilt, and what a failure must look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


def one_line_or(failure: type[Exception], call: Callable[[], T]) -> T | None:
    """What the call returns, or None where it raises that failure, whose text must be one line."""
    try:
        return call()
    except failure as error:
        text = str(error)
    assert len(text.splitlines()) == 1, text
    return None


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
DEVICE = {"ifname": "eth1", "flags": ["BROADCAST", "UP"], "addr_info": []}
ADDRESSES = [
    {"family": "inet", "local": "10.0.1.22", "prefixlen": 24, "scope": "global"},
    {"family": "inet6", "local": "2001:db8:1::22", "prefixlen": 64, "scope": "0"},
]


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> Any:
    """The document with something else in the place of one of its parts, or without it."""
    copy = json.loads(json.dumps(document))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in list(keys) if isinstance(node, (dict, list)) else ():
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(copy)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(anything)
    else:
        del node[key]
    return copy
