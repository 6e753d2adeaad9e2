import pytest
import torch

from t2r.evaluation import softmax_gains, window_nlls
from tests.model.tiny import student, tokens
from tests.model.tiny import teacher as tiny_teacher


@pytest.fixture(scope="module")
def model():
    return student(tiny_teacher(), num_slots=6)  # short: softmax attention matters


def loss(model, layers, windows):
    with model.softmax_attention(layers):
        return window_nlls(model, windows).mean().item()


def test_a_gain_is_what_the_layer_by_itself_saves(model):
    windows, seen = tokens(3, 60), []
    gains, chosen = softmax_gains(model, windows, progress=lambda *done: seen.append(done))
    assert chosen == []
    assert seen == [(i, 4) for i in range(1, 5)]
    for layer in range(3):
        assert gains[layer] == pytest.approx(loss(model, [], windows) - loss(model, [layer], windows), abs=1e-9)
    assert model.model.layer_kinds == ["linear_attention"] * 3


def test_layers_are_chosen_one_after_another(model):
    windows, seen = tokens(3, 60), []
    gains, chosen = softmax_gains(model, windows, 3, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen[-1] == (1 + 3 + 2 + 1,) * 2
    first, second, third = (layer for layer, _ in chosen)
    assert gains[first] == max(gains.values())
    before = loss(model, [], windows)
    pairs = {other: before - loss(model, [first, other], windows) for other in {0, 1, 2} - {first}}
    assert second == max(pairs, key=pairs.get)
    assert chosen[1][1] == pytest.approx(pairs[second], abs=1e-6)
    with torch.no_grad():
        teacher = window_nlls(tiny_teacher(), windows).mean().item()
    assert {first, second, third} == {0, 1, 2}
    assert chosen[2][1] == pytest.approx(before - teacher, abs=1e-4)  # all softmax: the source


def test_kept_layers_are_no_candidates():
    model = student(layer_types=["linear_attention", "full_attention", "hybrid_sliding"], hybrid_window=5)
    gains, _ = softmax_gains(model, tokens(1, 40), 2)
    assert set(gains) == {0, 2}
    with pytest.raises(ValueError, match="3 layers to choose of 2"):
        softmax_gains(model, tokens(1, 40), 3)
