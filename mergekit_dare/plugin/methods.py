"""DARE-linear and DARE-TIES as mergekit merge methods.

The only module of the merge path that knows mergekit: it declares the parameters, checks their
values while mergekit plans the merge, and hands plain tensors to ``mergekit_dare.kernel.merging``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_dare import __version__
from mergekit_dare.kernel import derivatives
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from mergekit_dare.plugin import quantization, registration

# The parameters whose value is one of a few words.
WORDS: dict[str, type[Enum]] = {"sampling": Sampling, "rounding": Rounding}
PAPER_URL = "https://arxiv.org/abs/2311.03099"

# Called for each merged tensor with the base's tensor, the fine-tuned models and its name.
Observer = Callable[[torch.Tensor, Sequence[FineTuned], str], None]
_OBSERVERS: list[Observer] = []


def observe(look: Observer) -> None:
    """Call ``look`` after each merge of a tensor, except in torch.func's transforms.

    Adding it a second time has no effect.
    """
    if look not in _OBSERVERS:
        _OBSERVERS.append(look)


# Values that were found to be valid, by parameter, type and value: mergekit's functions for Python
# validate them for each tensor again, which takes longer than merging a small one.
_VALID: dict[tuple[str, type, Any], Any] = {}
_MOST_VALID = 1 << 12


@dataclass(frozen=True)
class DareParameter(ParameterSpec):
    """A parameter whose values are checked while mergekit plans, before any weight is merged."""

    def validate(self, value: Any) -> Any:
        """Return ``value`` converted to the parameter's type.

        Raises:
            ValueError: one sentence with the parameter, the model and the tensor, as far as
                they are known, the value, and what is allowed.

        """
        known = self.name, type(value), value
        try:
            return _VALID[known]
        except (KeyError, TypeError):  # not seen before, or not hashable, such as a list
            pass
        try:
            converted = super().validate(value)
        except ValueError:  # pydantic's spans several lines
            converted = None
        problem = _problem(self.name, value, converted)
        if problem is not None:
            planned_for = _planned_for(per_model=self.scope == ParameterScope.NON_BASE)
            raise ValueError(f"{self.name}{planned_for} is {value!r}, but {problem}")
        if len(_VALID) < _MOST_VALID:
            _VALID[known] = converted
        return converted


def _problem(name: str, value: Any, converted: Any) -> str | None:
    """Say what is wrong with a parameter's value, or return ``None``."""
    if name in WORDS:
        words = [word.value for word in WORDS[name]]
        if value in words:
            return None
        near = difflib.get_close_matches(str(value), words, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"must be {' or '.join(words)}{hint}"
    if name == "seed":
        if value is None or (type(converted) is int and type(value) is not bool):
            return None
        return "must be an integer; leave it out to use --random-seed"
    if converted is None:
        kind = "true or false" if name in ("int8_mask", "normalize", "rescale") else "a number"
        return f"must be {kind}"
    if name == "density" and not 0 <= converted <= 1:
        percentage = 2 <= converted <= 100
        hint = f"; did you mean {float(f'{converted / 100:g}')}?" if percentage else ""
        return f"must be from 0 to 1: it is the fraction of the deltas to keep{hint}"
    if name in ("weight", "lambda") and not math.isfinite(converted):
        return "must be a finite number"
    return None


def _planned_for(per_model: bool) -> str:
    """Return `` of model M for tensor T`` for the value that mergekit is currently resolving.

    mergekit passes a parameter only the value, but its callers know the rest. Their frames are
    read only here, to word an error.
    """
    model = tensor = None
    frame = inspect.currentframe()
    while frame is not None and (tensor is None or (per_model and model is None)):
        if frame.f_globals.get("__name__", "").startswith("mergekit."):
            names = frame.f_locals
            model = names.get("model", names.get("key")) if model is None else model
            if tensor is None:
                metadata = getattr(names.get("group"), "metadata", None)
                tensor = names.get("tensor_name") or getattr(metadata, "name", None)
        frame = frame.f_back
    of_model = f" of model {model}" if per_model and model is not None else ""
    return of_model + (f" for tensor {tensor}" if tensor is not None else "")


class DareMethod(GroupMergeMethod):
    """DARE (arXiv 2311.03099, section 3) with one way to combine the models' deltas."""

    def __init__(self, name: str, pretty_name: str, combine: Combine) -> None:
        self.combine = combine
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=f"{pretty_name} (mergekit-dare {__version__})",
            reference_url=PAPER_URL,
            parameters=(
                DareParameter("weight", float, ParameterScope.NON_BASE),
                DareParameter("density", float, ParameterScope.NON_BASE, default=1.0),
                DareParameter("normalize", bool, ParameterScope.SHARED, default=False),
                DareParameter("rescale", bool, ParameterScope.SHARED, default=True),
                DareParameter("lambda", float, ParameterScope.SHARED, default=1.0),
                DareParameter("seed", int | None, ParameterScope.SHARED, default=None),
                DareParameter("sampling", str, ParameterScope.SHARED, default="uniform"),
                DareParameter("rounding", str, ParameterScope.SHARED, default="nearest"),
                # For old configs: mergekit's own masks are tensors, ours are never stored.
                DareParameter("int8_mask", bool, ParameterScope.SHARED, default=False),
            ),
            contract=InputContract(base=BasePolicy.REQUIRED),
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the models that go into one tensor.

        Raises:
            ValueError: there is no base model, or a model is listed twice or quantized.

        """
        if base_id is None:
            where = f" for {group_name}" if group_name else ""
            raise ValueError(
                f"{self.spec.name} needs base_model{where}: the model that all the others "
                "were fine-tuned from"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        quantization.refuse(input_ids)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor of the base and the fine-tuned models.

        Args:
            group: One entry for the base and one for each fine-tuned model, of one shape.
            parameters: Every parameter of :attr:`spec`; weight and density by model.

        Returns:
            A tensor of the base tensor's shape and dtype, with gradients if an input has them.

        Raises:
            ValueError: see :func:`mergekit_dare.kernel.merging.merge`.

        """
        if torch.compiler.is_compiling():  # our caller
            return _merge_uncompiled()(self, group, parameters)
        return self._merge(group, parameters)

    def _merge(self, group: TensorGroup, parameters: Mapping[str, Any]) -> torch.Tensor:
        assert group.base is not None  # the contract requires one
        weights: Mapping[Hashable, float] = parameters["weight"]
        densities: Mapping[Hashable, float] = parameters["density"]
        models = [
            FineTuned(str(entry.id), entry.tensor, weights[entry.id], densities[entry.id])
            for entry in group.non_base
        ]
        recipe = self.recipe(group.metadata.name or "", parameters)
        merged = derivatives.merge(group.base.tensor, models, recipe)
        if derivatives.is_plain(group.base.tensor):
            for look in _OBSERVERS:
                look(group.base.tensor, models, recipe.tensor_name)
        return merged

    def recipe(self, tensor_name: str, parameters: Mapping[str, Any]) -> Recipe:
        """Return what the shared parameters ask for.

        Args:
            tensor_name: The output tensor's name.
            parameters: Every shared parameter of :attr:`spec`.

        """
        seed: int | None = parameters["seed"]
        return Recipe(
            combine=self.combine,
            tensor_name=tensor_name,
            seed=_seed_of_torch() if seed is None else seed,
            normalize=parameters["normalize"],
            rescale=parameters["rescale"],
            lambda_=parameters["lambda"],
            sampling=Sampling(parameters["sampling"]),
            rounding=Rounding(parameters["rounding"]),
        )


@cache
def _merge_uncompiled() -> Callable[..., torch.Tensor]:
    """Return :meth:`DareMethod._merge` exempt from compilation; this imports torch's compiler."""
    merge: Callable[..., torch.Tensor] = torch.compiler.disable(DareMethod._merge)
    return merge


def _seed_of_torch() -> int:
    """Return the seed that torch was given, as by mergekit's ``--random-seed``, else 0.

    ``torch.initial_seed()`` reads it without a draw. A process that was not given one starts with
    64 random bits, which would make every merge a different one. A seed under 2**32 counts as
    given: ``--random-seed`` takes no others, and random bits are that small once in 2**32.
    """
    seed = torch.initial_seed()
    return seed if seed < 1 << 32 else 0


dare_linear = DareMethod("dare_linear", "DARE-linear", Combine.LINEAR)
dare_ties = DareMethod("dare_ties", "DARE-TIES", Combine.TIES)

registration.finish_deferred()
