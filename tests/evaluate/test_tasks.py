"""Rows of data sets as the Hub has them, in small files made here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvferry.errors import InputError
from kvferry.evaluate.data import source_of
from kvferry.evaluate.tasks import TASKS, Hub, Task, task_of
from kvferry.evaluate.tasks.base import SHORT, picture
from kvferry.evaluate.tasks.wikitext import WikiText
from kvferry.testbed import sample
from kvferry.testbed.build import build_tokenizer

ROWS: dict[str, dict[str, Any]] = {
    "vqav2": {"image": "a.png", "image_id": 7, "question_id": 70, "question": "What colour?", "answer_type": "other",
              "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]},
    "docvqa": {"image": "a.png", "docId": 7, "questionId": "1", "question": "What is it?", "answers": ["red", "Red 1"],
               "question_types": ["form"]},
    "infovqa": {"image": "a.png", "image_url": "u", "questionId": "1", "question": "What?", "answers": ["red"],
                "answer_type": ["single span"]},
    "chartqa": {"image": "a.png", "query": "How many?", "label": ["12"], "human_or_machine": 1},
    "textvqa": {"image": "a.png", "image_id": "x", "question": "what is WRITTEN?", "answers": ["red"] * 10},
    "mme": {"image": "a.png", "question_id": "color/1.png", "answer": "Yes", "category": "color",
            "question": "Is it red? Please answer yes or no."},
    "pope": {"image": "a.png", "image_source": "COCO_1", "question": "Is there a dog?", "answer": "no",
             "category": "adversarial"},
    "coco": {"image": "a.png", "question": "ignored", "answer": ["a red square", "red"]},
    "squad_v2": {"context": "Ann is red.", "question": "Who is red?", "answers": {"text": ["Ann", "Ann"]}},
    "triviaqa": {"question": "Who?", "entity_pages": {"wiki_context": ["one two", "three"]},
                 "search_results": {"search_context": ["four"]},
                 "answer": {"value": "Ann", "aliases": ["ann", "Ann B"]}},
    "hotpotqa": {"question": "Who?", "answer": "Ann", "type": "bridge",
                 "context": {"title": ["T", "U"], "sentences": [["a. ", "b."], ["c."]]}},
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task's row as JSON lines beside a drawn picture."""
    sample("validation", 0).images[0].save(tmp_path / "a.png")

    def file(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**ROWS[name], **changes}) + "\n\n")
        return path

    return file


@pytest.mark.parametrize("name", ROWS)
def test_every_task_reads_the_columns_of_its_data_set(write: Callable[..., Path], name: str) -> None:
    task = TASKS[name]()
    (row,) = source_of(task, write(name))
    example = task.read(row)
    assert bool(example.images) == task.visual
    assert example.question
    assert example.references
    assert (example.context is None) == task.visual
    if task.visual:
        assert example.images[0].size == sample("validation", 0).images[0].size


def test_what_a_row_asks(write: Callable[..., Path]) -> None:
    read = {name: task_of(name).read(next(iter(source_of(task_of(name), write(name))))) for name in ROWS}
    assert read["vqav2"].references == ("red",) * 10
    assert (read["vqav2"].kind, read["vqav2"].group) == ("other", "7")
    assert read["chartqa"].kind == "machine"
    assert read["textvqa"].question == f"What is written?\n{SHORT}"
    assert read["mme"].question == f"Is it red?\n{SHORT}"
    assert read["coco"].references == ("a red square", "red")
    assert read["squad_v2"].references == ("Ann",)
    assert read["triviaqa"].context == "one two three four"
    assert read["triviaqa"].references == ("Ann", "ann", "Ann B")
    assert read["hotpotqa"].context == "T\na. b.\n\nU\nc."
    bare = task_of("squad_v2").read({**ROWS["squad_v2"], "answers": {"text": []}})
    assert (bare.references, bare.kind) == ((), "unanswerable")


def test_long_pages_are_cut() -> None:
    row = {**ROWS["triviaqa"], "entity_pages": {"wiki_context": ["word " * 5000]}}
    assert len(str(task_of("triviaqa").read(row).context).split()) == 3000


def test_a_text_is_cut_into_windows() -> None:
    task, tokenizer = WikiText(prefix=5, continuation=2), build_tokenizer()
    text = [{"text": "red green blue tom ann ben"}, {"text": "sue max eva joe kim red"}, {"text": "left right small"}]
    windows = list(task.rows(text, "", tokenizer))
    ids = tokenizer("\n\n".join(x["text"] for x in text))["input_ids"]
    assert [x["prefix"] + x["continuation"] for x in windows] == [ids[:7], ids[7:14]]
    assert all(len(x["continuation"]) == 2 for x in windows)
    with pytest.raises(InputError, match="give more text"):
        list(task.rows(text[:1], "", tokenizer))


def test_a_special_first_token_stands_before_every_window() -> None:
    class Marked:
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [99] * add_special_tokens + [ord(x) for x in text]}

    windows = list(WikiText(prefix=2, continuation=1).rows([{"text": "abcdef"}], "", Marked()))
    assert [x["prefix"] for x in windows] == [[99, 97, 98], [99, 100, 101]]


