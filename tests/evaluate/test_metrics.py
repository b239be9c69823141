"""Metrics against known cases, and against other people's implementations where they are installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import InputError
from kvferry.evaluate.metrics import (
    ANLS,
    METRICS,
    Answers,
    CIDEr,
    ExactMatch,
    PairedYesNo,
    Perplexity,
    RelaxedAccuracy,
    SoftAccuracy,
    WordF1,
    YesNo,
    metric_of,
)
from kvferry.evaluate.metrics.anls import edit_distance
from kvferry.evaluate.metrics.cider import words_of
from kvferry.evaluate.metrics.soft import normalise
from kvferry.evaluate.metrics.words import exact, word_f1
from kvferry.statistics import ratio_in_groups

ANSWERS = st.lists(
    st.sampled_from(
        ["the", "A", "two", "2", "none", "dont", "it's", "wouldn'tve", "1,000", "3.5", "U.S.", "red-blue", "a/b", "?",
         "somebody'd", "twas", "yall'd've", "let's", "dog's", "(x)", "No.", "hes", "10", "ten"]
    ),
    max_size=6,
).map(" ".join)  # fmt: skip


def answers(said: list[str], references: list[list[str]], scores: list[float], groups: list[str]) -> Answers:
    return Answers(said, references, groups, np.array(scores))


def figures(metric: Any, given: Answers) -> dict[str, float]:
    return {x.name: float(x.over.sum() / x.under.sum()) for x in metric.figures(given)}


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("The  two Dogs.", "2 dogs"),
        ("dont know", "don't know"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("U.S.", "us"),
        ("wouldn'tve", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("none", "0"),
    ],
)
def test_vqa_answers_are_compared_in_this_form(said: str, form: str) -> None:
    assert normalise(said) == form


def test_soft_accuracy_leaves_each_person_out_once() -> None:
    people = ["yes"] * 3 + ["no"] * 6 + ["maybe"]
    assert SoftAccuracy().score("Yes.", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert SoftAccuracy().score("no", people) == 1
    assert SoftAccuracy().score("maybe", people) == pytest.approx(0.3)
    assert SoftAccuracy().score("perhaps", people) == 0
    assert SoftAccuracy().score("dog's", ["dog 's"] * 10) == 0
    assert SoftAccuracy(possessives=True).score("dog's", ["dog 's"] * 10) == 1


@settings(max_examples=300)
@given(ANSWERS)
def test_vqa_form_is_that_of_lmms_eval(text: str) -> None:
    reason = "lmms-eval is not installed"
    reference = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric", reason=reason)
    processor = reference.EvalAIAnswerProcessor()
    assert normalise(text) == processor.process_digit_article(processor.process_punctuation(text.strip()))
    assert normalise(text, possessives=True) == processor(text)


def test_anls_on_known_cases() -> None:
    score = ANLS().score
    assert score("New  york", ["new york"]) == 1
    assert score("new yrk", ["new york"]) == pytest.approx(7 / 8)
    assert score("abcd", ["abxy"]) == 0.5
    assert score("abcde", ["abxyz"]) == 0
    assert score("cat", ["dog", "cats"]) == pytest.approx(3 / 4)
    assert score("x", []) == 0
    assert score("", [""]) == 1


@given(st.text("abc ", max_size=12), st.text("abc ", max_size=12))
def test_edit_distance_is_that_of_rapidfuzz(one: str, other: str) -> None:
    distance = pytest.importorskip("rapidfuzz.distance", reason="rapidfuzz is not installed").Levenshtein
    assert edit_distance(one, other) == distance.distance(one, other)


@given(st.text("ab c", max_size=9), st.lists(st.text("ab c", max_size=9), min_size=1, max_size=3))
def test_anls_is_that_of_lmms_eval(said: str, references: list[str]) -> None:
    reference = pytest.importorskip("lmms_eval.api.metrics", reason="lmms-eval is not installed")
    tidy = [" ".join(x.split()) for x in (said, *references)]  # lmms-eval divides by lengths before this
    assert ANLS().score(tidy[0], tidy[1:]) == pytest.approx(reference.anls(tidy[1:], [tidy[0]])["anls"])


def test_relaxed_accuracy_is_within_five_per_cent() -> None:
    score = RelaxedAccuracy().score
    assert score("105", ["100"]) == 1
    assert score("105.1", ["100"]) == 0
    assert score("5%", ["0.05"]) == 1
    assert score("-95", ["-100"]) == 1
    assert score("Yes", ["yes"]) == 1
    assert score("0.0", ["0"]) == 0
    assert score("12 apples", ["12"]) == 0


@given(
    st.one_of(st.floats(-1e3, 1e3).map(str), st.sampled_from(["5%", "Yes", "no", "0"])),
    st.one_of(st.floats(-1e3, 1e3).map(str), st.sampled_from(["5%", "yes", "0"])),
)
def test_relaxed_accuracy_is_that_of_lmms_eval(said: str, reference: str) -> None:
    utils = pytest.importorskip("lmms_eval.tasks.chartqa.utils", reason="lmms-eval is not installed")
    assert RelaxedAccuracy().score(said, [reference]) == float(utils.relaxed_correctness(said, reference))


SAID = ["Yes", "yes, it is", "No.", "no", "n", "I think not", "", "nothing", "Y"]


@pytest.mark.parametrize("said", SAID)
def test_yes_and_no_are_read_as_mme_reads_them(said: str) -> None:
    utils = pytest.importorskip("lmms_eval.tasks.mme.utils", reason="lmms-eval is not installed")
    for truth in ("Yes", "No"):
        assert YesNo().score(said, [truth]) == float(utils.parse_pred_ans(said) == truth.lower())


def test_figures_of_yes_and_no() -> None:
    said, truth = ["Yes", "yes.", "no", "No", "maybe"], ["yes", "no", "yes", "no", "yes"]
    metric = YesNo()
    scores = [metric.score(a, [b]) for a, b in zip(said, truth, strict=True)]
    assert scores == [1, 0, 0, 1, 0]
    found = figures(metric, answers(said, [[x] for x in truth], scores, [""] * 5))
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "F1": 2 / 5, "yes-ratio": 2 / 5})


def test_accuracy_by_pairs_of_questions() -> None:
    given = answers(["yes", "no", "yes", "yes"], [["yes"], ["no"], ["yes"], ["no"]], [1, 1, 1, 0], ["a", "a", "b", "b"])
    assert figures(PairedYesNo(), given) == {"acc+": 0.5}


def test_words_on_known_cases() -> None:
    assert WordF1().score("The Eiffel Tower!", ["Eiffel tower"]) == 1
    assert WordF1().score("tower of Eiffel", ["Eiffel tower"]) == pytest.approx(0.8)
    assert WordF1().score("x", ["y", "x z"]) == pytest.approx(2 / 3)
    assert WordF1().score("unanswerable.", []) == 1
    assert WordF1().score("", []) == 1
    assert WordF1().score("Paris", []) == 0
    assert WordF1().score("unanswerable", ["Paris"]) == 0
    found = figures(WordF1(), answers(["the X", "x y"], [["x"], ["x"]], [1, 2 / 3], ["", ""]))
    assert found == {"EM": 0.5}


@settings(max_examples=10)
@given(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3))
def test_words_are_compared_as_torchmetrics_does(said: str, references: list[str]) -> None:
    reference = pytest.importorskip("torchmetrics.functional.text", reason="torchmetrics is not installed")
    truth = {"id": "0", "answers": {"text": references, "answer_start": [0] * len(references)}}
    found = reference.squad([{"id": "0", "prediction_text": said}], [truth])
    assert exact(said, references) == float(found["exact_match"]) / 100
    if all(word_f1(x, x) and word_f1(said, x) for x in references):  # it gives 0 for two empty answers
        assert WordF1().score(said, references) == pytest.approx(float(found["f1"]) / 100)


def test_cider_is_that_of_its_package() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed").Cider
    wanted = [["A dog runs.", "The dog is running"], ["Two red cars", "red cars, parked"], ["a man's hat", "a hat"]]
    said = ["A dog is running", "two cars", "a cat"]
    given = answers(said, wanted, [np.nan] * 3, [""] * 3)
    mean, each = cider().compute_score(
        {0: ["a dog runs", "the dog is running"], 1: ["two red cars", "red cars parked"], 2: ["a man's hat", "a hat"]},
        {0: ["a dog is running"], 1: ["two cars"], 2: ["a cat"]},
    )
    assert CIDEr().score("x", ["x"]) is None
    np.testing.assert_allclose(CIDEr().scores(given), each)
    assert 0 < mean == pytest.approx(CIDEr().scores(given).mean())


def test_captions_lose_their_punctuation() -> None:
    assert words_of("A black-and-white cat's bed, (2 of 3).") == "a black-and-white cat's bed 2 of 3"


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert Perplexity().shown(math.log(7.0)) == pytest.approx(7)


def test_the_testbeds_answers_match_exactly() -> None:
    assert ExactMatch().score("Fi sh", ["f i s h"]) == 1
    assert ExactMatch().score("fish", ["cat"]) == 0


def test_intervals_draw_pictures_and_not_questions() -> None:
    right = [1.0, 1.0, 0.0, 0.0] * 10
    alone = ratio_in_groups(right, np.ones(40), [""] * 40)
    pairs = ratio_in_groups(right, np.ones(40), [str(i // 2) for i in range(40)])
    assert alone.mean == pairs.mean == 0.5
    assert alone.n == pairs.n == 40
    assert pairs.high - pairs.low > 1.2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("people", "said", "wanted"),
    [
        (["red"], "Red", 1), (["red"], "blue", 0), (["red", "rose"], "rose", 1), (["red", "rose", "pink"], "red", 1),
        (["red", "rose", "pink", "ruby"], "red", 10 / 12), (["red"] * 2 + ["b"] * 3, "red", 1), (["red"] + ["b"] * 8,
         "red", 10 / 27), (["red"] * 9, "red", 1), (["red"] * 10, "red", 1), (["red"] * 3 + ["b"] * 7, "red", 0.9),
        ([], "red", 0),
    ],
)  # fmt: skip
def test_fewer_people_than_ten_can_be_asked(people: list[str], said: str, wanted: float) -> None:
    """One person's right answer counted 0: nobody else gave it."""
    for metric in (SoftAccuracy(), SoftAccuracy(possessives=True)):
        assert metric.score(said, people) == pytest.approx(wanted)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_by_name_scores_right_above_wrong(name: str) -> None:
    """One reference, as it stands in a file of one's own."""
    if name == "cider":
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is in the extra 'captions'")
    metric = metric_of(name)
    if name == "cider":
        found = metric.scores(Answers(["a red dog", "b"], [["a red dog"], ["two cats sleep"]], [""] * 2, np.zeros(2)))
        assert found[0] > found[1] == 0
    else:
        assert metric.score("yes", ["yes"]) == 1
        assert metric.score("no", ["yes"]) == 0


