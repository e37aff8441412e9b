"""Contract tests for your own metric, policy or reader.

They are plain functions that raise an `AssertionError`, which says what is wrong and how to correct it. They need numpy
and no test framework:

    from distill_sampler.testing import check_metric

    def test_my_metric():
        check_metric(MyMetric())

The test data is random, from a seed: samples of text with one token for each character, pools of up to 24 candidates
with ties and missing scores, views with shared beginnings. Pass your own where your object needs other data.
"""

from distill_sampler.testing.metric import check_metric
from distill_sampler.testing.policy import check_policy
from distill_sampler.testing.reader import check_reader

__all__ = ["check_metric", "check_policy", "check_reader"]
