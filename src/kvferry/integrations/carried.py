"""A model whose cache crosses a wire before every answer, as evaluation harnesses need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.sweep import NEEDS_QUESTION, provenance, with_room
from kvferry.evidence import Prefilled
from kvferry.lazy import torch
from kvferry.models import load
from kvferry.models.attention import attached
from kvferry.models.resume import Decoder, stop_ids
from kvferry.recipe import Recipe, compress, decompress


@dataclass
class Tally:
    """What has crossed so far."""

    prompts: int = 0
    bytes: int = 0
    bf16_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Of the full caches in BF16 to the bitstreams."""
        return self.bf16_bytes / self.bytes if self.bytes else float("nan")


class Carried:
    """Prefill, compress to real bytes, decompress, go on from there.

    Parameters
    ----------
    pretrained : str
        Anything ``kvferry.load`` takes.
    recipe : str
        ``;`` may stand for ``,``, which harnesses split their arguments at: ``vlcache@0.1;budget=sparsity|int4``.
    protocol : {"A", "B"}
        Whether a question is known when the cache of pictures is compressed. A text (lm-eval) is always compressed
        whole, but for its last token, before anything is said on top of it.
    device, dtype : str
        See :func:`kvferry.load`.
    proxy : str
        Stands in for the unknown question in protocol B.
    """

    def __init__(
        self,
        pretrained: str,
        recipe: str = "full|bf16",
        protocol: Protocol = "A",
        device: str | None = None,
        dtype: str = "auto",
        proxy: str = "What is shown in this picture?",
    ) -> None:
        if protocol not in ("A", "B"):
            raise InputError(f"protocol is A (ask, then ship) or B (ship, then ask), not {protocol!r}")
        self.recipe = Recipe.parse(recipe.replace(";", ","))
        self.vlm = load(pretrained, device=device, dtype=dtype)
        self.protocol, self.proxy = protocol, proxy
        self.tally = Tally()

    def info(self) -> dict[str, Any]:
        """Where a result comes from, for a harness's own results file."""
        return {"kvferry_recipe": str(self.recipe), "kvferry_protocol": self.protocol, **provenance(self.vlm)}

    def text(self, token_ids: Sequence[int]) -> KVCache:
        """What arrives of a tokenised text; its last token is fed again."""
        return self._cross(self.vlm.prefill_tokens(token_ids, requests=self.recipe.requests))

    def scene(self, images: Sequence[Any], question: str) -> tuple[KVCache, str | None]:
        """What arrives of pictures and a question, and the question if it is still to be fed."""
        if self.protocol == "A":
            return self._cross(self.vlm.prefill(images, question, recipe=self.recipe)), None
        proxy = self.proxy if any(request.rows in NEEDS_QUESTION for request in self.recipe.requests) else None
        return self._cross(self.vlm.prefill(images, recipe=self.recipe, proxy_question=proxy)), question

    def _cross(self, prefilled: Prefilled) -> KVCache:
        blob = with_room(partial(compress, prefilled), self.recipe)
        self.tally.prompts += 1
        self.tally.bytes += len(blob)
        self.tally.bf16_bytes += prefilled.cache.full_bf16_bytes
        return decompress(blob)

    def say(self, cache: KVCache, question: str | None = None, *, most: int = 256, until: Sequence[str] = ()) -> str:
        """Greedy decoding up to the model's own end, ``most`` tokens, or before the first of the texts ``until``."""
        said: list[int] = []
        text = ""
        for token in self._tokens(cache, question, most):
            said.append(token)
            text = str(self.vlm.tokenizer.decode(said, skip_special_tokens=True))
            ends = [text.find(end) for end in until if end and end in text]
            if ends:
                return text[: min(ends)]
        return text

    def _tokens(self, cache: KVCache, question: str | None, most: int) -> Iterator[int]:
        model, ends = self.vlm.model, stop_ids(self.vlm.model)
        feed = self.vlm.to_feed(cache, question)
        with attached(model):
            decoder = Decoder(model, cache)
            for _ in range(most):
                token = int(decoder.feed(feed)[0, -1].argmax())
                if token in ends:
                    return
                yield token
                feed = [token]

    def likelihood(
        self, cache: KVCache, continuation: Sequence[int], question: str | None = None
    ) -> tuple[float, bool]:
        """Log-likelihood of tokens on top of a cache, in nats, and whether greedy decoding says them."""
        logits = self.vlm.score(cache, continuation, question)[:-1]
        return self.judged(logits, continuation)

    @staticmethod
    def judged(logits: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """:meth:`likelihood` from logits ``[k, vocabulary]``."""
        wanted = torch.tensor(list(continuation), device=logits.device)
        nats = torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum").item()
        return -nats, bool((logits.argmax(-1) == wanted).all())


def settings_of(given: dict[str, Any], most: int) -> tuple[int, list[str]]:
    """How many tokens at most, and the texts at which an answer ends, from a harness's settings of generation.

    Raises
    ------
    InputError
        They ask for more than greedy decoding.
    """
    sampled = given.get("do_sample") and given.get("temperature") != 0
    if sampled or (given.get("num_beams") or 1) > 1:
        raise InputError("kvferry's wrapper decodes greedily; set do_sample to false and num_beams to 1 in the task")
    until = given.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    return int(next((given[x] for x in names if given.get(x)), most)), [until] if isinstance(until, str) else [*until]
