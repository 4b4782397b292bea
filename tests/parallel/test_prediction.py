"""The prediction for several GPUs beside what others have published of theirs."""

from pathlib import Path

import pytest

from cogvx_fast.parallel.prediction import CARDS, SIZES, predicted, table

A100 = CARDS[0]


@pytest.mark.parametrize(("number", "share"), [(0, 0.607), (1, 0.491), (2, 0.710)])
def test_the_operations_are_those_of_the_family(number, share):
    """Attention's published shares of a step."""
    assert SIZES[number].attention_flop / SIZES[number].flop == pytest.approx(share, abs=0.002)
    assert number or SIZES[0].flop / 1e12 == pytest.approx(240, rel=0.01)


def test_the_page_has_the_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"
    assert table() in page.read_text()


@pytest.mark.parametrize(
    ("name", "published"),
    [("2b", {1: 1.44, 2: 0.74, 4: 0.47}), ("5b", {1: 4.07, 2: 2.12, 4: 1.27})],  # seconds a step, xDiT's charts
)
def test_published_times_of_a100s(name, published):
    """It leaves out what does not shrink with the parts, so it may be too short, and not by more than a quarter."""
    size = next(size for size in SIZES if size.name == name)
    for gpus, step in published.items():
        assert 0.75 * step < predicted(A100, size, gpus).step < 1.03 * step


def test_slow_links_cost_more_and_guidance_next_to_nothing():
    size = SIZES[1]
    nvlink, pcie = (predicted(card, size, 4) for card in CARDS[:2])
    assert pcie.exchange > 5 * nvlink.exchange and pcie.compute == nvlink.compute
    assert predicted(CARDS[1], size, 2).exchange < 0.001 * predicted(CARDS[1], size, 2).compute
