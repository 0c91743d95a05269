"""One config, its models and mergekit's plan for them: each is examined once, when needed.

check, inspect, suggest and verify pass this object on, so that nothing is examined twice.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.compatibility import Comparison
from mergekit_dare.diagnostics.models.examined import ExaminedModels
from mergekit_dare.diagnostics.models.soundness import NamedModel
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan


class Examination:
    """What is known of one config.

    Attributes:
        document: The config, with its lines.
        models: Its models, which several examinations may share.
        made_here: Names of merges in the same file, whose models do not exist yet.
        options: mergekit's own, for loading models.

    """

    def __init__(
        self,
        document: Document,
        options: MergeOptions | None = None,
        models: ExaminedModels | None = None,
        made_here: Collection[str] = (),
    ) -> None:
        self.document = document
        self.options = options or MergeOptions()
        self.models = models or ExaminedModels()
        self.made_here = made_here

    @cached_property
    def config(self) -> MergeConfiguration:
        """The config as mergekit has it.

        Raises:
            Exception: whatever mergekit's validators raise.

        """
        return self.document.configuration()

    @cached_property
    def named_models(self) -> list[NamedModel]:
        """The models that exist before the merge, here or on the hub."""
        nodes = self.document.model_nodes
        found = [model for model in nodes if model.model.path not in self.made_here]
        self.models.look_at(found)
        return [NamedModel(self.document, nodes[model], self.models[model]) for model in found]

    @property
    def has_all_models(self) -> bool:
        """Whether every model exists and is usable."""
        named = self.named_models
        return len(named) == len(self.document.model_nodes) and not any(
            found.model.files.why_unusable or found.model.adapter_problems for found in named
        )

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each model that is a folder, and the one whose settings the merged model inherits.

        Empty if the latter is not a folder.
        """
        config = self.config
        named = [found for found in self.named_models if found.model.files.folder is not None]
        models = {found.model.reference: found.model for found in named}
        donor = models.get(config.base_model or config.referenced_models()[0])
        if donor is None:
            return []
        source = tokenizer.source_of(config)
        named_source = models.get(source) if isinstance(source, ModelReference) else None
        template_of = named_source if isinstance(source, ModelReference) else donor
        return [
            Comparison(
                self.document,
                found.node,
                found.model,
                donor,
                with_layers=config.slices is None,
                with_tokenizer=bool(source),
                tokenizer_of=donor if source == "base" else named_source,
                template_of=None if config.chat_template else template_of,
            )
            for found in named
        ]

    @cached_property
    def plan(self) -> MergePlan:
        """Mergekit's plan.

        Raises:
            Exception: whatever mergekit's validators raise.

        """
        return MergePlan(self.document, self.config, self.models, self.options)
