"""Whoever calls a model inside ``compressing()``, in whatever way: it is compressed as by a plain call, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import EvidenceRequest
from kvferry.models import Report, compressing, prefill_inputs
from kvferry.models.resume import continue_from
from tests.models.families import IMAGE, TEXT, build

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
RECIPE = "snapkv@0.4,window=4"
TOKENS, KEPT = 40, (16, 16, 16)
"""Of the prompt that :func:`build` makes for a language model, and what :data:`RECIPE` keeps of it in each layer."""


def llama() -> Any:
    return build("llama")[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return build("llama")[1]["input_ids"].flip(1)


@pytest.fixture(autouse=True)
def _intact(model: Any) -> Iterator[None]:
    """A test leaves the model as it was."""
    before = {**vars(model)}
    yield
    assert {**vars(model)} == before
    assert model.config._attn_implementation == "sdpa"
    assert model.config.num_hidden_layers == 3
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.fixture(scope="module")
def answer(model: Any, ids: torch.Tensor) -> list[int]:
    """What a plain call says on the compressed cache; unlike what it says on the full one."""
    full = model.generate(ids, **GREEDY)[0, TOKENS:].tolist()
    said, report = run(model, ids)
    assert (report.prompt_tokens, report.kept) == (TOKENS, KEPT)
    assert said != full
    return said


def run(model: Any, ids: torch.Tensor, call: Callable[..., Any] | None = None, **more: Any) -> tuple[list[int], Report]:
    with compressing(model, RECIPE) as report:
        said = (call or model.generate)(input_ids=ids, **{**GREEDY, **more})
    return said[0, ids.shape[1] :].tolist(), report


class Streamer(BaseStreamer):  # type: ignore[misc]
    """Calls ``then`` once ``after`` new tokens are known."""

    def __init__(self, after: int, then: Callable[[], None]) -> None:
        self.after, self.then, self.seen = after, then, -1

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == self.after:
            self.then()

    def end(self) -> None:
        pass


def test_an_adapted_model(ids: torch.Tensor) -> None:
    """PEFT's wrapper calls the inner model's ``generate()`` and ``forward()``, where no hook on itself fires."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    stock = adapted.generate(input_ids=ids, **GREEDY)
    with compressing(adapted, "full"):
        assert adapted.generate(input_ids=ids, **GREEDY).tolist() == stock.tolist()
    said, report = run(adapted, ids)
    assert report.kept == KEPT
    assert said == run(adapted.get_base_model(), ids)[0] != run(llama(), ids)[0]
    with compressing(adapted, RECIPE) as forward, torch.no_grad():
        adapted(input_ids=ids)
    assert forward == report


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_an_adapter_that_adds_tokens_is_refused(ids: torch.Tensor, kind: str) -> None:
    import peft

    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    adapted = peft.get_peft_model(llama(), getattr(peft, kind)(**settings))
    with pytest.raises((InputError, UnsupportedModelError), match=r"input_ids|filled elsewhere"):
        run(adapted, ids)


@pytest.mark.parametrize("way", ["torch.compile", "compile()", "forward", "layers"])
def test_a_compiled_model(ids: torch.Tensor, way: str) -> None:
    """Compiled before the block, and run, so that its graphs know nothing of the block."""
    torch.manual_seed(0)
    model = compiled = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    expected = run(model, ids)
    if way == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif way == "compile()":
        model.compile(backend="eager")
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    forward = model.forward
    with torch.no_grad():
        stock = compiled(ids).logits
        assert run(compiled, ids, compiled.generate) == expected
        with compressing(compiled, RECIPE) as report:
            compiled(ids)
        assert report == expected[1]
        assert model.forward == forward
        torch.testing.assert_close(compiled(ids).logits, stock)


def test_a_compiled_model_reads_evidence_and_resumes(ids: torch.Tensor) -> None:
    """``torch.compile`` must not freeze what the attention function does for one prompt into its graph."""
    model, request = llama(), EvidenceRequest("all")
    seen = prefill_inputs(model, {"input_ids": ids}, [request])
    said = continue_from(model, seen.cache, max_new_tokens=1, stop=()).token_ids
    model.model.layers[1].self_attn.compile(backend="eager")
    for requests in ([], [request]):
        again = prefill_inputs(model, {"input_ids": ids}, requests)
    torch.testing.assert_close(again.evidence.of(request, 1), seen.evidence.of(request, 1))
    assert continue_from(model, again.cache, max_new_tokens=1, stop=()).token_ids == said


def test_streaming_from_a_thread(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={**GREEDY, "streamer": streamer})
    with compressing(model, RECIPE) as report:
        thread.start()
        text = "".join(streamer)
    thread.join()
    assert text.split() == [f"w{x}" for x in answer]
    assert report.kept == KEPT


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w2"))
    words.pre_tokenizer = WhitespaceSplit()
    return words


