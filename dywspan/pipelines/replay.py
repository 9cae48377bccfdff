"""Denoiser calls that need not be computed again, and a count of those that were."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..schedulers.calls import TOLD, wrapped
from .networks import denoisers

Tape = list[tuple[list[Any], list[int], Any]]  # of calls: inputs, versions of all tensors, output


class Meter:
    """Denoiser evaluations by purpose: one is one sample in one call, guidance's second sample being another.

    Attributes:
        counts: evaluations under each purpose that was current.
        purpose: what they are counted under now.
    """

    def __init__(self, pipe: Any) -> None:
        self.modules = list(denoisers(pipe).values())
        self.counts: Counter[str] = Counter()
        self.purpose = "student"

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Count within."""

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def counted(*args: Any, **kwargs: Any) -> Any:
                first = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim > 1), None)
                self.counts[self.purpose] += 1 if first is None else len(first)
                return forward(*args, **kwargs)

            return counted

        with wrapped(self.modules, wrap):
            yield self

    @contextmanager
    def counting(self, purpose: str) -> Iterator[None]:
        """Count under another purpose within."""
        own, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = own


class Replay:
    """The denoiser's outputs of one run, given back in the next while its inputs are the same, bit for bit.

    A solver's numbers at step k change nothing before it: a run with one of them moved computes the tail only, and a
    run with the last row of weights moved computes nothing.
    """

    def __init__(self, pipe: Any) -> None:
        self.modules = list(denoisers(pipe).values())
        self.tape: Tape = []
        self.position, self.mode = 0, "off"

    @contextmanager
    def installed(self) -> Iterator[Replay]:
        """Answer for the denoisers within; without :meth:`recording` or :meth:`playing`, they answer themselves."""
        with wrapped(self.modules, self._wrap):
            yield self

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Remember the calls within, on a new tape."""
        self.tape, self.mode = [], "record"
        try:
            yield self.tape
        finally:
            self.tape, self.mode = [], "off"

    @contextmanager
    def playing(self, tape: Tape) -> Iterator[None]:
        """Give back what was recorded, up to the first call whose inputs differ."""
        self.tape, self.position, self.mode = tape, 0, "play"
        try:
            yield
        finally:
            self.tape, self.mode = [], "off"

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "off":
                return forward(*args, **kwargs)
            told = TOLD.get()
            inputs = tree_leaves((args, kwargs)) + ([] if told is None else [*told.values])
            if self.mode == "record":
                output = forward(*args, **kwargs)
                self.tape.append((inputs, _versions([*inputs, *tree_leaves(output)]), output))
                return output
            if self.position < len(self.tape):
                known, versions, output = self.tape[self.position]
                # A tensor changed in place since is not what was recorded.
                if versions == _versions([*known, *tree_leaves(output)]) and _same(inputs, known):
                    self.position += 1
                    return output
            self.position = len(self.tape)
            return forward(*args, **kwargs)

        return call


class Memo:
    """The denoiser's outputs, given back whenever the same is asked again, bit for bit: solvers that begin alike share
    their beginnings.

    Attributes:
        computed, remembered: samples that the network was asked for, guidance's second being another, and that it was
            not.
        active: whether it remembers; without it, it only counts.
    """

    def __init__(self, pipe: Any, tell: Callable[[int], None] = lambda samples: None, most: int = 2**30) -> None:
        """
        Args:
            tell: gets how many samples were computed, call by call.
            most: bytes of outputs to keep; the oldest go first.
        """
        self.modules, self.tell, self.most = list(denoisers(pipe).values()), tell, most
        self.computed = self.remembered = self.size = 0
        self.active = True
        self.known: dict[bytes, tuple[Any, list[int]]] = {}

    @contextmanager
    def installed(self) -> Iterator[Memo]:
        """Answer for the denoisers within."""
        with wrapped(self.modules, self._wrap):
            yield self

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            count = next((len(v) for v in leaves if isinstance(v, Tensor) and v.ndim > 1), 1)
            key = _digest(leaves) if self.active and all(isinstance(leaf, _PLAIN) for leaf in leaves) else None
            output, versions = self.known.get(key, (None, [])) if key else (None, [])
            if output is not None and versions == _versions(tree_leaves(output)):  # and not changed in place since
                self.remembered += count
                return output
            output = forward(*args, **kwargs)
            self.computed += count
            if key:
                self._keep(key, output)
            self.tell(count)
            return output

        return call

    def _keep(self, key: bytes, output: Any) -> None:
        self.known[key] = output, _versions(tree_leaves(output))
        self.size += _bytes(output)
        while self.size > self.most and len(self.known) > 1:
            oldest, _ = self.known.pop(next(iter(self.known)))
            self.size -= _bytes(oldest)


# What a digest holds all of; an object may change between two calls.
_PLAIN = (Tensor, str, int, float, complex, type(None), torch.dtype, torch.device)


def _digest(leaves: list[Any]) -> bytes:
    """Of what a denoiser is given."""
    made = hashlib.blake2b(digest_size=16)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            own = leaf.detach().cpu().contiguous()
            made.update(f"{own.dtype} {tuple(own.shape)}".encode())
            made.update(own.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(leaf).encode())
    return made.digest()


def _bytes(output: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y or (torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else _equal(x, y))
        for x, y in zip(a, b)
    )


def _equal(x: Any, y: Any) -> bool:
    return not isinstance(x, Tensor) and not isinstance(y, Tensor) and type(x) is type(y) and bool(x == y)