def test_parquet_holds_pictures_as_bytes(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    buffer = io.BytesIO()
    drawn = sample("validation", 0).images[0]
    drawn.save(buffer, "PNG")
    rows = [{**ROWS["docvqa"], "image": {"bytes": buffer.getvalue(), "path": None}, "docId": i} for i in range(3)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "validation-0.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows[:1]), tmp_path / "test-0.parquet")
    task = task_of("docvqa")
    read = [task.read(row) for row in source_of(task, tmp_path)]
    assert [x.group for x in read] == ["0", "1", "2"]
    assert read[0].images[0].tobytes() == drawn.tobytes()
    assert len(list(source_of(task, tmp_path, "test"))) == 1
    (tmp_path / "validation-1.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(InputError, match="not a parquet file that can be read"):
        list(source_of(task, tmp_path))


def test_the_hubs_reader_gives_what_a_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    import pyarrow as arrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    drawn = sample("validation", 0).images[0]
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    features = {"huggingface": json.dumps({"info": {"features": {
        "image": {"_type": "Image"}, "question_id": {"dtype": "string", "_type": "Value"},
        "question": {"dtype": "string", "_type": "Value"}, "answer": {"dtype": "string", "_type": "Value"},
        "category": {"dtype": "string", "_type": "Value"},
    }}})}  # fmt: skip
    table = arrow.Table.from_pylist([{**ROWS["mme"], "image": {"bytes": buffer.getvalue(), "path": "a.png"}}])
    folder = tmp_path / "mme"
    folder.mkdir()
    parquet.write_table(
        table.select(["image", "question_id", "question", "answer", "category"]).replace_schema_metadata(features),
        folder / "test-0.parquet",
    )

    class Local(TASKS["mme"]):  # type: ignore[misc]
        hub = Hub(str(folder), None, "test")

    task: Task = Local()
    (row,) = source_of(task, None)
    assert isinstance(row["image"], dict)
    assert task.read(row).images[0].tobytes() == drawn.tobytes()
    assert task.read(row).question == f"Is it red?\n{SHORT}"


def test_without_the_hub_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--data FILE with the columns image, docId"):
        list(source_of(task_of("docvqa"), None))


def test_what_cannot_be_read(write: Callable[..., Path], tmp_path: Path) -> None:
    task = task_of("docvqa")
    with pytest.raises(InputError, match="check --data"):
        list(source_of(task, tmp_path / "nowhere"))
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(InputError, match=r"\.parquet"):
        list(source_of(task, tmp_path / "a.xml"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": 1}\n')
    with pytest.raises(InputError, match="no column 'docId'"):
        list(source_of(task, bad))
    bad.write_text("{\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        list(source_of(task, bad))
    bad.write_text("[1]\n")
    with pytest.raises(InputError, match="no object"):
        list(source_of(task, bad))
    (row,) = source_of(task, write("docvqa", image="b.png"))
    with pytest.raises(InputError, match="relative to the file"):
        task.read(row)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(InputError, match="not an image that can be read"):
        task.read(row)
    with pytest.raises(InputError, match="int is not a picture"):
        picture(3)
    with pytest.raises(InputError, match="choose one of testbed"):
        task_of("nonsense")
    with pytest.raises(InputError, match="draws its own"):
        source_of(task_of("testbed"), tmp_path)


def test_pictures_come_in_every_form(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "red")
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    for value in (image, str(tmp_path / "x.png"), tmp_path / "x.png", data, {"bytes": data, "path": None}):
        assert picture(value).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("name", "column", "value", "wanted"),
    [
        ("textvqa", "answers", "red", ("red",)), ("textvqa", "answers", ["red", ""], ("red", "")),
        ("docvqa", "answers", "12.50", ("12.50",)), ("docvqa", "answers", 12.5, ("12.5",)),
        ("infovqa", "answers", "red", ("red",)), ("chartqa", "label", "12", ("12",)), ("chartqa", "label", 12, ("12",)),
        ("chartqa", "label", [12.0, "x"], ("12", "x")), ("coco", "answer", "a red square", ("a red square",)),
        ("vqav2", "answers", "red", ("red",)), ("vqav2", "answers", ["red", "rose"], ("red", "rose")),
        ("vqav2", "answers", {"answer": "red"}, ("red",)), ("squad_v2", "answers", {"text": "Ann"}, ("Ann",)),
        ("squad_v2", "answers", ["Ann"], ("Ann",)), ("squad_v2", "answers", "Ann", ("Ann",)),
        ("squad_v2", "answers", {"text": []}, ()), ("hotpotqa", "answer", 12, ("12",)),
        ("triviaqa", "answer", "Ann", ("Ann",)), ("triviaqa", "answer", {"value": "Ann", "aliases": None}, ("Ann",)),
        ("triviaqa", "answer", {"value": "Ann", "aliases": "Annie"}, ("Ann", "Annie")),
        ("mme", "answer", "No", ("No",)),
    ],
)  # fmt: skip
def test_one_answer_is_an_answer_and_not_its_letters(
    write: Callable[..., Path], name: str, column: str, value: Any, wanted: tuple[str, ...]
) -> None:
    """A right answer scored 0 against "r", "e" and "d"."""
    task = task_of(name)
    (row,) = source_of(task, write(name, **{column: value}))
    assert task.read(row).references == wanted
    if wanted and name != "coco":
        assert task.metric.score(wanted[0], task.read(row).references) > 0.5


@pytest.mark.parametrize("name", [x for x in ROWS if x != "squad_v2"])
@pytest.mark.parametrize("value", [None, [], [""]])
def test_a_row_without_an_answer_is_refused(write: Callable[..., Path], name: str, value: Any) -> None:
    """It scored 0, whatever was said."""
    column = next(x for x in ("answers", "label", "answer") if x in ROWS[name])
    (row,) = source_of(task_of(name), write(name, **{column: value}))
    with pytest.raises(InputError, match="without an accepted answer"):
        task_of(name).read(row)


def test_a_kind_is_one_word(write: Callable[..., Path]) -> None:
    (row,) = source_of(task_of("docvqa"), write("docvqa", question_types="form"))
    assert task_of("docvqa").read(row).kind == "form"
