"""One model, ready to read pictures and questions into a cache and to answer from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from kvferry.cache import KVCache, PromptLayout, Role
from kvferry.errors import FingerprintError, InputError, UnsupportedModelError
from kvferry.evidence import EvidenceRequest, Prefilled
from kvferry.messages import Messages
from kvferry.models.attention import attach
from kvferry.models.bounds import bounds_of
from kvferry.models.embeds import VisualEmbeds, look
from kvferry.models.fingerprint import fingerprint_of, prompt_fingerprint, vision_fingerprint
from kvferry.models.layout import layout_of, layout_with_roles
from kvferry.models.prefill import Watch, read_prompt, requests_of
from kvferry.models.prompt import Prompt, Prompter
from kvferry.models.pruning import Pruning
from kvferry.models.reduced import Reducer
from kvferry.models.resume import Continuation, Decoder, check_token_ids, continue_from
from kvferry.models.rotary import rotary_of
from kvferry.models.steps import Pace, finished, recalled
from kvferry.models.stream import TextStream
from kvferry.models.support import check_supported, kv_shape, text_config, visual_token_ids
from kvferry.models.tower_pruning import TowerPruning
from kvferry.pictures import open_picture
from kvferry.pictures.familiar import TrainingPictures, note_on, tell
from kvferry.rope import Rotary
from kvferry.selection.base import Selection


class VLM:
    """A vision-language or language model with what belongs to it.

    Safe to use from several threads at once.

    Parameters
    ----------
    model : PreTrainedModel
        Its language model's attention implementation is set to kvferry's own (SDPA that can be watched).
    tokenizer
        The model's tokenizer; by default the processor's.
    processor, image_processor
        The model's processor, or for the Qwen-VL families only its image processor.
    name : str
        For people; by default the model's name or path.
    fingerprint : str
        By default computed from the weights.
    training : TrainingPictures, optional
        All that it has seen, if that is little; it warns of other pictures.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served, with the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        *,
        name: str = "",
        fingerprint: str = "",
        training: TrainingPictures | None = None,
    ) -> None:
        check_supported(model)
        self.model = model.eval()
        self.processor = processor
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None)
        self.image_processor = (
            image_processor if image_processor is not None else getattr(processor, "image_processor", None)
        )
        if self.tokenizer is None:
            raise UnsupportedModelError("a model needs a tokenizer; pass tokenizer=... or use prefill_inputs()")
        if not getattr(self.tokenizer, "is_fast", False):
            raise UnsupportedModelError("the tokenizer cannot tell where its tokens stand; pass a fast tokenizer")
        self.name = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        self.fingerprint = fingerprint or fingerprint_of(model)
        self.training = training
        self.bounds = bounds_of(model, self.fingerprint)
        self._prompter = Prompter(model.config, self.tokenizer, processor, self.image_processor)
        self.visual_tokens = self._prompter.visual_tokens
        self.reduced = Reducer(self.image_processor)
        attach(model)

    @property
    def has_vision(self) -> bool:
        """Whether the model can look at pictures."""
        return bool(visual_token_ids(self.model.config))

    @cached_property
    def vision_fingerprint(self) -> str:
        """Digest of the vision tower and the projector, see :func:`kvferry.models.fingerprint.vision_fingerprint`."""
        return vision_fingerprint(self.model)

    @cached_property
    def prompt_fingerprint(self) -> str:
        """Digest of tokenizer, template and patch grid, see :func:`kvferry.models.fingerprint.prompt_fingerprint`."""
        return prompt_fingerprint(self.model.config, self.tokenizer, self.processor, self.image_processor)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        """Key-value heads per layer."""
        return kv_shape(self.model)[0]

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return kv_shape(self.model)[1]

    @property
    def rotary(self) -> tuple[Rotary | None, ...]:
        """How each layer rotates its keys; None where it is not a fixed rotation."""
        return rotary_of(self.model)

    def look(self, images: Sequence[Any] | Any) -> list[VisualEmbeds]:
        """Run only the vision tower and the projector; what comes out stands for the pictures in :meth:`prefill`.

        Raises
        ------
        InputError
            No usable picture.
        UnsupportedModelError
            The language model reads more of a picture than one embedding per token.
        """
        return look(self.model, self.image_processor, self._pictures(images))

    def prefill(
        self,
        images: Sequence[Any] | Any = (),
        question: str | None = None,
        *,
        messages: Messages | Sequence[Any] | None = None,
        recipe: Any = None,
        proxy_question: str | None = None,
        context: str | None = None,
        requests: Sequence[EvidenceRequest] = (),
        watch: Watch | None = None,
        construct: Selection | None = None,
        prune: Pruning | TowerPruning | None = None,
    ) -> Prefilled:
        """Read a prompt into a cache and observe what a recipe needs.

        With a question (protocol A) the cache holds all tokens but the last, which is fed again on resuming. Without
        (protocol B) the prompt ends where the question would go, and the cache holds all of it.

        Parameters
        ----------
        images : sequence of PIL images, paths or arrays
            May be empty. Or what :meth:`look` returned for them.
        question : str, optional
        messages : sequence of mappings, optional
            Instead of a question: a conversation as :meth:`kvferry.messages.Messages.parse` takes it; ``images`` are
            those that it does not name.
        recipe : str or Recipe, optional
            Only decides what is observed of attention.
        proxy_question : str, optional
            Without a question: run behind the scene for evidence. The later question makes an oracle.
        context : str, optional
            Text before the question, such as a document.
        requests : sequence of EvidenceRequest
            Observed besides.
        watch : Watch, optional
            Sees every layer's queries and keys (:class:`kvferry.analyze.watch.AttentionWatch`).
        construct, prune : Selection, Pruning or TowerPruning, optional
            Hide, or drop, tokens while the cache is built (:func:`kvferry.models.prefill.read_prompt`).

        Raises
        ------
        InputError
            No usable picture or text, template tokens in the caller's words, or a selection of another prompt.
        EvidenceError
            The recipe looks at the question, and there is none.
        """
        if question is not None and proxy_question is not None:
            raise InputError("proxy_question is for scenes without a question; pass only one of the two")
        prompt, layout, scene = self.prompt_of(images, question, messages, context, proxy_question)
        length = prompt.scene if scene else len(layout) - 1
        wanted = tuple(dict.fromkeys((*requests_of(recipe), *requests)))
        return read_prompt(
            self.model, prompt.inputs, layout, wanted, length=length, fingerprint=self.fingerprint, scene=scene,
            watch=watch, construct=construct, prune=prune,
        )  # fmt: skip

    def prompt_of(
        self, images: Sequence[Any] | Any, question: str | None = None,
        messages: Messages | Sequence[Any] | None = None, context: str | None = None, proxy_question: str | None = None,
    ) -> tuple[Prompt, PromptLayout, bool]:  # fmt: skip
        """What :meth:`prefill` reads, and whether that is a scene without a question."""
        asked = question if question is not None else proxy_question
        if messages is not None:
            if asked is not None or context is not None:
                raise InputError("messages hold the question and all before it; pass no question or context with them")
            said = Messages.parse(messages, images if isinstance(images, (list, tuple)) else [images])
            prompt, question = self._prompter.converse(said, self._pictures(said.images)), said.question
        else:
            pictures = self._pictures(images)
            if not pictures and context is None and question is None:
                raise InputError("there is nothing to read; pass a picture, a context or a question")
            prompt = self._prompter.build(pictures, context, asked)
        layout = layout_with_roles(self.model, prompt.inputs, prompt.roles, prompt.scene)
        self._check_length(layout)
        return prompt, layout, question is None

    def prefill_tokens(self, token_ids: Sequence[int], *, requests: Sequence[EvidenceRequest] = ()) -> Prefilled:
        """Read a text that is already tokenised, without a template, into a cache of all its tokens but the last.

        Parameters
        ----------
        token_ids : sequence of int, ``[n]``
            At least two.
        requests : sequence of EvidenceRequest
            Observed of attention; the last 32 tokens count as the question.

        Raises
        ------
        InputError
            Fewer than two tokens, one outside the vocabulary, or more than the model has positions for.
        """
        if len(token_ids) < 2:
            raise InputError("a text of fewer than two tokens leaves nothing to cache; give it a token to start with")
        check_token_ids(self.model, token_ids)
        inputs = {"input_ids": torch.tensor([list(token_ids)])}
        layout = layout_of(self.model, inputs)
        self._check_length(layout)
        length = len(layout) - 1
        return read_prompt(self.model, inputs, layout, requests, length=length, fingerprint=self.fingerprint)

    def resume(
        self,
        cache: KVCache | Prefilled,
        question: str | None = None,
        *,
        max_new_tokens: int = 16,
        on_token: Callable[[int, str], None] | None = None,
        keep: bool = False,
    ) -> Continuation:
        """Answer from a cache, greedily; the cache stays as it is.

        Parameters
        ----------
        cache : KVCache or Prefilled
            Or what :meth:`prefill` returned, whose cache is taken.
        question : str, optional
            Only for a scene that was cached without one, and for the next turn of a conversation: a cache that ends
            with an answer.
        on_token : callable, optional
            Called with every token and the text it adds, as soon as it is known.
        keep : bool
            Keep the cache with question and answer, as :attr:`Continuation.cache`; another question goes on from it.

        Raises
        ------
        FingerprintError
            The cache was made by another model.
        InputError
            A question is missing, there already is one, or the conversation has become longer than the model reads.
        """
        cache = cache.cache if isinstance(cache, Prefilled) else cache
        self.check(cache)
        feed, roles = self.feed(cache, question)
        stream = TextStream(self.tokenizer, on_token)
        done = continue_from(self.model, cache, feed, max_new_tokens, on_token=stream.add, keep=roles if keep else None)
        return replace(done, text=stream.finish())

    def recall(self, cache: KVCache, said: Sequence[int], question: str | None = None) -> KVCache:
        """The cache that :meth:`resume` keeps, of an answer that was given before; read in parts, so but for rounding.

        Parameters
        ----------
        said : sequence of int
            The answer's token ids; ``cache`` and ``question`` are those of :meth:`resume`.
        """
        self.check(cache)
        feed, roles = self.feed(cache, question, len(said))
        return finished(recalled(self.model, cache, feed, said, roles, Pace()))

    def answer(self, cache: KVCache | Prefilled, question: str | None = None, **options: Any) -> str:
        """The text of :meth:`resume`, which says what the options are."""
        return self.resume(cache, question, **options).text

    def turn_ids(self, question: str) -> list[int]:
        """Token ids from the end of an answer to where the answer to a further question begins."""
        return self._prompter.turn(question)[0]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer that another model gave, for :meth:`recall`; template tokens in it are left out."""
        return self._prompter.answer(text)

    def check_said(self, token_ids: Sequence[int]) -> None:
        """Refuse token ids that no answer of this model holds: template tokens, and what is in no vocabulary."""
        check_token_ids(self.model, token_ids)
        if found := self._prompter.structure.intersection(token_ids):
            name = self.tokenizer.convert_ids_to_tokens(min(found))
            raise InputError(f"an answer holds the template token {name!r}; tell it in words")

    def score(self, cache: KVCache, token_ids: Sequence[int], question: str | None = None) -> torch.Tensor:
        """Logits for every one of ``token_ids`` as an answer, and for what follows it, in one pass.

        Parameters
        ----------
        token_ids : sequence of int, ``[k]``
            A given answer; ``cache`` and ``question`` are those of :meth:`resume`.

        Returns
        -------
        float32 ``[k + 1, vocabulary]``
        """
        return self.score_many([cache], token_ids, question)[0]

    def score_many(
        self,
        caches: Sequence[KVCache],
        token_ids: Sequence[int],
        question: str | None = None,
        *,
        outputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """:meth:`score` for several compressions of one prompt at once, float32 ``[caches, k + 1, vocabulary]``.

        ``outputs`` gets every layer's attention output, ``[caches, tokens fed, query_heads, d]``.

        Raises
        ------
        InputError
            The caches stand for different prompts.
        """
        for cache in caches:
            self.check(cache)
        feed = [*self.to_feed(caches[0], question), *(int(x) for x in token_ids)]
        return Decoder(self.model, *caches).feed(feed, logits=len(token_ids) + 1, outputs=outputs)

    def to_feed(self, cache: KVCache, question: str | None = None) -> list[int]:
        """The token ids that :meth:`resume` feeds first: those that are pending, or the question's.

        Raises
        ------
        InputError
            A question is missing, or there already is one.
        """
        return self.feed(cache, question)[0]

    def _pictures(self, images: Sequence[Any] | Any) -> list[Any]:
        many = images if isinstance(images, (list, tuple)) else [images]
        if many and not self.has_vision:
            raise InputError(f"{self.name} reads text only; leave the pictures out")
        pictures = [x if isinstance(x, VisualEmbeds) else open_picture(x) for x in many]
        tell(note_on(self, ((x.width, x.height) for x in pictures if not isinstance(x, VisualEmbeds))))
        return pictures

    def _check_length(self, layout: PromptLayout, more: int = 0) -> None:
        """Refuse a prompt that is longer, with ``more`` tokens behind it, than the model reads."""
        longest = getattr(text_config(self.model), "max_position_embeddings", None)
        if longest is not None and layout.next_position + more > longest:
            raise InputError(
                f"the prompt reaches position {layout.next_position + more:,}, beyond the model's {longest:,}; "
                "shorten the text, scale the pictures down, or begin a new conversation"
            )

    def check(self, cache: KVCache) -> None:
        """Refuse a cache that another model made."""
        if cache.fingerprint != self.fingerprint:
            made_by = f" ({cache.model_name})" if cache.model_name else ""
            raise FingerprintError(
                f"this cache was made by another model{made_by}, not by {self.name}; load the model that made it"
            )

    def feed(self, cache: KVCache, question: str | None, more: int = 0) -> tuple[list[int], list[Role]]:
        """What to feed on top of a cache, with ``more`` tokens behind it, and the roles of those its prompt lacks."""
        if len(cache.pending):
            if question is not None:
                raise InputError("this cache already holds a question; leave question out, or cache a scene without")
            self._check_length(cache.layout, more)
            return [int(x) for x in cache.pending], []
        layout = cache.layout
        answered = bool(layout.question.any())
        if question is None:
            what = "ends with an answer" if answered else "holds a scene without a question"
            raise InputError(f"this cache {what}; pass question=...")
        if answered:
            ids, roles = self._prompter.turn(question)
        else:
            has_context = bool(((layout.role == Role.CONTEXT) & ~layout.visual).any())
            ids, roles = self._prompter.question(question, images=bool(layout.visual.any()), context=has_context)
        self._check_length(layout, len(ids) + more)
        return ids, roles
