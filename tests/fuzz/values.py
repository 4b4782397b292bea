"""Strategies: values that people, scripts and broken programs put where a number, a name or a path is expected."""

from __future__ import annotations

from hypothesis import strategies as st

WHOLE = st.one_of(
    st.integers(-20, 200),
    st.sampled_from([0, 1, 8, 9, 16, 17, 49, 81, 480, 720, 2**15, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**308]),
    st.integers(),
)
REAL = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), WHOLE, st.sampled_from([0.0, -0.0, 1e-320, 1e308, 0.5, 6.0])
)
TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\n", "\t", "a" * 300, "~", "~nouser", "..", ".", "/", "-", "--", "\ufeff", "é", "🐈" * 40]
    ),
    st.sampled_from(
        ["\udcff", "a\udc80b", "[red]x[/red]", "{}", "%s", "$HOME", "*", "a\\b", "con", "\x1b[31m", "\x07"]
    ),
)
NAME = TEXT.filter(lambda text: "\x00" not in text)
PATH = st.one_of(
    st.builds(
        "".join,
        st.tuples(
            NAME, st.sampled_from(["", ".mp4", ".gif", ".webp", ".png", ".txt", ".MP4", "/", "/out.mp4", ".mp4/x"])
        ),
    ),
    st.sampled_from(["/dev/null", "/proc/1/x.mp4", "/nowhere/x.mp4", "/dev/full", "out.mp4", "a/b/c.mp4", "/"]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), WHOLE, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
ANYTHING = st.one_of(JSON, st.binary(max_size=8), st.builds(object), st.just(print), st.just(ValueError))
