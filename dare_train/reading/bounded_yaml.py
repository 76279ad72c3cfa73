"""YAML of strangers. Its aliases let a few hundred bytes stand for gigabytes, and its numbers have forms that
take long to work out: each text has a cost that is bounded beforehand.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

LARGEST = 256 << 10
"""Bytes of a text."""
DEEPEST = 50
"""Levels of nesting."""
MOST_NODES = 20_000
"""Values, each counted as often as aliases repeat it. So many take some seconds to parse."""
LONGEST_NUMBER = 100
"""Characters."""


def documents(text: str) -> list[object]:
    """What a text of YAML without tags holds, document by document: dicts, lists, and what plain scalars are
    taken for. Empty documents are left out.

    Raises:
        yaml.YAMLError, ValueError: it is no such text, or goes beyond a limit.
    """
    size = len(text.encode(errors="surrogatepass"))
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes of YAML, more than {LARGEST:,}")
    loader = _Loader(text)
    try:
        found = []
        while loader.check_data():
            found.append(loader.get_data())
        return [document for document in found if document is not None]
    except _ACCIDENTS as accident:
        raise ValueError(f"{type(accident).__name__}: {accident}") from accident
    finally:
        loader.dispose()


_ACCIDENTS = (ArithmeticError, AttributeError, LookupError, TypeError, RecursionError)
"""That PyYAML has with texts that are wrong in unusual ways."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Counts while it composes: nothing is made of a text before all of it was counted."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0
        self._sizes: dict[int, int] = {}
        """Nodes that are there when an aliased one is written out, by the identity of the aliased one."""

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.peek_event()
        if self._depth >= DEEPEST:
            self._refuse(f"more than {DEEPEST} levels", event)
        self._depth += 1
        self._count += 1
        if self._count > MOST_NODES:
            self._refuse(f"more than {MOST_NODES:,} values", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"a tag, {event.tag!r}", event)
        node: Node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse("an alias of what it lies in", event)
        else:
            self._sizes[id(node)] = self._size(node)
        if self._sizes[id(node)] > MOST_NODES:
            self._refuse(f"aliases that stand for more than {MOST_NODES:,} values", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Of a key that is there twice, PyYAML would take the last value without a word."""
        node: MappingNode = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], Node] = {}
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                before = known.setdefault((key.tag, key.value), value)
                if not _say_the_same(before, value):
                    self._refuse(f"two values of {key.value!r}", key)
        return node

    def _size(self, node: Node) -> int:
        if not isinstance(node, CollectionNode):
            return 1
        pairs = isinstance(node, MappingNode)
        inside = [each for pair in node.value for each in pair] if pairs else node.value
        return 1 + sum(self._sizes[id(each)] for each in inside)

    def construct_yaml_int(self, node: ScalarNode) -> Any:
        return super().construct_yaml_int(self._short(node))

    def construct_yaml_float(self, node: ScalarNode) -> Any:
        return super().construct_yaml_float(self._short(node))

    def _short(self, node: ScalarNode) -> ScalarNode:
        if len(node.value) > LONGEST_NUMBER:
            self._refuse(f"a number of {len(node.value):,} characters", node)
        return node

    def _refuse(self, problem: str, where: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


def _say_the_same(one: Node, other: Node) -> bool:
    if one is other:
        return True
    if not isinstance(one, CollectionNode) or not isinstance(other, CollectionNode):
        return bool((one.tag, one.value) == (other.tag, other.value))
    if one.tag != other.tag or len(one.value) != len(other.value):
        return False
    pairs = isinstance(one, MappingNode)
    sides = [[each for pair in node.value for each in pair] if pairs else node.value for node in (one, other)]
    return all(map(_say_the_same, *sides))


for _tag, _constructor in (("int", _Loader.construct_yaml_int), ("float", _Loader.construct_yaml_float)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
