"""Muon: against timm's, against AdamW where it is AdamW, and after a step that must not count."""

import copy

import pytest
import torch
from timm.optim import Muon as Reference
from torch import nn

from unetseg.optimizers import OPTIMIZERS, Muon


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3, groups=16)
    return nn.Sequential(*layers, nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8))


def with_gradients(network, seed=1):
    torch.manual_seed(seed)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    return network


def is_filter(weight):
    return weight.ndim == 4 and weight.shape[-1] == 3


def test_filters_move_as_under_timms_muon(network):
    """Which computes in bfloat16, hence the tolerance; three steps, with weight decay."""
    other = copy.deepcopy(network)
    chosen = {"lr": 0.01, "weight_decay": 0.1}
    ours = Muon(network.parameters(), fused=True, **chosen)
    theirs = Reference([w for w in other.parameters() if is_filter(w)], ns_coefficients="original", **chosen)
    before = [weight.clone() for weight in network.parameters()]
    for seed in range(3):
        with_gradients(network, seed), with_gradients(other, seed), ours.step(), theirs.step()
    for weight, reference, start in zip(network.parameters(), other.parameters(), before):
        if is_filter(weight):
            moved, expected = weight - start, reference - start
            assert (moved - expected).norm() < 0.05 * expected.norm()


def test_all_else_moves_as_under_adamw(network):
    other = copy.deepcopy(network)
    ours = Muon(network.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    theirs = OPTIMIZERS["adamw"](other.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for seed in range(3):
        with_gradients(network, seed), with_gradients(other, seed), ours.step(), theirs.step()
    for weight, reference in zip(network.parameters(), other.parameters()):
        assert torch.equal(weight, reference) != is_filter(weight)


def test_a_step_that_is_not_finite_changes_nothing(network):
    optimizer = Muon(network.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    with_gradients(network)
    optimizer.step()
    momenta = [state["momentum"] for state in optimizer.state.values() if "momentum" in state]
    before = copy.deepcopy([*network.parameters(), *momenta])
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [*network.parameters(), *[s["momentum"] for s in optimizer.state.values() if "momentum" in s]]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
