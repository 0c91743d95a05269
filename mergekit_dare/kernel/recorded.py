"""The formula as one call of torch, which does not hold the interpreter's lock.

Each single call of torch gives the interpreter's lock away and asks for it again, so that threads
wait for one another between them, the more so the shorter they are. Here, ``torch.jit`` records the
calls of :func:`mergekit_dare.kernel.formula.merge_chunk` once, and torch's own interpreter repeats
them, block by block. They are the same calls, hence the same bits; and a block may be so small that
much of it stays in the cache beside a core. What comes out first is compared with what comes out
without it. Where anything fails, the formula runs as without.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_dare.kernel import guard, threads
from mergekit_dare.kernel.buffers import Buffers, chunk_size
from mergekit_dare.kernel.formula import Numbers, Steps, merge_chunk
from mergekit_dare.kernel.guard import MergeChunk
from mergekit_dare.kernel.masks import LANE_VALUES, largest_lane, state_before
from mergekit_dare.kernel.packages import Case
from mergekit_dare.kernel.per_process import PerProcess

# Elements in a block, a multiple of 4; its buffers take 2.6 MB in each thread. With half as many, a
# processor whose calls take long takes a fifth more, others as much; twice as many gain nothing.
BLOCK = 1 << 16
# Elements of the smallest tensors that they are for, enough for the comparison to be of several
# blocks and a rest: with fewer, Python is nearly as fast.
LEAST = 3 * BLOCK
# It takes 10 ms and more to record, for each model a part of that.
MOST_MODELS = 32

_CPU = torch.device("cpu")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """What a recording is made for; all other numbers of the formula are its inputs.

    Attributes:
        case: Steps and dtypes.
        keeps_all: Whether T is 65536 for every model, so that there is nothing to draw.

    """

    case: Case
    keeps_all: bool


@dataclass(eq=False)
class _Recording:
    """Merges chunks of one kind.

    Attributes:
        steps: What is done.
        merge_block: Merges a block; takes vectors, scratch space and numbers, and returns what
            formula.merge_chunk does.
        merge_blocks: Merges blocks of one size; takes this size, too, and what the states grow by.
        is_proven: Whether it gave the same as the formula.
        has_failed: Whether it is not to be used any more.

    """

    steps: Steps
    merge_block: Callable[..., Tensor]
    merge_blocks: Callable[..., Tensor]
    is_proven: bool = False
    has_failed: bool = False

    def merge_chunk(self, chunk: Sequence[Tensor], numbers: Numbers) -> float | None:
        """Merge a chunk of any size, as a :data:`MergeChunk`."""
        elements = chunk[0].numel()
        whole = elements // BLOCK * BLOCK
        if self.has_failed:  # meanwhile
            return None
        try:
            if not 0 < whole < elements:
                return self._merge(list(chunk), numbers)
            norm = self._merge([vector[:whole] for vector in chunk], numbers)
            states = [state_before(state, whole) for state in numbers.states]
            rest = self._merge(
                [vector[whole:] for vector in chunk], numbers._replace(states=states)
            )
            return norm + rest  # a bound of either
        except Exception as error:  # whatever it is, the merge must go on
            self.give_up(error)
            return None

    def _merge(self, vectors: list[Tensor], numbers: Numbers) -> float:
        """Merge one block or a part of it, or several whole ones."""
        elements = vectors[0].numel()
        with Buffers.lent(_CPU, self.steps.dtype, BLOCK) as b:
            inputs = (vectors, b.first(elements).tensors(), *_inputs(numbers, self.steps))
            if elements <= BLOCK:
                return float(self.merge_block(*inputs))
            return float(self.merge_blocks(*inputs, BLOCK, state_before(0, BLOCK)))

    def give_up(self, error: Exception) -> None:
        """Let the formula run without it from now on."""
        if not self.has_failed:  # of several reasons, the first is the one
            reason = guard.reason_of(error)
            LOG.info("merging without a recording, which takes longer: %s", reason)
        self.has_failed = True


_RECORDINGS: PerProcess[_Kind, _Recording] = PerProcess()


def suits(vectors: Sequence[Tensor], steps: Steps) -> bool:
    """Tell whether recordings are for a merge of theta_0 and each theta_k."""
    return (
        vectors[0].numel() >= LEAST
        and len(vectors) <= MOST_MODELS + 1
        and all(type(vector) is Tensor and vector.device == _CPU for vector in vectors)
        and not steps.equal_infinities
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def merge_function(
    vectors: Sequence[Tensor], steps: Steps, numbers: Callable[[int], Numbers]
) -> MergeChunk | None:
    """Return what merges the chunks of a tensor by a recording, if one can.

    Args:
        vectors: theta_0, and each theta_k.
        steps: What is done.
        numbers: Returns the formula's numbers of the chunk that begins with an element.

    """
    if not suits(vectors, steps):
        return None
    first = numbers(0)
    kind = _Kind(Case.of(vectors, steps), all(t >= LANE_VALUES for t in first.thresholds))
    with _RECORDINGS.lock:
        recording = _RECORDINGS.get(kind)
        if recording is None:
            recording = _RECORDINGS[kind] = _record(kind)
        if not (recording.is_proven or recording.has_failed):
            _prove(recording, vectors, first)
    usable = recording.is_proven and not recording.has_failed
    return recording.merge_chunk if usable else None


def _prove(recording: _Recording, vectors: Sequence[Tensor], numbers: Numbers) -> None:
    """Compare what comes out with what the formula gives, unless that is not finite."""
    # Thrice, since torch's interpreter looks for simplifications when it has seen an input.
    size = min(3 * BLOCK - 5, vectors[0].numel(), chunk_size(_CPU))
    some = [vector[:size] for vector in vectors]
    try:
        same = guard.gives_the_same(
            recording.merge_chunk, some, numbers, recording.steps, [size] * 3
        )
    except Exception as error:  # whatever it is, the merge must go on
        recording.give_up(error)
        return
    if same is False:
        recording.give_up(RuntimeError("it gives other results here"))
    recording.is_proven = bool(same)


def _record(kind: _Kind) -> _Recording:
    recording = _Recording(kind.case.steps, _nothing, _nothing)
    try:
        recording.merge_block, recording.merge_blocks = _functions(kind)
    except Exception as error:  # whatever it is, the merge must go on
        recording.give_up(error)
    return recording


def _nothing(*inputs: Any) -> Tensor:
    raise RuntimeError("there is no recording")


@threads.single()
def _functions(kind: _Kind) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return merge_block and merge_blocks of a recording."""
    case, models = kind.case, len(kind.case.models)
    dtypes = (case.base, case.base, *case.models)
    vectors = [torch.zeros(BLOCK, dtype=dtype, device=_CPU) for dtype in dtypes]
    scratch = Buffers.allocate(BLOCK, _CPU, case.steps.dtype).tensors()
    ones = [1.0] * models
    numbers = Numbers([1] * (models + 1), [1] * models, ones, ones, ones, 1.0)
    example = (vectors, scratch, *_inputs(numbers, case.steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        block = torch.jit.trace(_merge_block(kind), example, check_trace=False)
        blocks = torch.jit.script(_loop(block))
    if not isinstance(blocks, torch.jit.ScriptFunction):
        raise RuntimeError("PYTORCH_JIT=0 switches torch.jit off")
    return block, blocks


def _merge_block(kind: _Kind) -> Callable[..., Tensor]:
    """Return the formula as a function of tensors alone."""
    models, steps = len(kind.case.models), kind.case.steps

    def merge_block(
        vectors: list[Tensor],
        scratch: list[Tensor],
        states: Tensor,
        thresholds: Tensor,
        floats: Tensor,
    ) -> Tensor:
        out, theta_0, *thetas = vectors
        # Sequences of tensors are for them what a tensor with all of them would be.
        ts: Any = [LANE_VALUES] * models if kind.keeps_all else thresholds.unbind()
        number: Any = floats.unbind()
        scales, factors, weights = (number[k * models : (k + 1) * models] for k in range(3))
        each_state: Any = states.unbind()
        numbers = Numbers(each_state, ts, scales, factors, weights, number[-1])
        return merge_chunk(out, theta_0, thetas, numbers, steps, Buffers.of_tensors(scratch))

    return merge_block


def _loop(merge_block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what torch's interpreter runs to merge several blocks."""

    def merge_blocks(
        vectors: list[Tensor],
        scratch: list[Tensor],
        states: Tensor,
        thresholds: Tensor,
        floats: Tensor,
        size: int,
        step: int,
    ) -> Tensor:
        norms: list[Tensor] = []
        for start in range(0, vectors[0].numel(), size):
            block = [vector.narrow(0, start, size) for vector in vectors]
            norms.append(merge_block(block, scratch, states, thresholds, floats))
            states = states + step
        return torch.stack(norms).max()

    return merge_blocks


def _inputs(numbers: Numbers, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, thresholds and all other numbers, as a recording takes them."""
    states, thresholds, dtype = numbers.states, numbers.thresholds, torch.int64
    if not steps.by_magnitude:
        thresholds, dtype = [largest_lane(t) for t in thresholds], torch.int16
    _, floats = numbers.as_lists()
    return (
        torch.tensor(states, dtype=torch.int64, device=_CPU),
        torch.tensor(thresholds, dtype=dtype, device=_CPU),
        torch.tensor(floats, dtype=steps.dtype, device=_CPU),
    )
