"""Names sorted as people count, whatever digits are in them."""

from __future__ import annotations

from dare_train.errors import brief, printable
from dare_train.weights.layer_names import kind_of, layer_of, natural


def test_numbers_count_as_numbers() -> None:
    names = ["layer.10.w", "layer.9.w", "layer.9.b", "head"]
    assert sorted(names, key=natural) == ["head", "layer.9.b", "layer.9.w", "layer.10.w"]


def test_what_only_looks_like_a_number_is_text() -> None:
    names = ["a.²", "a." + "1" * 5000, "a.٣", "a.3"]
    assert {*sorted(names, key=natural)} == {*names}
    assert all(kind_of(name) and layer_of(name) for name in names)


def test_texts_of_strangers_are_one_line_of_bounded_length() -> None:
    assert printable("a[/x]²é") == "a[/x]²é"
    assert printable("a\x1b[2J\n\u202e\ud800") == r"a\x1b[2J\n\u202e\ud800"
    assert len(printable("\x1b" * 10**6, 300)) == 300
    assert printable("a" * 400 + "end", 100).endswith("aend")


def test_values_of_strangers_are_brief() -> None:
    assert brief([1, "a", None]) == "[1, 'a', None]"
    assert brief(10**5000) == "a huge number"
    assert brief({"a": {"b": [1] * 99}}) == "{'a': {'b': [1, 1, 1, 1, 1, 1, ...]}}"
    assert len(brief("\ud800" * 10**6)) <= 80
