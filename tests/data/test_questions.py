"""Files of questions: what they may look like, and that whatever is wrong is said with its line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvferry.data import Asked, read_questions, rows_of
from kvferry.data.files import CHUNK
from kvferry.errors import InputError

WHAT = {"image": "a.png", "question": "what?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "sub" / "ü b.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def write(folder: Path, *lines: object, name: str = "own.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def one(folder: Path, **fields: Any) -> Asked:
    (asked,) = read_questions(write(folder, WHAT | fields)).each()
    return asked


def test_lines_of_all_kinds(folder: Path) -> None:
    path = write(
        folder,
        WHAT,
        "",
        {"images": ["a.png", "sub/ü b.png"], "question": "both?", "needs_image": True, "kind": 3, "id": 7},
        {"question": "text?", "needs_image": False, "answer": "none", "context": "a text"},
    )
    found = read_questions(path)
    assert (found.total, found.unused, found.label) == (3, (), "3 questions of own.jsonl")
    for _ in range(2):
        asked = list(found.each())
        assert [x.images for x in asked] == [(folder / "a.png",), (folder / "a.png", folder / "sub" / "ü b.png"), ()]
        assert [x.needs_image for x in asked] == [None, True, False]
        assert [x.answer for x in asked] == [None, None, "none"]
        assert [x.name for x in asked] == [f"own.jsonl, line {i}" for i in (1, 3, 4)]
        assert [(x.kind, x.id) for x in asked] == [("", ""), ("3", "7"), ("", "")]
    assert asked[2].text == "a text\ntext?"
    assert asked[0].group != asked[1].group == list(found.each())[1].group
    assert read_questions(path, n=2).total == len(list(read_questions(path, n=2).each())) == 2
    assert [x.question for x in read_questions(path, start=2, instruction="Be brief.").each()] == ["text?\nBe brief."]
    with pytest.raises(InputError, match="no row 3"):
        read_questions(path, start=3)
    with pytest.raises(InputError, match=r"line 1: there is no picture at .*sub"):
        read_questions(path, folder / "sub")


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answers": "red"}, ("red",)),
        ({"answer": ["red", "crimson"]}, ("red", "crimson")),
        ({"answers": ["red", "red", "blue"], "answer": "red"}, ("red", "red", "blue")),
        ({"answers": ["red"], "answer": "rose"}, ("red", "rose")),
        ({"answer": 4}, ("4",)),
        ({"answer": 4.0}, ("4",)),
        ({"answer": 12.5}, ("12.5",)),
        ({"answers": [3, "three"]}, ("3", "three")),
        ({"answer": None}, ()),
        ({"answer": "B", "choices": ["red", "blue"]}, ("B", "blue", "B. blue")),
        ({"answer": "red", "choices": ["red", "blue"]}, ("A", "red", "A. red")),
        ({"answer": 4, "choices": [3, 4]}, ("B", "4", "B. 4")),
    ],
)
def test_answers_are_what_they_say(folder: Path, answers: dict[str, Any], wanted: tuple[str, ...]) -> None:
    assert one(folder, **answers).answers == wanted


def test_choices_stand_below_the_question(folder: Path) -> None:
    assert one(folder, choices=["red", "blue"]).question == "what?\nA. red\nB. blue"


ROWS = [
    {"image": "a.png", "question": 'what, "really"?\nü', "answers": ["red", "rot"], "kind": "colour"},
    {"image": "sub/ü b.png", "question": "how many?", "answer": "4"},
]


def as_csv(parting: str) -> bytes:
    text = io.StringIO()
    names = ["image", "question", "answer", "answers", "kind"]
    table = csv.DictWriter(text, names, delimiter=parting, lineterminator="\r\n")
    table.writeheader()
    for row in ROWS:
        table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue().encode()


def as_lines(end: str = "\n") -> bytes:
    return end.join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("own.jsonl", as_lines()),
        ("own.jsonl", as_lines("\r\n\r\n") + b"\r\n"),
        ("own.jsonl", b"\xef\xbb\xbf\n\n" + as_lines()),
        ("own.json", json.dumps(ROWS).encode()),
        ("own.jsonl", b"\xef\xbb\xbf  " + json.dumps(ROWS, indent=2).encode() + b"\n\n"),
        ("own.csv", as_csv(",")),
        ("own.csv", b"\xef\xbb\xbf" + as_csv(";")),
        ("own.tsv", as_csv("\t")),
    ],
)
def test_every_form_holds_the_same_questions(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    first, second = read_questions(folder / name).each()
    assert first.question == ROWS[0]["question"]
    assert (first.answers, first.kind) == (("red", "rot"), "colour")
    assert (second.images, second.answers) == ((folder / "sub" / "ü b.png",), ("4",))


def test_pictures_in_parquet(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in the extra 'eval'")
    pq = pytest.importorskip("pyarrow.parquet")
    raw = (folder / "sub" / "ü b.png").read_bytes()
    rows = [
        {"image": {"bytes": raw, "path": "x.png"}, "question": "a?", "answers": ["r"], "score": 1.0},
        {"image": {"bytes": None, "path": "a.png"}, "question": "b?", "answers": None, "score": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "own.parquet")
    pq.write_table(pa.table({"images": [[raw, raw]], "question": ["c?"]}), folder / "more.parquet")
    found = read_questions(folder / "own.parquet")
    first, second = found.each()
    assert (first.images, second.images) == ((raw,), (folder / "a.png",))
    assert (first.answers, second.answers, found.unused) == (("r",), (), ("score",))
    assert second.name == "own.parquet, row 2"
    (third,) = read_questions(folder / "more.parquet").each()
    assert third.images == (raw, raw)
    rows[1]["image"] = {"bytes": b"nothing", "path": None}
    pq.write_table(pa.Table.from_pylist(rows), folder / "own.parquet")
    with pytest.raises(InputError, match=r"own.parquet, row 2: .* not an image"):
        read_questions(folder / "own.parquet")
    (folder / "own.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a parquet file"):
        read_questions(folder / "own.parquet")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{broken", "not JSON"),
        ("[1]", "no object|not JSON"),
        ("3", "no object"),
        ('{"question": "a", "question": "b"}', "'question' twice"),
        ({"image": "a.png"}, 'no "question"'),
        ({"question": " "}, 'no "question"'),
        ({"question": 3}, 'no "question"'),
        ({"image": 3, "question": "what?"}, "file name"),
        ({"images": [["a.png"]], "question": "what?"}, "file name"),
        ({"image": "", "question": "what?"}, "file name"),
        ({"image": "b.png", "question": "what?"}, "no picture at .*b.png"),
        ({"image": ".", "question": "what?"}, "no picture at"),
        ({"image": "text.png", "question": "what?"}, "not an image"),
        ({"image": "https://example.com/a.png", "question": "what?"}, "save the picture"),
        ({"image": "a.png", "images": ["a.png"], "question": "what?"}, "leave one out"),
        ({"question": "what?", "needs_image": "no"}, "true or false"),
        ({"question": "what?", "context": ["a"]}, '"context" is a text'),
        ({"question": "what?", "answer": " "}, "not empty"),
        ({"question": "what?", "answer": True}, "not empty"),
        ({"question": "what?", "answer": float("nan")}, "not empty"),
        ({"question": "what?", "answers": []}, "empty list"),
        ({"question": "what?", "answers": {"text": ["a"]}}, "not empty"),
        ({"question": "what?", "answer": "c", "choices": ["a", "b"]}, "none of"),
        ({"question": "what?", "choices": "a"}, "2 to 26"),
        ({"question": "what?", "kind": ["a"]}, '"kind" is a text'),
        ({"question": "what?", "id": "one"}, "'one' of own.jsonl, line 1"),
        ({"question": "what?", "anwser": "red"}, 'no "answer" but "anwser"'),
        ({"question": "what?", "Answer": "red"}, 'no "answer" but "Answer"'),
        ({"question": "what?", "label": "red"}, 'no "answer" but "label"'),
        ({"question": "what?", "img": 3, "image_path": "a.png"}, 'no "image" but "img"'),
        ({"question": "what?", "contxt": "red"}, 'no "context" but "contxt"'),
        ({"Question": "what?"}, 'no "question" but "Question"'),
        ({"prompt": "what?"}, 'no "question" but "prompt"'),
        ({"question": "what?", "need_image": True}, 'no "needs_image" but "need_image"'),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: object, what: str) -> None:
    path = write(folder, WHAT | {"id": "one"}, line)
    with pytest.raises(InputError, match=f"own.jsonl, line 2.*({what})"):
        read_questions(path)


def test_other_fields_are_named_and_kept_out_of_the_way(folder: Path) -> None:
    path = write(folder, WHAT | {"answer": "r", "image_id": 3, "label": "x", "source": "me"}, WHAT | {"split": "a"})
    assert read_questions(path).unused == ("image_id", "label", "source", "split")


def test_bad_files(folder: Path) -> None:
    for text, what in (
        ("", "no questions"),
        ("\n\n", "no questions"),
        ("[]", "no questions"),
        ('[{"question": "a?"}', "entry 2 is not JSON .it is cut off"),
        ('[{"question": "a?"} {"question": "b?"}]', "entry 2 is not JSON .a comma is missing"),
        ('[{"question": "a?"}, ]', "entry 2 is not JSON"),
        ('[{"question": "a?"}] {}', "goes on behind its array"),
        ('[{"question": "a?"}, 3]', "entry 2 is no object"),
        ('{\n"question": "a?"}', "line 1 is not JSON"),
    ):
        with pytest.raises(InputError, match=what):
            read_questions(write(folder, text))
    for name, data, what in (
        ("odd.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("own.txt", b"{}", "ends in .txt"),
        ("own", b"{}", "ends in nothing"),
        ("own.csv", b"question,question\na,b", "names a field twice"),
        ("own.csv", b"question\na,b", "line 2 has 2 cells"),
        ("own.csv", b'question\n"a', "line 2 is not CSV"),
        ("own.csv", b"question,answers\na,[b", "no JSON list"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=what):
            read_questions(folder / name)
    with pytest.raises(InputError, match="cannot read"):
        read_questions(folder / "absent.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_questions(folder)
    with pytest.raises(InputError, match="no folder"):
        read_questions(write(folder, {"question": "what?"}), folder / "absent")


def test_a_large_array_is_read_bit_by_bit(tmp_path: Path) -> None:
    """Objects longer than what is read at a time, and cut anywhere."""
    rows = [{"question": f"{i}?", "context": "x" * (i * CHUNK // 3)} for i in range(7)]
    path = write(tmp_path, json.dumps(rows), name="own.json")
    assert [row for _, row in rows_of(path)] == rows
    assert next(rows_of(path)) == ("own.json, entry 1", rows[0])
