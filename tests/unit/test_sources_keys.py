import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.pipeline.sources.keys import name_problem, printable, with_unique_keys


def table(keys: list[str], qualified: list[str]) -> pa.Table:
    count = len(keys)
    columns = {
        "key": keys,
        "path": ["t.tar"] * count,
        "offset": range(count),
        "status": ["ok"] * count,
        "width": [1] * count,
        "height": [1] * count,
        "qualified_key": qualified,
    }
    return pa.table({name: pa.array(list(values)) for name, values in columns.items()})


words = st.text("ab/#0123", min_size=1, max_size=4)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=12))
def test_keys_become_unique_and_no_row_is_lost(names: list[tuple[str, str]]) -> None:
    keys, qualified = ([pair[i] for pair in names] for i in (0, 1))
    found = with_unique_keys(table(keys, qualified))
    new = found["key"].to_pylist()
    assert len(set(new)) == len(new) == len(names)
    assert found["offset"].to_pylist() == list(range(len(names)))
    for key, short, long, status in zip(new, keys, qualified, found["status"].to_pylist(), strict=True):
        assert (status == "ok") == (key in (short, long)) or key.startswith(long + "#")
        if keys.count(short) == 1 and short not in qualified:
            assert key == short


def test_a_status_that_says_more_is_kept() -> None:
    bad = table(["a", "a"], ["a", "a"]).set_column(3, "status", pa.array(["ok", "zero bytes"]))
    assert with_unique_keys(bad)["status"].to_pylist() == ["ok", "zero bytes"]


@pytest.mark.parametrize("name", ["a", "a.b/c..d/...e", "..a", "a..", "ü/日本", "with space", "-rf", "~"])
def test_safe_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "/a", "a/", "a//b", ".", "..", "./a", "a/.", "a/../b", "../a"),
        *("a\\b", "a\0b", "a\nb", "a\x85b", "a\u2028b", "a\udce9", "x" * 5000),
    ],
)
def test_unsafe_names(name: str) -> None:
    assert str(name_problem(name)).startswith("unsafe name: ")
    assert printable(name).isascii()
    assert printable(name).isprintable()
