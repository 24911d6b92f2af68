"""No merge: one of the family's own models, written and scored like every method."""

from __future__ import annotations

from dataclasses import dataclass

from alignmerge.engine.merger import MergeContext, Merger, Rule, check_choice


@dataclass(frozen=True, kw_only=True)
class Identity(Merger):
    """theta = theta_of. An expert is rounded to the base's dtype, as every merge is."""

    name = "identity"
    of: str = "base"  # ``base``, ``anchor`` or the alias of an expert

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule that picks the model; raises BadRequest if the family has none of that name."""
        aliases = ctx.models.aliases
        check_choice("method.of", self.of, ["base", *aliases])
        if self.of == "base":
            return lambda block: block.base
        place = aliases.index(self.of)
        return lambda block: block.pool[place]
