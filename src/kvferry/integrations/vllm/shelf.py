"""A folder of caches and visual embeddings that edges fill and vLLM reads, by what they are of.

A file's name is a digest of the model and of the prompt (its token ids and its pictures) or the picture. Pictures go by
vLLM's identifiers: the ``uuid`` that a request gives them, or vLLM's own hash. Nothing in a file is trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.bitstream import Header, Reader
from kvferry.bitstream.records import CHECKSUM, crc32c, parse
from kvferry.codecs import Codec, codec_text
from kvferry.errors import CorruptError, FingerprintError, InputError, UnsupportedModelError
from kvferry.files import write_whole
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VisualEmbeds

MAGIC = b"KVFE\x01"


@dataclass(frozen=True)
class CacheShelf:
    """Bitstreams of whole caches, one for each prompt.

    Parameters
    ----------
    folder : Path
    fingerprint : str
        Of the model, as ``kvferry.load(...).fingerprint`` says.
    """

    folder: Path
    fingerprint: str

    def path(self, token_ids: Sequence[int], pictures: Sequence[str] = ()) -> Path:
        """Where the cache of a prompt lies, whether or not it does."""
        facts = [self.fingerprint, list(map(int, token_ids)), list(pictures)]
        return self.folder / f"{_digest(facts)}.kvf"

    def put(self, stream: bytes, pictures: Sequence[str] = ()) -> Path:
        """Store a bitstream under its own prompt; returns where.

        Raises
        ------
        FingerprintError, UnsupportedModelError, CorruptError
            vLLM could not take it: it is of another model, lacks tokens, or is broken.
        """
        header = self._checked(stream)
        path = self.path(header.layout.token_ids.tolist(), pictures)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, stream)
        return path

    def length(self, token_ids: Sequence[int], pictures: Sequence[str] = ()) -> int:
        """How many tokens of a prompt are there: 0 where none are. Decodes no numbers.

        Raises
        ------
        FingerprintError, UnsupportedModelError, CorruptError
            As :meth:`put`; the message names the file.
        """
        path = self.path(token_ids, pictures)
        try:
            stream = path.read_bytes()
        except FileNotFoundError:
            return 0
        return self._checked(stream, token_ids, path.name).length

    def get(self, token_ids: Sequence[int], pictures: Sequence[str] = ()) -> KVCache:
        """The cache of a prompt, in bfloat16; FileNotFoundError, or as :meth:`length`."""
        path = self.path(token_ids, pictures)
        stream = path.read_bytes()
        self._checked(stream, token_ids, path.name)
        reader = Reader()
        reader.feed(stream)
        return reader.cache()

    def _checked(self, stream: bytes, token_ids: Sequence[int] | None = None, name: str = "the stream") -> Header:
        reader = Reader(decode=False)
        reader.feed(stream)
        header = reader.header
        if header is None or not reader.complete:
            raise CorruptError(f"{name} ends before its trailer; have it written again")
        if header.fingerprint != self.fingerprint:
            raise FingerprintError(
                f"{name} is of the model {header.fingerprint[:12]}, this one is {self.fingerprint[:12]}; compress with "
                "the model that vLLM serves"
            )
        if any(len(row) != header.length for rows in reader.positions() for row in rows):
            raise UnsupportedModelError(
                f"{name} ({header.recipe}) lacks tokens, and vLLM counts positions by the slots of its cache: it "
                "cannot hold them; compress with a recipe that keeps all, as full|int4, or ask a kvferry cloud"
            )
        if token_ids is not None and header.layout.token_ids.tolist() != list(token_ids):
            raise CorruptError(f"{name} is of another prompt than its name says; remove it")
        return header


@dataclass(frozen=True)
class EmbedsShelf:
    """Visual embeddings, one file for each picture, as mode ``embeds`` ships them.

    Parameters
    ----------
    folder : Path
    fingerprint : str
        Of the vision tower, as ``kvferry.load(...).vision_fingerprint`` says.
    hidden, merge_size : int
        Of the model: channels of an embedding, and patches that a token spans each way.
    """

    folder: Path
    fingerprint: str
    hidden: int
    merge_size: int

    def path(self, identifier: str) -> Path:
        """Where a picture's embeddings lie, whether or not they do."""
        return self.folder / f"{_digest([self.fingerprint, identifier])}.kve"

    def put(self, identifier: str, picture: VisualEmbeds, codec: Codec) -> Path:
        """Store what ``VLM.look`` gave for a picture; returns where.

        Raises
        ------
        InputError
            The embeddings do not fit their grid or the model, or are not finite.
        RecipeError
            Mode ``embeds`` has no such codec.
        """
        from kvferry.models.embeds import check_shape
        from kvferry.modes.embeds import SIZE, EmbedsMode, pack_embeds

        check_shape(picture, self.hidden, self.merge_size)
        recipe = codec_text(EmbedsMode(codec).codec)
        start = pb.AskRequest.Start(mode=pb.MODE_EMBEDS, fingerprint=self.fingerprint, recipe=recipe)
        said = start.SerializeToString()
        self.folder.mkdir(parents=True, exist_ok=True)
        head = MAGIC + SIZE.pack(len(said)) + said + CHECKSUM.pack(crc32c(said))
        write_whole(self.path(identifier), head + pack_embeds(picture, codec))
        return self.path(identifier)

    def get(self, identifier: str) -> VisualEmbeds | None:
        """A picture's embeddings in bfloat16; None where there are none.

        Raises
        ------
        CorruptError, TruncatedError, FingerprintError, InputError
            The file is broken, of another vision tower, or of another width; the message names it.
        """
        from kvferry.modes.embeds import SIZE, EmbedsMode, unpack_embeds

        path = self.path(identifier)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        at = len(MAGIC) + SIZE.size
        end = at + (SIZE.unpack_from(data, len(MAGIC))[0] if len(data) >= at else 0)
        said = data[at:end]
        if not data.startswith(MAGIC) or data[end : end + CHECKSUM.size] != CHECKSUM.pack(crc32c(said)):
            raise CorruptError(f"{path.name} is damaged or holds no visual embeddings; have it written again")
        start = parse(pb.AskRequest.Start, said)
        if start.fingerprint != self.fingerprint:
            raise FingerprintError(
                f"{path.name} comes from the vision tower {start.fingerprint[:12]}, this one is "
                f"{self.fingerprint[:12]}; look at pictures with the vision tower that vLLM serves"
            )
        codec = EmbedsMode.parse(start.recipe).codec
        return unpack_embeds(data[end + CHECKSUM.size :], codec, self.hidden, self.merge_size)


def needed(extra: object, name: str) -> str:
    """An option of a connector's extra config that must be there; InputError."""
    value = extra.get(name) if isinstance(extra, dict) else None
    if not isinstance(value, str) or not value:
        raise InputError(f"the connector's extra config needs {name!r}, a text; docs/vllm.md has the whole line")
    return value


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
