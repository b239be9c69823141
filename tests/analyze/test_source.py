"""Questions from the testbed say which need no picture."""

from __future__ import annotations

import pytest

from kvferry.analyze import drawn_questions
from kvferry.errors import InputError


def test_drawn_questions_say_which_need_no_picture() -> None:
    asked = list(drawn_questions("validation", 12).each())
    assert [x.needs_image for x in asked].count(False) == 1
    assert next(x for x in asked if not x.needs_image).question.startswith("note: ")
    with pytest.raises(InputError, match="validation"):
        drawn_questions("tests", 3)
