"""Contract tests for anybody's metric, policy or reader.

Plain functions that raise `AssertionError` with a sentence that says what is broken and how to repair it. They need
numpy and no test framework:

    from distill_sampler.testing import check_metric

    def test_my_metric():
        check_metric(MyMetric())

What they show it is random, from a seed: samples of text with one token for each character, pools of up to 24
candidates with ties and missing scores, views with shared beginnings. Give your own where yours needs others.
"""

from distill_sampler.testing.metric import check_metric
from distill_sampler.testing.policy import check_policy
from distill_sampler.testing.reader import check_reader

__all__ = ["check_metric", "check_policy", "check_reader"]