def test_a_sentence_may_hold_the_answer() -> None:
    assert [ExactMatch().score(x, ["red"]) for x in ("Red.", ' "red" ', "the red", "red!", "re d", "reds", "")] == [
        1, 1, 0, 1, 1, 0, 0,
    ]  # fmt: skip
    assert [ExactMatch().score(x, ["-5"]) for x in ("-5", "5", "-5.")] == [1, 0, 1]
    assert ExactMatch().score("?", ["?"]) == 1
    assert ExactMatch().score("...", ["?"]) == 0
    held = {"The circle is red.": 1, "RED": 1, "reddish": 0, "It is a red one": 1, "": 0}
    assert {said: metric_of("contains").score(said, ["red"]) for said in held} == held
    assert [metric_of("contains").score(x, ["4"]) for x in ("4", "14", "4.5", "there are 4.")] == [1, 0, 0, 1]
    assert metric_of("contains").score("a big dog", ["big dog"]) == 1
    assert metric_of("contains").score("big and dog", ["big dog"]) == 0


def test_what_is_neither_yes_nor_no_is_no_reference() -> None:
    """Two answers that are neither were the same."""
    with pytest.raises(InputError, match="'red' is neither yes nor no"):
        YesNo().score("blue", ["red"])
    with pytest.raises(InputError, match="choose one of exact, contains, vqa"):
        metric_of("bleu")


def test_a_metric_of_ones_own_has_a_name() -> None:
    class Length(ExactMatch):
        def score(self, said: str, references: Sequence[str]) -> float:
            return float(len(said) == len(references[0]))

    METRICS["length"] = Length
    try:
        assert metric_of("length").score("abc", ["xyz"]) == 1
        with pytest.raises(InputError, match="length"):
            metric_of("width")
    finally:
        del METRICS["length"]
