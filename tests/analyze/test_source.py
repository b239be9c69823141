"""Questions from files and from the testbed; what is wrong is said with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kvferry.analyze import drawn_questions, questions_from
from kvferry.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_lines_of_all_kinds(folder: Path) -> None:
    path = write(
        folder,
        {"image": "a.png", "question": "what?"},
        "",
        {"images": ["a.png", "a.png"], "question": "both?", "needs_image": True},
        {"question": "text?", "needs_image": False, "answer": "none"},
    )
    found = questions_from(path)
    assert found.total == 3
    for _ in range(2):
        asked = list(found.each())
        assert [len(x.images) for x in asked] == [1, 2, 0]
        assert [x.needs_image for x in asked] == [None, True, False]
        assert [x.answer for x in asked] == [None, None, "none"]
        assert [x.name for x in asked] == [f"questions.jsonl, line {i}" for i in (1, 3, 4)]
    assert questions_from(path, n=2).total == len(list(questions_from(path, n=2).each())) == 2
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(InputError, match=r"line 1: there is no picture at .*elsewhere"):
        questions_from(path, elsewhere)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{broken", "not JSON"),
        ("[1]", "no question"),
        ({"image": "a.png"}, "no question"),
        ({"question": " "}, "no question"),
        ({"question": 3}, "no question"),
        ({"image": 3, "question": "what?"}, "file name"),
        ({"images": "a.png", "question": "what?"}, "list of file names"),
        ({"image": "b.png", "question": "what?"}, "no picture at .*b.png"),
        ({"image": ".", "question": "what?"}, "no picture at"),
        ({"question": "what?", "needs_image": "no"}, "true or false"),
        ({"question": "what?", "answer": " "}, "not empty"),
        ({"question": "what?", "answer": 4}, "not empty"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: object, what: str) -> None:
    path = write(folder, {"image": "a.png", "question": "what?"}, line)
    with pytest.raises(InputError, match=f"questions.jsonl, line 2.*{what}"):
        questions_from(path)


def test_bad_files(folder: Path) -> None:
    with pytest.raises(InputError, match="no questions"):
        questions_from(write(folder))
    with pytest.raises(InputError, match="cannot read"):
        questions_from(folder / "absent.jsonl")
    (folder / "odd.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        questions_from(folder / "odd.jsonl")
    with pytest.raises(InputError, match="no folder"):
        questions_from(write(folder, {"question": "what?"}), folder / "absent")


def test_drawn_questions_say_which_need_no_picture() -> None:
    asked = list(drawn_questions("validation", 12).each())
    assert [x.needs_image for x in asked].count(False) == 1
    assert next(x for x in asked if not x.needs_image).question.startswith("note: ")
    with pytest.raises(InputError, match="validation"):
        drawn_questions("tests", 3)
