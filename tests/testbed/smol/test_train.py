"""Grown on a Llama: nothing changes for text, what is learned is small, and a stopped run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.errors import ModelError
from kvferry.models.grown import ABOUT, WEIGHTS, rename_tokens
from kvferry.models.load import load
from kvferry.testbed.smol import answers, evaluate, train
from kvferry.testbed.smol.answers import stays, symbols, train_answers
from kvferry.testbed.smol.build import RENAMED, sections, write_folder
from kvferry.testbed.smol.data import Lessons, Task
from kvferry.testbed.smol.pupil import Plan, Pupil, load_run
from kvferry.testbed.smol.seeing import align, match, mistaken
from kvferry.testbed.smol.text import Texts
from kvferry.testbed.targets import COLUMN, OFFSETS, SIZES, dense_labels
from kvferry.testbed.words import IMAGE_PAD
from tests.models.gguf_files import small_llama

TASK = Task(pictures=1, slots=4, sides=(128,), pairs=0.0, text=0.0)
PLAN = Plan(
    rank=4, align_steps=2, tower_pixels=0, symbol_steps=4, answer_steps=4, tower_steps=2, task=TASK, every_text=2
)  # fmt: skip


def test_text_is_read_as_before(pupil: Pupil, language: Path) -> None:
    llama, old = small_llama(), load(language).tokenizer
    said = [{"role": "user", "content": "What is the capital of France?"}]
    text = pupil.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system")
    ids = pupil.tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == old(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(pupil.model(input_ids=ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert pupil.tokenizer.apply_chat_template(seen, tokenize=False).startswith("<|im_start|>user\n<|vision_start|>")
    assert pupil.tokenizer.convert_tokens_to_ids(IMAGE_PAD) == pupil.model.config.image_token_id == 6


def test_rows_and_columns_turn_quickly() -> None:
    assert sections(64) == [1, 4, 27]
    assert sections(16) == [1, 1, 6]


def test_what_is_learned_is_joined_with_the_language_model(pupil: Pupil, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        plain = pupil.model(input_ids=ids).logits
        for weight in pupil.update.up.values():
            weight.normal_(std=0.1)
        changed = pupil.model(input_ids=ids).logits
        with pupil.update.off():
            torch.testing.assert_close(pupil.model(input_ids=ids).logits, plain)
    folder = tmp_path / "grown"
    write_folder(pupil.model, pupil.tokenizer, pupil.update, pupil.language, folder)
    renamed = {str(token): name for token, name in RENAMED.items()}
    assert json.loads((folder / ABOUT).read_text()) == {"language": pupil.language, "renamed": renamed}
    assert not (folder / "tokenizer.json").exists(), "the language model has it"
    vlm = load(folder, dtype="float32")
    assert vlm.has_vision
    assert vlm.fingerprint == load(folder).fingerprint
    said = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    assert vlm.tokenizer(said)["input_ids"] == pupil.tokenizer(said)["input_ids"]
    assert vlm.tokenizer.get_vocab() == pupil.tokenizer.get_vocab()
    assert vlm.tokenizer.chat_template == pupil.tokenizer.chat_template
    with torch.no_grad():
        said = vlm.model(input_ids=ids).logits
    assert (said - changed).norm() < 0.05 * (changed - plain).norm()
    weights = load_file(folder / WEIGHTS)
    weights["model.language_model.layers.0.mlp.up_proj.weight.up"] = torch.zeros(3, 4)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"grown on another language model than .*up_proj.weight does not fit"):
        load(folder)


def test_tokens_of_another_vocabulary_are_not_renamed() -> None:
    parts = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1, "content": "b"}], "version": "1.0"}
    changed = rename_tokens(parts, {1: "<c>"})
    assert changed["model"]["vocab"] == {"a": 0, "<c>": 1}
    (added,) = changed["added_tokens"]
    assert (added["id"], added["content"], added["special"]) == (1, "<c>", True)
    assert parts["model"]["vocab"] == {"a": 0, "b": 1}
    for renamed in ({2: "<c>"}, {1: "a"}):
        with pytest.raises(ModelError, match=r"token \d cannot be called .* it was grown on another one"):
            rename_tokens(parts, renamed)


def test_the_projector_gives_word_vectors(pupil: Pupil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.testbed.smol.data.SIDES", (128,))
    before = pupil.tower.merger.mlp[2].weight.clone()
    assert align(pupil, Plan(align_steps=12, tower_pixels=0), seed=0) > 0.3
    assert not torch.equal(pupil.tower.merger.mlp[2].weight, before)


@pytest.mark.parametrize("stage", ["symbol", "answer"])
def test_a_stopped_run_goes_on_as_it_would_have(
    stage: str, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.testbed.smol.data.SIDES", (128,))
    paragraphs = tmp_path / "text.jsonl"
    paragraph = {"context": "It is a long story. " * 8, "questions": [{"question": "What is it?", "answers": ["long"]}]}
    paragraphs.write_text(json.dumps(paragraph) + "\n")

    def run(folder: Path, stop: int | None = None) -> Pupil:
        pupil = Pupil(str(language), "testbed/control", PLAN, seed=0, device="cpu")
        load_run(pupil, folder)
        texts = Texts(paragraphs, pupil.tokenizer, length=64)
        moved = float(stays(pupil, texts, 0).detach())
        assert moved == pytest.approx(0, abs=1e-5) or (folder / f"{stage}.state").exists()
        if stop:
            monkeypatch.setattr(answers.Stage, "_learning_rate", stopping(answers.Stage._learning_rate, stop))
        try:
            symbolic = stage == "symbol"
            train_answers(pupil, folder, PLAN, texts, seed=0, resume=True, workers=0, symbolic=symbolic)
        except KeyboardInterrupt:
            monkeypatch.undo()
        return pupil

    whole = run(tmp_path / "whole")
    monkeypatch.setattr("kvferry.testbed.runlog._SAVE", 0.0)
    run(tmp_path / "parts", stop=2)
    parts = run(tmp_path / "parts")
    for name, weight in whole.update.state_dict().items():
        torch.testing.assert_close(parts.update.state_dict()[name], weight, atol=1e-6, rtol=1e-5)
    assert any(weight.detach().any() for weight in whole.update.up.values())


def stopping(rate: object, at: int) -> object:
    def stop(stage: object, step: int) -> float:
        if step >= at:
            raise KeyboardInterrupt
        return rate(stage, step)  # type: ignore[operator,no-any-return]

    return stop


def test_the_command_trains_measures_and_exports(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvferry.testbed.smol.data.SIDES", (128,))
    words = ["train", "--out", str(tmp_path), "--language", str(language), "--pictures", "1", "--slots", "3"]
    short = ["--steps", "1", "--symbol-steps", "1", "--tower-steps", "1", "--tower-pictures", "4", "--align-steps", "2"]
    short += ["--match-steps", "1", "--minutes", "9"]
    monkeypatch.setattr(sys, "argv", [*words, *short])
    train.main()
    made = {path.name for path in tmp_path.iterdir()}
    assert {"tower.state", "match.state", "symbol.state", "answer.state", "log.jsonl", "model"} <= made
    assert load(tmp_path / "model").has_vision
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words, "--validate", "2"])
    train.main()
    assert set(json.loads(capsys.readouterr().out)) == {"kinds", "mean"}
    asked = ["--split", "validation", "-n", "3", "--kinds", "colour", "pair", "text", "--json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "model"), *asked])
    monkeypatch.setattr(evaluate, "LONGEST", 4)
    evaluate.main()
    report = json.loads(capsys.readouterr().out)
    assert {kind: row["n"] for kind, row in report["kinds"].items()} == {"colour": 1, "pair": 1, "text": 1}


def test_an_edge_keeps_the_first_layers(language: Path, tmp_path: Path) -> None:
    edge = Pupil(str(language), "testbed/control", Plan(rank=4, layers=1), seed=0, device="cpu")
    write_folder(edge.model, edge.tokenizer, edge.update, edge.language, tmp_path / "edge")
    vlm = load(tmp_path / "edge", dtype="float32")
    assert vlm.layers == 1
    ids = torch.tensor([[1, 40, 41]])
    with torch.no_grad():
        torch.testing.assert_close(vlm.model(input_ids=ids).logits, edge.model(input_ids=ids).logits)


def test_the_tower_learns_to_say_it_in_word_vectors(
    pupil: Pupil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.testbed.smol.data.SIDES", (128,))
    plan = Plan(align_steps=12, tower_pixels=0, match_steps=41)
    before = pupil.tower.patch_embed.proj.weight.clone()
    match(pupil, tmp_path, plan, seed=0, resume=True, workers=0)
    first, _, last = (json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert last < 0.8 * first
    assert not torch.equal(pupil.tower.patch_embed.proj.weight, before)
    again = Pupil(pupil.language, "testbed/control", PLAN, seed=1, device="cpu")
    load_run(again, tmp_path)
    for name, weight in pupil.tower.state_dict().items():
        assert torch.equal(again.tower.state_dict()[name], weight)


def test_other_words_are_mistaken_ones(pupil: Pupil) -> None:
    """Each shape's own vector is that shape to the language model, and another's is not."""
    column = COLUMN["shape"]
    shapes = torch.arange(int(SIZES[column]))
    labels = torch.zeros(len(shapes), len(SIZES), dtype=torch.long)
    labels[:, column] = shapes + 1
    start = int(OFFSETS[column])
    vectors = pupil.vectors[start : start + len(shapes)]
    told = vectors * 20 / vectors.var(0).sum()
    right, wrong = mistaken(pupil, told, labels), mistaken(pupil, told.roll(1, 0), labels)
    assert right < 0.1
    assert wrong > 1
    assert mistaken(pupil, told, torch.zeros_like(labels)) == 0


def test_what_was_exported_can_be_gone_on_with(language: Path, tmp_path: Path) -> None:
    first = Pupil(str(language), "testbed/control", PLAN, seed=0, device="cpu")
    with torch.no_grad():
        for weight in first.update.up.values():
            weight.copy_(weight.normal_(std=0.1).bfloat16())
        for weight in (*first.update.down.values(), *first.tower.parameters()):
            weight.copy_(weight.bfloat16())
    write_folder(first.model, first.tokenizer, first.update, first.language, tmp_path / "model")
    second = Pupil(str(language), "testbed/control", PLAN, seed=1, device="cpu")
    load_run(second, tmp_path)
    for mine, theirs in ((second.update, first.update), (second.tower, first.tower)):
        for name, weight in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], weight)


def test_symbols_say_what_is_there(pupil: Pupil) -> None:
    plan = replace(PLAN, noise=0.0, beside=0.0)
    lesson = Lessons(pupil.prompts, TASK, seed=0, steps=1)[0]
    told = symbols(pupil, lesson, plan, 0)
    assert told is not None
    labels = dense_labels(lesson.scenes[0])
    own = list(COLUMN)[: COLUMN["left colour"]]
    wanted = torch.zeros_like(told)
    for token, row in enumerate(labels):
        for group in own:
            if row[COLUMN[group]] > 0:
                wanted[token] += pupil.vectors[OFFSETS[COLUMN[group]] + row[COLUMN[group]] - 1]
    assert (labels[:, COLUMN["colour"]] > 0).any()
    torch.testing.assert_close(told, wanted)
    assert not told[(labels <= 0).all(axis=1)].any()
    more = symbols(pupil, lesson, replace(plan, beside=1.0), 0)
    noisy = symbols(pupil, lesson, replace(plan, noise=0.3), 0)
    assert more is not None
    assert noisy is not None
    assert not torch.equal(more, told)
    assert float((noisy - told).square().mean() / told.square().mean()) == pytest.approx(0.09, rel=0.05)
