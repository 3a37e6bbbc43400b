"""The random number generators from which a sampler draws an epoch's order, kept to draw the same order again.

A sampler draws from torch's global generator or from one of its own. To go on in the middle of an epoch it must draw
the same again, so a state has the generators as they were when the epoch began. Mostly less is enough: torch's
``RandomSampler`` takes only a seed from the global generator, others take nothing.

The *next* epoch draws from the generators as they are. The state of its beginning has what the epoch would draw, and a
digest of the global generator. If the digest is the same when the state is loaded, because the program has gone on or
has restored the generator, the epoch draws anew. Otherwise it draws what the state says, and leaves the global
generator alone, which is the training's.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler

from . import internals
from .generators import fork_torch_rng
from .plain_data import decode_tensor, encode_bytes, is_stateful


@dataclass
class SamplerRng:
    """The generators that a sampler may draw from, as they were at one time; the global one only if it matters."""

    of_global: torch.Tensor | None
    own: list[torch.Tensor]
    takes_seed: bool
    _plain: dict[str, Any] | None = None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> SamplerRng:
        """What ``to_plain`` gave."""
        return cls(None, [], False, {name: saved[name] for name in ("seed", "global", "own") if name in saved})

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        if self._plain is None:
            made: dict[str, Any] = {}
            if self.of_global is not None:
                if self.takes_seed:
                    made["seed"] = _draw(_generator(self.of_global))
                else:
                    made["global"] = encode_bytes(self.of_global.numpy().tobytes())
            if self.own:
                made["own"] = [encode_bytes(each.numpy().tobytes()) for each in self.own]
            self._plain = made
        return dict(self._plain)


def capture(sampler: Any, generator: Any) -> SamplerRng:
    """The generators as they are."""
    takes_seed = internals.takes_seed(sampler) is not None
    needs_global = takes_seed or _may_draw_globally(sampler)
    return SamplerRng(
        torch.get_rng_state() if needs_global else None,
        [each.get_state() for each in _own(sampler, generator)],
        takes_seed,
    )


def draws_when_iterated(sampler: Any) -> bool:
    """Whether ``iter(sampler)`` may already draw, and not only the first ``next``."""
    return type(sampler) is not BatchSampler and not inspect.isgeneratorfunction(
        getattr(type(sampler), "__iter__", None)
    )


def draws_of_next_epoch(sampler: Any, generator: Any, *, base_seed: bool) -> dict[str, Any]:
    """What an epoch that begins now would draw; ``base_seed``: whether it also draws a seed for workers."""
    state = torch.get_rng_state()
    drawn = _generator(state)
    made = capture(sampler, generator).to_plain()
    made["digest"] = _digest(state)
    if base_seed and generator is None:
        made["base_seed"] = _draw(drawn)
    if "seed" in made:
        made["seed"] = _draw(drawn)
    if "global" in made:
        made["global"] = encode_bytes(drawn.get_state().numpy().tobytes())
    return made


def is_current(draws: dict[str, Any]) -> bool:
    """Whether the global generator is as it was when ``draws_of_next_epoch`` was called."""
    return bool(draws.get("digest") == _digest(torch.get_rng_state()))


def restore_own(sampler: Any, generator: Any, draws: dict[str, Any]) -> None:
    """Give the sampler's and the loader's own generators the states that they had."""
    for each, state in zip(_own(sampler, generator), draws.get("own", ()), strict=False):
        each.set_state(decode_tensor(state))


@contextlib.contextmanager
def replaying(sampler: Any, generator: Any, draws: dict[str, Any]) -> Iterator[None]:
    """Let the sampler draw the same again in this block. Afterwards the global generator is as before."""
    restore_own(sampler, generator, draws)
    seeded = internals.takes_seed(sampler) if "seed" in draws else None
    with fork_torch_rng():
        if "global" in draws:
            torch.set_rng_state(decode_tensor(draws["global"]))
        if seeded is None:
            yield
            return
        seeded.generator = torch.Generator().manual_seed(draws["seed"])
        try:
            yield
        finally:
            seeded.generator = None


def _own(sampler: Any, generator: Any) -> list[torch.Generator]:
    found = [getattr(each, "generator", None) for each in internals.sampler_chain(sampler)]
    return [each for each in (*found, generator) if isinstance(each, torch.Generator)]


def _may_draw_globally(sampler: Any) -> bool:
    if any(map(is_stateful, internals.sampler_chain(sampler))):
        return False  # its state says what it will draw
    return not internals.draws_nothing_global(sampler)


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def _draw(generator: torch.Generator) -> int:
    """A seed, as torch's loader and its RandomSampler draw one."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _digest(state: torch.Tensor) -> str:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=8).hexdigest()
