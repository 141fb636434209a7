"""Values of a manifest as text: whatever stands there has a type that can be told."""

from typing import Any

import pytest

from ckptstore.plain_values import type_name


def deep() -> Any:
    node: Any = 1
    for _ in range(5000):
        node = [node]
    return node


@pytest.mark.parametrize("name", [None, 5, [], {}, deep()], ids=["none", "number", "list", "object", "deep"])
def test_a_registered_value_whose_name_is_no_text_is_called_registered(name: Any) -> None:
    assert type_name({"$": "registered", "name": name, "tree": 1}) == "registered"
    assert type_name({"$": "registered", "name": "point", "tree": 1}) == "point"
