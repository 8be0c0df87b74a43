"""Text tokenizer: sentencepiece BPE with byte fallback, trained in this process, exact on every Unicode text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol

import sentencepiece

from .errors import DataError
from .files import fingerprint, write_atomic

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # sentencepiece's visible space


class Tokenizer(Protocol):
    """Text to local ids 0..vocab_size-1 and back. Attributes: file, the name that `save`'s file has in a data set."""

    file: ClassVar[str]
    vocab_size: int

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, path: str | Path) -> None: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A sentencepiece model, or Hugging Face's tokenizer.json (by its ending); DataError when it is neither."""
    return HubTokenizer.load(path) if str(path).endswith(".json") else TextTokenizer.load(path)


class TextTokenizer:
    """A sentencepiece model with local ids 0..vocab_size-1 and `decode(encode(s)) == s` for every text.

    Two things keep that promise. A literal U+2581 would come back as a space, so it is written in byte pieces. And
    decoding joins the *bytes* of the pieces, so that a newline (a byte piece) or a character spelt in bytes is
    restored; bytes that are no UTF-8, as a half-trained model may emit, become U+FFFD.

    Args:
        model: a serialised sentencepiece model with byte fallback.

    Raises:
        DataError: `model` is no sentencepiece model, or has no byte fallback.
    """

    file: ClassVar[str] = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise DataError("not a sentencepiece model") from error
        self.vocab_size: int = self._processor.get_piece_size()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        self._bytes: list[bytes] = []
        self._byte_id: dict[int, int] = {}
        for i, piece in enumerate(pieces):
            match = _BYTE_PIECE.fullmatch(piece) if self._processor.is_byte(i) else None
            if match:
                value = int(match.group(1), 16)
                self._byte_id[value] = i
                self._bytes.append(bytes([value]))
            elif self._processor.is_unknown(i) or self._processor.is_control(i):
                self._bytes.append("\ufffd".encode())
            else:
                self._bytes.append(piece.replace(_SPACE, " ").encode())
        if len(self._byte_id) != 256:
            raise DataError(f"the tokenizer has {len(self._byte_id)} of 256 byte pieces; train it with byte fallback")
        self._pieces = pieces

    @classmethod
    def train(cls, sentences: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Trains BPE on one thread (the thread count would be part of the model) in well under a second per MB.

        Args:
            sentences: texts without newlines (sentencepiece trains on lines).
            vocab_size: upper bound of the number of pieces; a small corpus may yield fewer.

        Raises:
            DataError: vocab_size has no room for the 256 bytes, or the corpus is too small for it.
        """
        if vocab_size < 300:
            raise DataError(f"text vocabulary of {vocab_size}: at least 300 is needed (256 of them are bytes)")
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=writer,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                num_threads=1,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=True,
                max_sentence_length=1 << 20,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise DataError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
        return cls(writer.getvalue())

    def encode(self, text: str) -> list[int]:
        """Local ids of `text`, empty for the empty text; DataError for lone surrogates, which UTF-8 cannot hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text holds a lone surrogate at character {error.start}: not valid Unicode") from error
        ids: list[int] = []
        for n, part in enumerate(text.split(_SPACE)):
            if n:
                ids.extend(self._byte_id[value] for value in _SPACE.encode())
            ids.extend(self._processor.encode(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of local ids; DataError for an id outside 0..vocab_size-1."""
        values = [int(i) for i in ids]
        for i in values:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"text id {i} is outside 0..{self.vocab_size - 1}")
        return b"".join(self._bytes[i] for i in values).decode("utf-8", errors="replace")

    def starts_word(self, local_id: int) -> bool:
        """Whether the piece begins with a space or is a newline: a place where a long text may be cut."""
        return self._bytes[local_id][:1] in (b" ", b"\n")

    @property
    def fingerprint(self) -> str:
        """Hash of pieces, scores and normaliser; not of the file, which also holds training settings."""
        scores = [float(self._processor.get_score(i)).hex() for i in range(self.vocab_size)]
        table = "\n".join(f"{piece}\t{score}" for piece, score in zip(self._pieces, scores, strict=True))
        return fingerprint(b"bpe-1", table.encode(), b"identity, byte fallback, spaces kept, no dummy prefix")

    def save(self, path: str | Path) -> None:
        """Writes the sentencepiece model (any sentencepiece tool reads it), atomically."""
        write_atomic(Path(path), self._model)

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Reads `save`'s file; DataError when it is missing or no such model."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


class HubTokenizer:
    """Hugging Face's `tokenizer.json`, read by the library `tokenizers`; special tokens are not added.

    Args:
        content: the file.

    Raises:
        DataError: the library is missing, or the content is no such file.
    """

    file: ClassVar[str] = "tokenizer.json"

    def __init__(self, content: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise DataError("reading a tokenizer.json needs: pip install polylepis[hf]") from error
        try:
            self._library = Library.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"not a tokenizer.json ({' '.join(str(error).split())})") from error
        self._content = content
        self._library.no_truncation()
        self._library.no_padding()
        # Ids may have gaps; the range of the vocabulary must hold the highest.
        self.vocab_size: int = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Local ids of `text`; DataError for lone surrogates."""
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"text is not valid Unicode ({error})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of local ids, as far as this tokenizer keeps it; DataError for an id outside 0..vocab_size-1."""
        values = [int(i) for i in ids]
        if values and not 0 <= min(values) <= max(values) < self.vocab_size:
            raise DataError(f"text ids must lie in 0..{self.vocab_size - 1}, got {min(values)}..{max(values)}")
        return self._library.decode(values, skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the file's bytes."""
        return fingerprint(b"tokenizer-json-1", self._content.encode())

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json as it was read, atomically."""
        write_atomic(Path(path), self._content.encode())

    @classmethod
    def load(cls, path: str | Path) -> HubTokenizer:
        """Reads a tokenizer.json; DataError when it is missing or no such file."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the tokenizer {path}: {error}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
