"""axolotl: a plug-in, so that a curriculum needs nothing but the YAML file.

plugins:
  - distill_sampler.integrations.axolotl.CurriculumPlugin
distill_sampler:
  metrics: rank_surprisal_ratio
  policies: ["BestOf(rank_surprisal_ratio, per=prompt_id)", Shuffle]
  attach: {prompt_column: prompt_id}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import Trainer

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.transformers import attach
from distill_sampler.specs import parse_metrics, parse_policies, parse_rescore
from distill_sampler.types import unknown_name

SECTION = "distill_sampler"
"""The plug-in's part of axolotl's configuration."""


class CurriculumInput(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    distill_sampler: dict[str, Any] | None = None


class CurriculumPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches a curriculum to the trainer that axolotl has made. Its settings are in the section `distill_sampler`:

    - `metrics`: what to score, separated by commas. By default `rank_surprisal_ratio`.
    - `policies`: how to plan, a list of texts such as `BestOf(rank_surprisal_ratio, per=prompt_id)`.
    - `rescore`: when the student scores again, such as `Rescore(every_steps=200, fraction=0.1)`.
    - `observe`, `num_samples`, `num_tokens`, `seed`, `scores`, `teacher`, `domain`: as of `Curriculum`.
    - `attach`: the options of `attach`.
    """

    def get_input_args(self) -> str:
        """Where axolotl finds what the plug-in adds to its configuration."""
        return f"{__name__}.{CurriculumInput.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Attach the curriculum. Unless the configuration has `max_steps`, training ends after `num_epochs` of the
        plan: axolotl has counted the steps of all candidates.

        Raises:
            ValueError: the section is missing or has an unknown setting, or `attach` refuses the trainer.
        """
        section = cfg.get(SECTION)
        if not section:
            raise ValueError(
                f"axolotl's configuration has the plug-in of {SECTION}, but no section {SECTION}: with policies:."
            )
        settings = dict(section)
        options = settings.pop("attach", None) or {}
        if not cfg.get("max_steps"):
            trainer.args.max_steps = -1
        attach(trainer, curriculum_of(settings), **options)


def curriculum_of(settings: Mapping[str, Any]) -> Curriculum:
    """The curriculum that a section of a configuration describes.

    Raises:
        ValueError: a setting is unknown, missing or wrong.
    """
    as_given = ("observe", "num_samples", "num_tokens", "seed", "scores", "teacher", "domain")
    for name in settings:
        if name not in (known := ("metrics", "policies", "rescore", *as_given)):
            raise ValueError(unknown_name("setting", name, known, f"that the section {SECTION} may have"))
    if not settings.get("policies"):
        raise ValueError(
            f"{SECTION}: has no policies: list, such as [BestOf(rank_surprisal_ratio, per=prompt_id), Shuffle]."
        )
    metrics = parse_metrics(settings.get("metrics", "rank_surprisal_ratio"))
    return Curriculum(
        metrics=metrics,
        policies=parse_policies(list(settings["policies"]), [metric.name for metric in metrics]),
        rescore=parse_rescore(settings["rescore"]) if "rescore" in settings else None,
        **{name: settings[name] for name in as_given if name in settings},
    )
