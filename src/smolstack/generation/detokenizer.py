"""Incremental detokenization: emits no incomplete characters and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smolstack.generation.stopping import find_stop, held_back

_INCOMPLETE = "\ufffd"  # decoders' replacement for incomplete characters
_CONTEXT = 8  # preceding tokens decoded again: decoding may depend on them
_LONGEST_CHARACTER = 8  # tokens; a longer undecodable ending is emitted


class Detokenizer:
    """The text of one answer, extended token by token.

    Args:
        decode: token ids → text without special tokens.
        stops: stop strings; the text ends before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._text = ""  # all complete characters so far
        self._settled = 0  # tokens whose text is in _text
        self._shown = 0  # characters emitted

    def push(self, token: int) -> str:
        """Add a token; return the characters that became final."""
        self.ids.append(token)
        grown = self._decode_new()
        waiting = len(self.ids) - self._settled
        if not grown or (grown.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER):
            return ""
        return self._accept(grown)

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        if self.stopped:
            return ""
        piece = self._accept(self._decode_new())
        rest = "" if self.stopped else self._text[self._shown :]
        self._shown += len(rest)
        return piece + rest

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return self._text[: self._shown]

    def _decode_new(self) -> str:
        """Return the text of the tokens that are not settled, decoded after their predecessors."""
        start = max(0, self._settled - _CONTEXT)
        before = self.decode(self.ids[start : self._settled])
        both = self.decode(self.ids[start:])
        return both[len(before) :]

    def _accept(self, grown: str) -> str:
        search_from = max(0, len(self._text) - max((len(s) for s in self.stops), default=0))
        self._text += grown
        self._settled = len(self.ids)
        place = find_stop(self._text, self.stops, search_from) if self.stops else None
        if place is not None:
            self.stopped = True
            self._text = self._text[:place]
            certain = place
        else:
            certain = len(self._text) - (held_back(self._text, self.stops) if self.stops else 0)
        piece = self._text[self._shown : certain]
        self._shown = max(self._shown, certain)
        return piece
