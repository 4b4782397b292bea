"""What counts as a change of what was computed from, and what does not."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from cogvx_fast.state import State, fingerprint
from tests import toy


@pytest.fixture
def linear():
    return nn.Linear(4, 3)


def test_the_same_modules_unchanged_are_the_same(linear):
    assert State.of(linear, None) == State.of(linear) == State.of(linear)
    assert State.of(linear) != State.of(nn.Linear(4, 3)) != State.of()


CHANGES = {
    "in place": lambda linear: linear.weight.mul_(2),
    "of the bias": lambda linear: linear.bias.add_(1),
    "another parameter": lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.clone())),
    "another memory": lambda linear: setattr(linear.weight, "data", linear.weight.clone()),
    "no bias": lambda linear: setattr(linear, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_torch_counts_is_seen(linear, change):
    for module in (linear, nn.Sequential(linear)):
        before = State.of(module)
        CHANGES[change](linear)
        assert State.of(module) != before
        linear.bias = nn.Parameter(torch.zeros(3))


def test_writing_through_data_is_seen_where_numbers_are_looked_at(linear):
    states = State.of(linear), State.of(linear, numbers=True)
    linear.weight.data.mul_(2)
    assert State.of(linear) == states[0] and State.of(linear, numbers=True) != states[1]
    tensor = torch.ones(5)
    states = State.of_tensors(tensor), State.of_tensors(tensor, numbers=True)
    tensor.data.mul_(2)
    assert State.of_tensors(tensor) == states[0] and State.of_tensors(tensor, numbers=True) != states[1]


def test_inference_tensors_whose_writes_nobody_counts_are_looked_at():
    with torch.inference_mode():
        tensor = torch.ones(5, 3)
        for of in (tensor, tensor.t()):
            before = State.of_tensors(of)
            assert State.of_tensors(of) == before
            tensor.mul_(2)
            assert State.of_tensors(of) != before


def test_an_adapters_settings_are_part_of_it():
    model = toy.transformer(num_layers=1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "one")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "two")
    query, states = model.transformer_blocks[0].attn1.to_q, []
    for change in (
        lambda: None,
        lambda: model.set_adapters("one"),
        lambda: model.set_adapters(["one"], [0.5]),
        model.disable_adapters,
        model.enable_adapters,
        lambda: query.merge(),
    ):
        change()
        assert State.of(query) == State.of(query)
        states.append(State.of(query))
    assert states[4] == states[2] and len(set(map(str, (s.marks for s in states)))) == len(states) - 1


def test_quantized_weights_are_marked_by_their_numbers():
    from cogvx_fast.quantization import Scheme
    from cogvx_fast.quantization.apply import quantize_modules

    linear = nn.Linear(16, 16).requires_grad_(False)
    quantize_modules(nn.ModuleDict({"linear": linear}), lambda name: Scheme.INT8)
    before = State.of(linear, numbers=True)
    assert State.of(linear, numbers=True) == before
    linear.weight.qdata.add_(1)
    assert State.of(linear, numbers=True) != before


def test_what_is_marked_stays_alive():
    # Or the address of a tensor that is gone could come to be that of another.
    state = State.of_tensors(torch.ones(3))
    assert state != State.of_tensors(torch.ones(3))


def test_nothing_is_fetched_from_elsewhere_than_a_cpu():
    tensor = torch.ones(3, device="meta")
    assert State.of_tensors(tensor, numbers=True) == State.of_tensors(tensor, numbers=True)


@torch.no_grad()
def test_a_fingerprint_is_of_numbers_not_of_places(linear):
    before = fingerprint(linear)
    for parameter in linear.parameters():
        parameter.data = parameter.data.clone()
    assert fingerprint(linear) == before
    changes = (
        lambda: linear.weight.data[0, 0].add_(1),  # which torch does not count
        lambda: linear.weight.mul_(1),  # which torch does
        lambda: setattr(linear, "bias", None),
        lambda: linear.to(torch.bfloat16),
        lambda: linear.weight.data.fill_(float("nan")),
        lambda: linear.to_empty(device="meta"),
    )
    for change in changes:
        change()
        assert fingerprint(linear) != before and fingerprint(linear) == fingerprint(linear)
        before = fingerprint(linear)
