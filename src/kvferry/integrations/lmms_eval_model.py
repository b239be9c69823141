"""The model behind :mod:`kvferry.integrations.lmms_eval`; importing it needs lmms-eval."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from kvferry.errors import InputError
from kvferry.evaluate.records import Protocol
from kvferry.integrations.carried import Carried, settings_of


class KVFerry(lmms):
    """Every picture and question cross as a bitstream before they are answered.

    Parameters
    ----------
    pretrained, recipe, protocol, device, dtype : str
        See :class:`kvferry.integrations.carried.Carried`.
    max_new_tokens : int
        Where a task does not say how long an answer may be.
    batch_size
        Taken for lmms-eval's sake; one prompt is compressed at a time.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        recipe: str = "full|bf16",
        protocol: Protocol = "A",
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 256,
        batch_size: Any = 1,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        self.carried = Carried(pretrained, recipe, protocol, device, dtype)
        self.max_new_tokens = int(max_new_tokens)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy answers."""
        answers = []
        for request in requests:
            question, settings, to_pictures, document, task, split = request.args
            most, until = settings_of(settings, self.max_new_tokens)
            cache, asked = self._cross(question, to_pictures, document, task, split)
            answers.append(self.carried.say(cache, asked, most=most, until=until))
        self._report()
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-likelihoods of given answers."""
        answers = []
        for request in requests:
            question, to_answer, to_pictures, document, task, split = request.args
            row = self.task_dict[task][split][document]
            answer = to_answer if isinstance(to_answer, str) else to_answer(row)
            ids = self.carried.vlm.tokenizer(answer, add_special_tokens=False)["input_ids"]
            cache, asked = self._cross(question, to_pictures, document, task, split)
            answers.append(self.carried.likelihood(cache, ids, asked))
        self._report()
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: each round would need the cache of those before."""
        raise InputError("kvferry's wrapper answers one question a picture; choose a task of one round")

    def _cross(self, question: str, to_pictures: Any, document: Any, task: str, split: str) -> Any:
        shown = to_pictures(self.task_dict[task][split][document]) if to_pictures is not None else []
        pictures = [x for x in shown or [] if x is not None]
        if not all(isinstance(x, Image.Image) for x in pictures):
            raise InputError(f"{task} shows something else than pictures, which kvferry's wrapper does not read")
        return self.carried.scene(pictures, question.replace("<image>", "").strip())

    def _report(self) -> None:
        """Bytes, in the log; lmms-eval has no place for them among its results."""
        from loguru import logger

        tally, recipe = self.carried.tally, self.carried.recipe
        logger.warning(f"kvferry: {tally.prompts} prompts crossed as {recipe}, {tally.bytes:,} bytes in all")
        logger.warning(f"kvferry: {tally.ratio:.1f} times smaller than the full caches in BF16")
