"""The cloud's half of a chat request: its prompt, from messages or from a compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.cloud.door.request import Chat
from kvferry.cloud.sessions import SessionShelf
from kvferry.modes import receiver_of
from kvferry.modes.checks import check_count
from kvferry.modes.files import identified, memory_of
from kvferry.modes.receiver import ModeReceiver, NeedsAll
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.models.steps import Pace, Steps

PIECE = 64 * 1024


class ChatReceiver(NeedsAll):
    """Reads messages, or goes on from a cache. ``prompt_tokens`` is how many the answer was made from."""

    def __init__(self, vlm: VLM, chat: Chat, store: SessionShelf, max_bytes: int) -> None:
        self.prompt_tokens = 0
        self._vlm = vlm
        self._chat = chat
        self._store = store
        self._cached: ModeReceiver | None = None
        if chat.cache is not None:
            start = pb.AskRequest.Start(mode=pb.MODE_KV, question=chat.question or "", recipe="full|bf16")
            start.fingerprint, start.max_new_tokens = vlm.fingerprint, chat.max_tokens
            cached = receiver_of(vlm, start, store, max_bytes)
            assert isinstance(cached, ModeReceiver)
            self._cached = cached

    def feed(self, data: bytes) -> None:
        """The request brings everything at once."""

    def finish(self) -> None:
        """Look at the cache, or at all pictures' headers before the first is decoded."""
        if self._cached is not None and self._chat.cache is not None:
            for at in range(0, len(self._chat.cache), PIECE):
                self._cached.feed(self._chat.cache[at : at + PIECE])
            self._cached.finish()
            return
        assert self._chat.messages is not None
        files = self._chat.messages.images
        check_count(len(files))
        self._store.reserve(memory_of(identified(files), self._vlm.visual_tokens, self._vlm.reduced))
        pictures = []
        for file in files:
            self._store.reserve(0)
            pictures.append(self._store.open_picture(file, self._vlm.reduced))
        self._messages = self._chat.messages.with_images(pictures)

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        """See :class:`ModeReceiver`."""
        from kvferry.models.steps import reading

        if self._cached is not None:
            cache, question = yield from self._cached.grounding(pace)
        elif self._messages.single:
            cache = yield from reading(self._vlm, self._messages.images, self._messages.question, pace)
            question = None
        else:
            cache, question = (yield from reading(self._vlm, (), None, pace, self._messages)), None
        self.prompt_tokens = cache.length + len(self._vlm.feed(cache, question)[0])
        return cache, question
