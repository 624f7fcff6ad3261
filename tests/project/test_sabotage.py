"""The breakages of `python -m tests.sabotage` fit the code as it is; that tests find them it shows itself."""

import pytest

from tests.sabotage.__main__ import ROOT, broken
from tests.sabotage.breakages import BREAKS


@pytest.mark.parametrize("name", BREAKS)
def test_the_breakage_fits(name):
    text = (ROOT / BREAKS[name].file).read_text(encoding="utf-8")
    assert broken(text, name) != text
    assert (ROOT / BREAKS[name].tests).exists()


def test_there_are_twenty():
    assert len(BREAKS) >= 20
