"""The studies of real weights, on a text of our own: a good cache foretells what follows, a bad one does not."""

from __future__ import annotations

import pytest

import kvferry
from kvferry import VLM
from study import perplexity
from study.perplexity import BARE, FULL, measure
from study.squad.asking import Answering
from study.squad.plans import Plan
from study.squad.prompts import Example, Prompt
from study.squad.texts import Question, Text

pytestmark = pytest.mark.smol
HARBOUR = (
    "The ferry leaves the small harbour at seven in the morning and reaches the island at half past eight. It carries "
    "letters, bread and newspapers for the two hundred people who live there. In winter, when the sea is rough, the "
    "captain waits for calmer water, and the islanders wait for their letters. The captain is called Ruth Anders, and "
    "she has sailed the route for thirty years. In summer the ferry carries visitors as well. They come to see the "
    "old lighthouse, which was built in 1871 and is still used today, and to walk along the cliffs on the north side "
    "of the island. The last ferry returns to the harbour at six in the evening, and whoever misses it has to stay on "
    "the island until the next morning. There is one small inn near the lighthouse with five rooms for guests."
)


@pytest.fixture(scope="module")
def smollm2() -> VLM:
    return kvferry.load("smollm2", dtype="float32")


def test_perplexity(smollm2: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = smollm2.tokenizer(HARBOUR, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(perplexity, "CONTEXT", len(ids) - 41)
    rows = measure(smollm2, ids, (FULL, "full|int8", "full|int2", "streaming@0.5|bf16"))["rows"]
    nats = {row: told[1] for row, told in rows.items()}
    assert nats[FULL] < nats[BARE] - 0.1
    assert nats["full|int8"] == pytest.approx(nats[FULL], abs=0.05)
    assert nats["full|int2"] > nats[FULL] + 0.5
    assert rows["full|int8"][2] > rows["full|int2"][2]


def test_questions(smollm2: VLM) -> None:
    """The full cache answers from the text, INT8 as well, and the question without the text is the floor."""
    shown = (
        Example("The bakery in the square opens at six.", "When does the bakery open?", "six"),
        Example("The old bridge was built by Tom Hale in 1902.", "Who built the bridge?", "Tom Hale"),
    )
    plan = Plan("codecs", "A", ("full|int8", "full|int1"), carried=True, questions=1)
    text = Text(0, (HARBOUR,), (Question("Who is the captain?", ("Ruth Anders",)),))
    (record,) = Answering(smollm2, Prompt("completion", shown), plan).ask(text, 0)
    assert record.scores[FULL]["contains"] == record.scores["full|int8"]["contains"] == 1
    assert record.scores["prompt"]["contains"] == record.scores["full|int1"]["contains"] == 0
    assert record.outcomes["full|int8"].kl < 0.05 < record.outcomes["full|int1"].kl