def test_a_thread_that_outlives_the_block_is_served_to_its_end(
    model: Any, ids: torch.Tensor, answer: list[int]
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reading.set()
        assert go_on.wait(20)

    with ThreadPoolExecutor(1) as pool:
        with compressing(model, RECIPE) as report:
            said = pool.submit(model.generate, ids, streamer=Streamer(1, wait), **GREEDY)
            assert reading.wait(20)
        assert "forward" in vars(model)
        go_on.set()
        assert said.result()[0, TOKENS:].tolist() == answer
    assert report.kept == KEPT


def test_leaving_while_a_thread_still_reads(model: Any, ids: torch.Tensor) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reading.set()
        assert go_on.wait(20)

    def leave(pool: ThreadPoolExecutor) -> Any:
        with compressing(model, RECIPE):
            pool.submit(model.generate, ids, streamer=Streamer(0, wait), **GREEDY)
            assert reading.wait(20)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match="join that thread inside the block"):
            leave(pool)
        go_on.set()


def test_a_thread_that_was_there_before(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    """A ``generate()`` that runs already when a block is opened elsewhere goes on with its full cache."""
    halfway, go_on = threading.Event(), threading.Event()
    full = model.generate(ids, **GREEDY).tolist()

    def wait() -> None:
        halfway.set()
        assert go_on.wait(20)

    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(model.generate, ids, streamer=Streamer(2, wait), **GREEDY)
        assert halfway.wait(20)
        with compressing(model, RECIPE):
            go_on.set()
            assert said.result().tolist() == full
            assert model.generate(ids, **GREEDY)[0, TOKENS:].tolist() == answer


def test_threads_share_a_block(model: Any, ids: torch.Tensor) -> None:
    prompts = [ids[:, :n] for n in (40, 31, 22, 35, 26, 17)]
    expected = [run(model, x)[0] for x in prompts]
    with compressing(model, RECIPE), ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: model.generate(x, **GREEDY)[0, x.shape[1] :].tolist(), prompts))
    assert got == expected


def test_threads_with_blocks_of_their_own(model: Any, ids: torch.Tensor) -> None:
    """Each keeps what its own recipe says; a thread without a block cannot know which one is meant."""
    together = threading.Barrier(3)

    def alone(fraction: float) -> tuple[int, ...]:
        with compressing(model, f"knorm@{fraction}") as report:
            together.wait(20)
            model.generate(ids, **GREEDY)
            together.wait(20)
        return report.kept

    with ThreadPoolExecutor(2) as pool:
        kept = [pool.submit(alone, x) for x in (0.25, 0.75)]
        together.wait(20)
        with pytest.raises(InputError, match=r"2 compressing\(\) blocks are open on this LlamaForCausalLM"):
            model.generate(ids, **GREEDY)
        together.wait(20)
        assert [x.result()[0] for x in kept] == [10, 30]


