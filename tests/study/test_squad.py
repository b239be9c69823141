"""SmolLM2 on SQuAD, with a small random model of words: texts, prompts, boards, masks, and what is told of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvferry import VLM, InputError, Recipe
from kvferry.errors import EvidenceError
from kvferry.evaluate.sweep import carry
from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import Observer
from kvferry.models.resume import Decoder
from study.profiles import about, make_profiles
from study.squad import PROFILES
from study.squad.asking import Answering, in_cache
from study.squad.board import Board
from study.squad.choosing import calibration
from study.squad.masks import masks
from study.squad.plans import FRACTIONS, PLANS, SCORERS, Plan, canonical, plan_of
from study.squad.prompts import Example, Prompt, asked_about, candidates, prompt_of, shown
from study.squad.reading import TAIL, Reader, layout_of_ids, requests_of, scene_of
from study.squad.records import BARE, FULL, Answer, Record, append, begin, go_on, made_by, read, scores_of
from study.squad.saying import MOST, Asking, board_answers, cache_answers, ends_of, full_answers
from study.squad.texts import Paragraph, Question, Text, read_squad, texts

WORDS = "tom left the red circle right of the large blue square"
ALL = [f"{s}@{f:g}|bf16" for s in SCORERS for f in FRACTIONS]


@pytest.fixture(scope="module")
def ids(vlm: VLM) -> list[int]:
    found: list[int] = vlm.tokenizer(" ".join([WORDS] * 6), add_special_tokens=False)["input_ids"]
    return found


def paragraphs(many: int = 12) -> list[Paragraph]:
    return [
        Paragraph(
            f"title {i % 4}",
            f"Here is sentence number {i} of them all. The colour of thing {i} is shade{i} as all know. The end.",
            (Question(f"What is the colour of thing {i}?", (f"shade{i}",), 0, f"title {i % 4}"),) * 2,
        )
        for i in range(many)
    ]


def words_of(text: str) -> int:
    return len(text.split())


def test_texts_are_full_and_share_no_paragraph() -> None:
    found = list(texts(paragraphs(), words_of, 50, 3))
    assert [x.index for x in found] == list(range(len(found)))
    asked = [q.text for x in found for q in x.questions]
    assert all(words_of(x.words) <= 50 and len(x.questions) <= 3 for x in found)
    assert all(q.answers[0] in x.paragraphs[q.paragraph] for x in found for q in x.questions)
    assert len(set(asked)) == 12
    filled = [x for x in found[:-1] if x.paragraphs[0].startswith("The ")]
    assert filled
    assert all(words_of(x.words) > 30 for x in found[:-1])
    assert found == list(texts(paragraphs(), words_of, 50, 3))


def test_prompts_show_other_articles_than_they_are_chosen_on() -> None:
    mine = paragraphs(40)
    assert {x.title for x in shown(mine)}.isdisjoint(x.title for x in asked_about(mine))
    names = [x.name for x in candidates(mine)]
    assert len(set(names)) == len(names)
    assert "completion-4" in names
    assert len(prompt_of("completion-8", mine).examples) == 8
    with pytest.raises(InputError, match="completion-0"):
        prompt_of("poem-3", mine)


def test_a_question_follows_its_text(vlm: VLM) -> None:
    """Two pieces, that together are the whole prompt."""
    for prompt in candidates(paragraphs(40)):
        if prompt.form == "completion":
            both = prompt.before(vlm.tokenizer, WORDS), prompt.asked(vlm.tokenizer, "what is red?")
            before, asked = map(vlm.tokenizer.decode, both)
            assert WORDS in before
            assert "red" not in before.replace(WORDS, "")
            assert "what is red" in asked


@pytest.mark.parametrize("question", [4, 40])
def test_a_text_is_read_once_for_all_questions(vlm: VLM, ids: list[int], question: int) -> None:
    """Cache, evidence and logits are those of a prompt that is read in one pass; masks are the recipes' selections."""
    reader = Reader(vlm, ids, requests_of(ALL))
    for asked in (ids[5 : 5 + question], ids[9 : 9 + question]):
        read_twice = reader.read(asked, len(asked), len(ids) + len(asked) - 1)
        whole = [*ids, *asked]
        layout = layout_of_ids(whole, range(len(ids), len(whole)))
        from kvferry.models.prefill import read_prompt

        once = read_prompt(
            vlm.model, {"input_ids": torch.tensor([whole])}, layout, requests_of(ALL), length=len(whole) - 1,
            fingerprint=vlm.fingerprint,
        )  # fmt: skip
        torch.testing.assert_close(read_twice.next_logits, once.next_logits, atol=1e-4, rtol=1e-4)
        for a, b in zip(read_twice.cache, once.cache, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
        for request, by_layer in once.evidence.column_sums.items():
            for layer, seen in by_layer.items():
                torch.testing.assert_close(read_twice.evidence.of(request, layer), seen, atol=1e-3, rtol=1e-3)
        found = masks(read_twice, ALL)
        for row, recipe in enumerate(ALL):
            chosen = Recipe.parse(recipe).select(read_twice)
            for layer, positions in enumerate(chosen.positions):
                for head, kept in enumerate(positions):
                    assert found[row, layer, head].nonzero()[:, 0].tolist() == kept.tolist()


def test_budgets_are_masks_too_but_merges_are_not(vlm: VLM, ids: list[int]) -> None:
    recipe = "snapkv@0.3,budget=head"
    prefilled = vlm.prefill_tokens(ids, requests=requests_of([recipe]))
    chosen = Recipe.parse(recipe).select(prefilled)
    (found,) = masks(prefilled, [recipe])
    for layer in range(len(found)):
        assert [x.nonzero()[:, 0].tolist() for x in found[layer]] == [x[0].tolist() for x in chosen.heads(layer)]
    with pytest.raises(InputError, match="leave the merge out"):
        masks(prefilled, ["snapkv@0.3,merge=lookm"])


def test_a_branch_shares_no_row_of_the_end(vlm: VLM, ids: list[int]) -> None:
    request = EvidenceRequest("window", window=8)
    observer = Observer((request,), layout_of_ids(ids, range(0)), vlm.layers, vlm.rotary)
    observer._read = {0: len(ids) - 4}
    with pytest.raises(EvidenceError, match="'window' rows reach into"):
        observer.branch(layout_of_ids([*ids, *ids[:4]], range(0)), (request,))


def test_a_scene_forgets_the_question(vlm: VLM, ids: list[int]) -> None:
    reader = Reader(vlm, ids, requests_of(ALL))
    scene = scene_of(reader.read(ids[:6], 6, len(ids) + 5), len(ids))
    blind = reader.read((), 0, len(ids))
    assert scene.cache.length == blind.cache.length == len(ids)
    assert not scene.cache.layout.question.any()
    torch.testing.assert_close(scene.cache.layers[1].values, blind.cache.layers[1].values, atol=1e-4, rtol=1e-4)
    assert scene.evidence.of(EvidenceRequest("question", layers="last"), vlm.layers - 1).shape[-1] == len(ids)


def test_rows_of_a_board_answer_as_caches_do(vlm: VLM, ids: list[int]) -> None:
    """Hiding tokens is dropping them: loyalty, answers, and where they leave the full cache's."""
    prefilled = in_cache(Reader(vlm, ids, requests_of(ALL)).read(ids[3:9], 6, len(ids) + 5))
    ends, kept = ends_of(vlm), masks(prefilled, ALL)
    everything = torch.ones_like(kept[:1])
    start = [Asking(prefilled.cache.length, tuple(prefilled.cache.pending.tolist()))]
    (asking,) = full_answers(Board(vlm, prefilled.cache.layers, everything), start, ends)
    assert asking.along == vlm.resume(prefilled.cache, max_new_tokens=MOST).token_ids
    on_board = board_answers(Board(vlm, prefilled.cache.layers, kept), [asking] * len(ALL), ends)
    caches = [carry(prefilled, Recipe.parse(x)).cache for x in ALL]
    alone = cache_answers(vlm, caches, asking, ends)
    assert [x.ids for x in on_board] == [x.ids for x in alone]
    assert [x.ids for x in alone] == [vlm.resume(x, max_new_tokens=MOST).token_ids for x in caches]
    assert [x.kl for x in on_board] == pytest.approx([x.kl for x in alone], abs=1e-4)
    assert len({x.ids for x in alone}) > 3
    assert max(x.kl for x in alone) > 0.1


def test_a_decoder_feeds_each_cache_its_own(vlm: VLM, ids: list[int]) -> None:
    caches = [vlm.prefill_tokens(ids).cache] * 2
    both = Decoder(vlm.model, *caches).feed([[5, 6], [7, 8]], logits=2)
    for row, tokens in enumerate(([5, 6], [7, 8])):
        torch.testing.assert_close(both[row], Decoder(vlm.model, caches[0]).feed(tokens, logits=2)[0])
    decoder, alone = Decoder(vlm.model, *caches), Decoder(vlm.model, caches[0])
    decoder.feed([[5], [7]])
    decoder.select([1])
    alone.feed([7])
    torch.testing.assert_close(decoder.feed([[8]]), alone.feed([8]))


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_asked(vlm: VLM, name: str, tmp_path: Path) -> None:
    """Every row of every plan, on one text; and the file that holds it."""
    few = [row for row in PLANS[name].rows if "svd" not in row or "16" in row]
    few = few if name in ("scorers", "blind") else few[::5]
    if PLANS[name].profiles:
        few = [row.replace(str(PROFILES), str(tmp_path)) for row in few]
        prompt = Prompt("completion", ())
        many = [replace(x, text=" ".join([WORDS] * 4)) for x in paragraphs()]
        make_profiles(vlm, lambda: calibration(vlm, prompt, many, 96), "paragraphs", tmp_path, print)
        assert about(tmp_path)["tree"]["n"] == len(many)
    plan = replace(PLANS[name], rows=tuple(few))
    text = Text(3, (WORDS, WORDS), tuple(Question(f"what is {x}?", ("circle",), 0, "shapes") for x in ("red", "blue")))
    answering = Answering(vlm, Prompt("completion", (Example(WORDS, "what is large?", "square"),)), plan)
    with_text = [replace(text, paragraphs=(" ".join([WORDS] * 5),))]
    records = answering.ask(with_text[0], 7)
    assert [x.index for x in records] == [7, 8]
    for record in records:
        assert list(record.outcomes) == [FULL, *plan.rows, BARE]
        assert record.outcomes[FULL] == Answer(record.outcomes[FULL].bytes, 0.0, 1.0, None)
        assert record.outcomes[BARE].kl > 0
        assert all((x.bytes is None) != plan.carried for row, x in record.outcomes.items() if row != BARE)
        assert record.bf16_bytes == 4 * vlm.layers * vlm.kv_heads * vlm.head_dim * record.length
    file = tmp_path / "x.jsonl"
    what = {"model": "m", "prompt": "p", "tokens": 512, "rows": list(plan.rows), "questions": 4}
    assert begin(file, what, {"fingerprint": "f"}) == set()
    append(file, records)
    assert read(file)[1] == records
    with file.open("a") as half:
        half.write('{"index": 9')
    assert begin(file, what, {"fingerprint": "f"}) == {3}
    assert file.read_text().endswith("}\n")
    for other in ({**what, "prompt": "q"}, {**what, "rows": []}):
        with pytest.raises(InputError, match="another plan"):
            begin(file, other, {"fingerprint": "f"})
    assert made_by(read(file)[0] | {"command": "a", "commit": "c"}) == "`a` at commit `c`"
    go_on(file, {"command": "b --n 4", "commit": "d" * 40})
    assert read(file)[1] == records
    made = read(file)[0] | {"command": "a", "commit": "c"}
    assert made_by(made) == f"`a` at commit `c`, from question 3 on by `b --n 4` at commit `{'d' * 12}`"
    made["runs"][0] |= {"command": "", "commit": ""}
    assert made_by(made).endswith("from question 3 on by commands that were not recorded")
    with pytest.raises(InputError, match="other profiles"):
        begin(file, what, {"fingerprint": "f", "profiles": {"tree": {"digest": "d"}}})


def test_more_questions_on_longer_texts() -> None:
    assert plan_of("scorers").questions == 4
    assert plan_of("scorers", 2048).questions == 8
    assert canonical(("snapkv@0.50|bf16 proxy",)) == ("snapkv@0.5|bf16 proxy",)
    with pytest.raises(InputError, match="codecs"):
        plan_of("poems")
    with pytest.raises(InputError, match="384"):
        plan_of("codecs", 100)
    assert isinstance(PLANS["coders"], Plan)
    assert TAIL >= 32


def test_scores() -> None:
    assert scores_of("The red circle.", ("red circle",)) == {"F1": 1.0, "EM": 1.0, "contains": 1.0}
    told = scores_of("It is the red circle", ("circle", "a square"))
    assert told == {"F1": pytest.approx(0.4), "EM": 0.0, "contains": 1.0}
    assert scores_of("circles", ("circle",))["contains"] == 0.0
    record = Record(
        0, "A", 5, "t", ("circle",), 9, 8, 64, "circle", {FULL: Answer(64, 0.0, 1.0), "x": Answer(9, 1.0, 0.5, "a")}
    )
    line = record.line()
    assert line.outcomes["x"][:3] == (0.0, 9, 1.0)
    assert line.outcomes[FULL].correct == 1.0
    assert line.group == "5"


def test_files_that_are_no_paragraphs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no paragraphs"):
        read_squad(tmp_path / "none")
    file = tmp_path / "x"
    file.write_text(json.dumps({"title": "a"}))
    with pytest.raises(InputError, match="line 1"):
        read_squad(file)
