"""The wrappers inside the harnesses themselves, where those are installed; tasks are the examples'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path("examples")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


@pytest.fixture
def lm() -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'kvferry[lm-eval]')")
    from kvferry.integrations.lm_eval import KVFerryLM

    return KVFerryLM


@pytest.fixture
def lmm() -> Any:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install 'kvferry[lmms-eval]')")
    from lmms_eval.models import get_model

    return get_model("kvferry")


@pytest.mark.usefixtures("offline")
def test_lm_eval_runs_a_task_of_its_own_kind(lm: Any) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(EXAMPLES / "lm_eval"), include_defaults=False)
    scores = {}
    for recipe in ("full|bf16", "random@0.1|int1"):
        done = lm_eval.simple_evaluate(
            model="kvferry",
            model_args={"pretrained": "testbed/cloud", "recipe": recipe},
            tasks=["kvferry_lookup", "kvferry_lookup_say"],
            task_manager=tasks,
            apply_chat_template=True,
            limit=8,
            bootstrap_iters=0,
        )
        assert done["config"]["kvferry_recipe"] == recipe
        assert done["config"]["kvferry_prompts"] == 16
        said = done["results"]
        scores[recipe] = (said["kvferry_lookup"]["acc,none"], said["kvferry_lookup_say"]["exact_match,none"])
    assert scores["full|bf16"] == (1.0, 1.0)
    assert scores["random@0.1|int1"] < (1.0, 1.0)


def test_a_full_cache_scores_as_lm_evals_own_model(lm: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    mine = lm("testbed/edge", max_length=64, stride=8, dtype="float32")
    own = HFLM(pretrained=mine.carried.vlm.model.float(), tokenizer=mine.tokenizer, max_length=64, batch_size=1)
    pairs = [("tom has red , ann has", " blue"), ("tom has red , ann has", " red circle"), ("", "what colour is it ?")]
    texts = ["what colour is the small red circle left of the large blue square ? tom has red and ann has blue"]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolled = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    for (nats, greedy), (want, same) in zip(mine.loglikelihood(asked), own.loglikelihood(asked), strict=True):
        assert nats == pytest.approx(want, rel=2e-2)
        assert greedy == same
    assert mine.carried.tally.prompts == 1
    assert mine.loglikelihood_rolling(rolled) == pytest.approx(own.loglikelihood_rolling(rolled), rel=2e-2)
    assert mine.carried.tally.prompts > 2


@pytest.mark.usefixtures("offline")
def test_lmms_eval_finds_the_model_by_its_entry_point(lmm: Any) -> None:
    assert lmm.__module__ == "kvferry.integrations.lmms_eval_model"


@pytest.mark.usefixtures("offline")
def test_lmms_eval_runs_a_task_of_its_own_kind(lmm: Any, tmp_path: Path) -> None:
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager("ERROR", include_path=str(EXAMPLES / "lmms_eval"))
    for recipe, low, high in (("vlcache@0.10|int4", 0.8, 1.0), ("none|bf16", 0.0, 0.7)):
        done = evaluator.simple_evaluate(
            model="kvferry",
            model_args=f"pretrained=testbed/cloud,recipe={recipe}",
            tasks=["kvferry_testbed"],
            task_manager=tasks,
            limit=12,
            bootstrap_iters=0,
        )
        assert low <= done["results"]["kvferry_testbed"]["exact_match,none"] <= high


def test_lmms_eval_scores_given_answers(lmm: Any) -> None:
    from lmms_eval.api.instance import Instance

    from kvferry.testbed import sample

    drawn = sample("validation", 0)
    model = lmm("testbed/cloud", "vlcache@0.2|int8", protocol="B")
    model.task_dict = {"t": {"validation": [{"answer": drawn.answer}]}}
    rest = (lambda row: drawn.images, 0, "t", "validation")
    asked = [
        Instance("loglikelihood", (drawn.question, answer, *rest), i, {"task": "t", "doc_id": 0, "repeats": 1})
        for i, answer in enumerate([lambda row: row["answer"], "circle"])
    ]
    (right, greedy), (wrong, _) = model.loglikelihood(asked)
    assert greedy
    assert right > wrong
    json.dumps([right, wrong])