def test_nested_blocks(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    with compressing(model, RECIPE) as outer:
        with compressing(model, "knorm@0.2") as inner:
            model.generate(ids, **GREEDY)
        said = model.generate(ids, **GREEDY)[0, TOKENS:].tolist()
    assert (said, outer.kept, inner.kept) == (answer, KEPT, (8, 8, 8))
    with (
        pytest.raises(InputError, match=r"another compressing\(\) block inside it served every pass"),
        compressing(model, RECIPE),
        compressing(model, "knorm@0.2") as inner,
    ):
        model.generate(ids, **GREEDY)
    assert inner.kept == (8, 8, 8)


def test_blocks_of_two_models(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    other, inputs = build("mistral")
    expected, wanted = run(other, inputs["input_ids"])
    with compressing(model, RECIPE) as first, compressing(other, RECIPE) as second:
        said = model.generate(ids, **GREEDY)[0, TOKENS:].tolist()
        too = other.generate(**inputs, **GREEDY)[0, TOKENS:].tolist()
    assert (said, first.kept) == (answer, KEPT)
    assert (too, second) == (expected, wanted)


def test_a_block_may_be_entered_again(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    block = compressing(model, RECIPE)
    for _ in range(2):
        with block as report:
            assert report.sequences == ()
            assert model.generate(ids, **GREEDY)[0, TOKENS:].tolist() == answer
        assert report.kept == KEPT
    with block:
        model.generate(ids, **GREEDY)
        with pytest.raises(InputError, match="open already"), block:
            pass
    assert compressing(model, RECIPE)(model.generate)(ids, **GREEDY)[0, TOKENS:].tolist() == answer


def test_a_generator_that_is_never_finished(model: Any, ids: torch.Tensor) -> None:
    def stream() -> Iterator[int]:
        with compressing(model, RECIPE):
            yield 1

    pieces = stream()
    assert next(pieces) == 1
    pieces.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle(model: Any, ids: torch.Tensor, answer: list[int], error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("halfway")

    for after in (0, 2):
        with pytest.raises(error, match="halfway"), compressing(model, RECIPE):
            model.generate(ids, streamer=Streamer(after, fail), **GREEDY)
        assert run(model, ids)[0] == answer


def test_leaving_without_having_compressed_anything(model: Any, ids: torch.Tensor) -> None:
    reason = r"no generate\(\) and no forward pass of this LlamaForCausalLM ran"
    with pytest.raises(InputError, match=reason), compressing(model, RECIPE):
        llama().generate(ids, **GREEDY)
    with pytest.raises(ZeroDivisionError), compressing(model, RECIPE):
        raise ZeroDivisionError
    reason = r"LlamaForCausalLM failed \(UnsupportedModelError: use_cache does not go"
    with pytest.raises(InputError, match=reason), compressing(model, RECIPE), ThreadPoolExecutor(1) as pool:
        assert pool.submit(model.generate, ids, use_cache=False).exception() is not None


def test_a_further_turn_in_a_block_of_its_own(model: Any, ids: torch.Tensor) -> None:
    """Outside any block a compressed cache does not go on: Transformers' masks are not made for it."""
    more = {**GREEDY, "return_dict_in_generate": True}

    def turn(said: Any) -> Any:
        return model.generate(torch.cat([said.sequences, ids[:, :3]], 1), past_key_values=said.past_key_values, **more)

    with compressing(model, RECIPE):
        once = turn(model.generate(ids, **more)).sequences.tolist()
    with compressing(model, RECIPE):
        said = model.generate(ids, **more)
    with compressing(model, RECIPE) as report:
        assert turn(said).sequences.tolist() == once
    assert report.sequences == ()
    with pytest.raises(UnsupportedModelError, match=r"goes on only inside kvferry\.compressing"):
        turn(said)
    with pytest.raises(UnsupportedModelError, match="emptied"):
        said.past_key_values.reset()


def test_wrappers_are_looked_through(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    wrapped = torch.nn.DataParallel(model)
    assert run(wrapped, ids, wrapped.module.generate)[0] == answer
    with compressing(wrapped, RECIPE) as report, torch.no_grad():
        wrapped(ids)
    assert report.kept == KEPT
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"pass its \.module"):
        compressing(wrapped, RECIPE)
    for wrong in ("llama", torch.nn.Linear(1, 1), None):
        with pytest.raises(InputError, match="takes a model of Transformers, not a"):
            compressing(wrong, RECIPE)
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no generate\(\); pass the whole model"):
        compressing(model.model, RECIPE)


def test_a_dispatched_model(ids: torch.Tensor, answer: list[int]) -> None:
    """Accelerate replaces ``forward`` too; weights come from memory only while a layer runs."""
    from accelerate import cpu_offload

    offloaded = cpu_offload(llama(), execution_device=torch.device("cpu"))
    said, report = run(offloaded, ids)
    assert (said, report.kept) == (answer, KEPT)
    assert offloaded.generate(ids, **GREEDY).shape == (1, TOKENS + 5)


def test_pipelines(model: Any, ids: torch.Tensor, answer: list[int]) -> None:
    words = tf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="w0", eos_token="w95")
    generate = tf.pipeline("text-generation", model=model, tokenizer=words)
    prompt = " ".join(f"w{x}" for x in ids[0].tolist())
    for target in (model, generate):
        with compressing(target, RECIPE) as report:
            (said,) = generate(prompt, return_full_text=False, max_new_tokens=5, do_sample=False)
        assert said["generated_text"].split() == [f"w{x}" for x in answer]
        assert report.kept == KEPT


def test_a_pipeline_with_pictures() -> None:
    model = build("llava")[0]
    words = tf.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), pad_token="w0", eos_token="w95", extra_special_tokens={"image_token": "w90"}
    )
    template = "{% for c in messages[0]['content'] %}{{ 'w90 ' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = tf.LlavaProcessor(
        pixels, words, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
        image_token="w90", num_additional_image_tokens=1,
    )  # fmt: skip
    picture = {"type": "image", "image": Image.new("RGB", (20, 16), (255, 0, 9))}
    content = [picture, {"type": "text", "text": " ".join(f"w{i}" for i in range(20, 44))}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with compressing(model, RECIPE) as expected:
        ids = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    describe = tf.pipeline("image-text-to-text", model=model, processor=processor)
    with compressing(describe, RECIPE) as report:
        (said,) = describe(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert report == expected
    assert (report.prompt_tokens, report.kept) == (40, KEPT)
    assert said["generated_text"].split() == [f"w{x}" for x in ids]


def test_a_class_with_its_own_generate() -> None:
    """BLIP-2's hands embeddings to its language model's ``generate()``; no pass of its own ever runs."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}  # fmt: skip
    config = tf.Blip2Config(
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        qformer_config={**tower, "vocab_size": 96, "encoder_hidden_size": 16},
        text_config=text, num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    model = tf.Blip2ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"Blip2ForConditionalGeneration.generate\(\) is the family's own"):
        compressing(model, RECIPE)


class Aside(tf.LlamaForCausalLM):  # type: ignore[misc]
    """Claims to generate by ``super()`` and does something else."""

    def generate(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if options.pop("aside", False):
            return tf.LlamaForCausalLM(self.config).eval().generate(input_ids, **options)
        return super().generate(input_ids, **options)


def test_a_generate_that_never_runs_the_model(ids: torch.Tensor) -> None:
    model = Aside(tf.LlamaConfig(**TEXT)).eval()
    assert run(model, ids)[1].kept == KEPT
    with pytest.raises(UnsupportedModelError, match=r"Aside.generate\(\) ran its language model without"):
        run(model, ids, aside=True)
