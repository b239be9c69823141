"""A model folder is complete: every Auto class loads it, and it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)

from kvferry.testbed import KINDS, evaluate
from kvferry.testbed.build import SIZES, build_model, write_folder
from kvferry.testbed.data import sample, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "edge"
    write_folder(build_model(SIZES["edge"]), path)
    return path


def test_auto_classes_load_the_folder(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is Qwen2VLForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert not model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("red 47")["input_ids"]) == "red 4 7"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert AutoImageProcessor.from_pretrained(folder).merge_size == 2


def test_processor_gives_the_same_tensors_as_the_evaluation(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    testbed = evaluate.Testbed.load(folder)
    for kind in ("colour", "pair"):
        drawn = sample("test", 0, kinds=[kind])
        content = [{"type": "image", "image": image} for image in drawn.images]
        content.append({"type": "text", "text": drawn.question})
        ours = testbed.inputs([drawn])
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_pictures_keep_their_size(folder: Path) -> None:
    images = AutoImageProcessor.from_pretrained(folder)
    for drawn in samples("test", 13):
        grids = images(drawn.images, return_tensors="pt")["image_grid_thw"]
        for picture, (_, rows, columns) in zip(drawn.images, grids.tolist(), strict=True):
            assert (picture.height, picture.width) == (8 * rows, 8 * columns)


def test_evaluate_reports_every_kind(folder: Path) -> None:
    report = evaluate.evaluate(folder, "validation", len(KINDS), batch=5, progress=False)
    assert report["overall"]["n"] == len(KINDS)
    assert all(row["n"] == 1 for row in report["kinds"].values())
    assert 0 <= report["overall"]["low"] <= report["overall"]["accuracy"] <= report["overall"]["high"] <= 1


def test_evaluate_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        evaluate.evaluate(tmp_path)
