import dataclasses

import numpy as np
import pytest
import torch

from cogvx_fast import EngineConfig
from cogvx_fast.quantization import QuantizedAttention


def test_presets_are_names_of_configurations():
    assert EngineConfig.from_name("exact") == EngineConfig()
    config = EngineConfig(modulation_table=False)
    assert EngineConfig.from_name(config) is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tier = "turbo"


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ("warp", ValueError, r"engine tier 'warp' is unknown; available: 'exact'"),
        (3, TypeError, r"engine=3 must be a string or an EngineConfig"),
        (None, TypeError, r"engine=None must be"),
    ],
)
def test_what_cannot_work_says_what_would(engine, error, message):
    with pytest.raises(error, match=message):
        EngineConfig.from_name(engine)


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"EngineConfig.modulation_table='yes' must be True or False"):
        EngineConfig(modulation_table="yes")


def test_a_memory_limit_leaves_precision_open_until_it_has_chosen():
    config = EngineConfig(memory_limit="8GiB")
    assert (config.memory_limit, config.tier, config.recipe, config.fast_vae) == (8 * 2**30, None, None, True)
    assert EngineConfig(memory_limit=10**9, tier="exact").tier == "exact"
    assert EngineConfig(memory_limit="1.5 GB", recipe="int8").tier == "balanced"
    assert EngineConfig(recipe="native").tier == "balanced"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineConfig)])
def test_a_field_of_a_wrong_type_is_named_in_one_line(name):
    numbers = 0, 1.5, 10**5000, np.zeros((40, 40)), torch.zeros(9, 9)
    message = rf"(EngineConfig\.{name}=|engine tier ).* (must be|allowed:|available:) .+"
    for value in ([], {}, object(), b"exact", "\udcff" * 1000, *numbers):
        with pytest.raises(ValueError, match=message) as caught:
            EngineConfig(**{name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_number_of_bytes_may_be_a_string():
    assert EngineConfig(memory_limit="54241830").memory_limit == 54241830
    assert EngineConfig(vae_memory=" 54241830 ").vae_memory == 54241830
    assert EngineConfig(memory_limit="1.5KiB").memory_limit == 1536


@pytest.mark.parametrize(
    "limit", [0, -1, True, 1.5, "1.5", "8 apples", "0GiB", "", "9" * 400 + "GiB", "9" * 20 + "GB", 2**63]
)
def test_a_memory_limit_is_a_size(limit):
    with pytest.raises(ValueError, match=r"EngineConfig.memory_limit=.* must be a number of bytes or a string"):
        EngineConfig(memory_limit=limit)
    with pytest.raises(ValueError, match="memory_limit needs fast_vae=True"):
        EngineConfig(memory_limit="1GiB", fast_vae=False)


def test_attention_in_8_bits_changes_precision():
    scheme = QuantizedAttention(smooth_value=True)
    with pytest.raises(ValueError, match=r"quantized_attention=.* changes precision, which tier 'exact' does not"):
        EngineConfig(quantized_attention=scheme)
    with pytest.raises(ValueError, match=r"quantized_attention='fp8' must be None or a .*QuantizedAttention"):
        EngineConfig(tier="balanced", quantized_attention="fp8")
    assert EngineConfig(tier="balanced", quantized_attention=scheme).quantized_attention is scheme
