import pytest

from disaggd.config import Config, DisaggregationConfig
from disaggd.errors import ConfigError
from disaggd.simulator.policies import COMPARED, name_of, with_policy
from tests.support.simulations import small_config


@pytest.mark.parametrize("word", COMPARED)
def test_a_policy_has_the_name_that_it_was_asked_for_by(word: str) -> None:
    assert name_of(with_policy(small_config("never"), word)) == word


def test_a_threshold_without_a_number_is_the_files() -> None:
    config = Config(disaggregation=DisaggregationConfig(policy="never", max_local_prefill_tokens=77))
    assert name_of(with_policy(config, "threshold")) == "threshold:77"


@pytest.mark.parametrize("word", ["", "sometimes", "threshold:", "threshold:-1", "threshold:many", "always:5"])
def test_a_word_that_is_no_policy_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="no policy"):
        with_policy(small_config("never"), word)
