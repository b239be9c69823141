"""lm-eval with a compressed cache: ``python -m kvferry.integrations.lm_eval run --model kvferry ...``.

lm-eval finds models in its own package only, so that this module registers ``kvferry`` there and then runs lm-eval's
command line: every option is lm-eval's. Tried with lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from kvferry.integrations.carried import Carried, settings_of
from kvferry.lazy import torch
from kvferry.models.support import text_config


@register_model("kvferry")
class KVFerryLM(TemplateLM):
    """Every context crosses as a bitstream before a continuation is scored or generated on top of it.

    Parameters
    ----------
    pretrained, recipe, device, dtype : str
        See :class:`kvferry.integrations.carried.Carried`.
    max_length : int, optional
        Longer contexts lose their beginning. By default the model's own.
    max_gen_toks : int
        Where a task does not say how long an answer may be.
    stride : int
        Perplexity (``loglikelihood_rolling``) scores so many tokens at a time on top of all before them, compressed.
        The first of a text stand on nothing but the prefix token.
    batch_size, max_batch_size
        Taken for lm-eval's sake; one prompt is compressed at a time.
    """

    def __init__(
        self,
        pretrained: str,
        recipe: str = "full|bf16",
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        stride: int = 256,
        batch_size: Any = 1,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        absent = (device or "").startswith("cuda") and not torch.cuda.is_available()  # lm-eval's default
        self.carried = Carried(pretrained, recipe, device=None if absent else device, dtype=dtype)
        self.tokenizer = self.carried.vlm.tokenizer
        longest = getattr(text_config(self.carried.vlm.model), "max_position_embeddings", 2048)
        self.max_length = int(max_length or longest)
        self.max_gen_toks, self.stride = int(max_gen_toks), int(stride)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results: recipe, provenance, bytes."""
        tally = self.carried.tally
        crossed = {"kvferry_prompts": tally.prompts, "kvferry_bytes": tally.bytes, "kvferry_x_smaller": tally.ratio}
        return {**self.carried.info(), **crossed}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return int(self.eot_token_id if first is None else first)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.carried.vlm.name).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens; by default with the special ones that the tokenizer adds and the text does not hold yet."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return [int(x) for x in self.tokenizer.encode(string, add_special_tokens=add_special_tokens)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """One crossing per context, however many continuations follow each other on it."""
        answers: list[tuple[float, bool]] = []
        for context, same in groupby(requests, key=lambda request: request[1]):
            group = list(same)
            continuations = [continuation for _, _, continuation in group]
            for (text, _, _), answer in zip(group, self._on_one_context(context, continuations), strict=True):
                self.cache_hook.add_partial("loglikelihood", text, answer)
                answers.append(answer)
        return answers

    def _on_one_context(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        longest = max(map(len, continuations))
        context = context[-max(2, self.max_length + 1 - longest) :]
        if len(context) < 2:
            return [self._without_cache(context, continuation) for continuation in continuations]
        cache = self.carried.text(context)
        return [self.carried.likelihood(cache, continuation) for continuation in continuations]

    def _without_cache(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """A context of one token leaves nothing to carry."""
        model = self.carried.vlm.model
        with torch.inference_mode():
            ids = torch.tensor([[*context, *continuation]], device=model.device)
            logits = model(input_ids=ids).logits[0].float()
        return Carried.judged(logits[len(context) - 1 : -1], continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, :attr:`stride` tokens at a time."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            starts = range(1, len(ids), self.stride)
            pieces = [self._on_one_context(ids[:start], [ids[start : start + self.stride]])[0] for start in starts]
            found.append(sum(nats for nats, _ in pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers on top of what arrived of their contexts."""
        answers = []
        for context, settings in (request.args for request in requests):
            most, until = settings_of(settings, self.max_gen_toks)
            ids = self.tok_encode(context)[-max(2, self.max_length - most) :]
            answers.append(self.carried.say(self.carried.text(ids), most=most, until=until))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
