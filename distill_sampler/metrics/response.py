"""The view that most metrics share: the whole sample, with its response scored."""

from __future__ import annotations

from distill_sampler.types import Sample, View


def response_view(sample: Sample) -> View:
    """The sample as it is trained on, with every response token scored."""
    return View(input_ids=sample.input_ids, scored=sample.scored)
