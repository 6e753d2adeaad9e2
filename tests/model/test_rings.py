"""Which slot a routed token takes over."""

from itertools import pairwise

import pytest
import torch

from t2r.model import T2RConfig, new_parameters, new_tensors
from t2r.model.positions import Positions
from t2r.model.rings import ring_schedule
from tests.model.tiny import SHAPE, shake, student

RINGS = [3, 4]
CONFIG = T2RConfig(**SHAPE, start="routed", num_slots=8, num_sinks=1, rings=RINGS)


def by_hand(choice):
    """Slots of one document and head, token by token, and how many tokens went into each ring."""
    slots, written = [], [0, 0]
    for t, ring in enumerate(choice.tolist()):
        if t < 8:
            slots.append(t)
        else:
            slots.append([1, 4][ring] + written[ring] % [3, 4][ring])
            written[ring] += 1
    return slots, written


def choices(B, T, seed=0):
    return torch.randint(0, 2, (B, T, 2), generator=torch.Generator().manual_seed(seed))


def positions(B, T, past=0, **options):
    given = {"attention_mask": None, "position_ids": None, "cu_seqlens": None} | options
    return Positions.resolve(torch.zeros(B, T, 1), past=past, **given)


def test_each_ring_goes_round_by_itself():
    choice = choices(2, 40)
    slot, written = ring_schedule(choice, positions(2, 40), CONFIG, RINGS)
    assert slot.dtype == torch.int32
    for b in range(2):
        for h in range(2):
            assert (slot[b, :, h].tolist(), written[b, h].tolist()) == by_hand(choice[b, :, h])


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 25])
def test_in_pieces_is_whole(cut):
    choice = choices(2, 40)
    whole, counted = ring_schedule(choice, positions(2, 40), CONFIG, RINGS)
    first, written = ring_schedule(choice[:, :cut], positions(2, cut), CONFIG, RINGS)
    second, written = ring_schedule(choice[:, cut:], positions(2, 40 - cut, past=cut), CONFIG, RINGS, written)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(written, counted)


def test_packed_documents_start_afresh():
    choice = choices(1, 60)
    bounds = torch.tensor([0, 5, 30, 31, 60])
    slot, _ = ring_schedule(choice, positions(1, 60, cu_seqlens=bounds), CONFIG, RINGS)
    for start, end in pairwise(bounds.tolist()):
        for h in range(2):
            assert slot[0, start:end, h].tolist() == by_hand(choice[0, start:end, h])[0]


def test_padding_takes_no_slot():
    choice, mask = choices(1, 40), (torch.arange(45) >= 5).long()[None]
    behind = torch.nn.functional.pad(choice, (0, 0, 5, 0))
    padded, written = ring_schedule(behind, positions(1, 45, attention_mask=mask), CONFIG, RINGS)
    slot, counted = ring_schedule(choice, positions(1, 40), CONFIG, RINGS)
    assert (padded[:, :5] == -1).all()
    assert torch.equal(padded[:, 5:], slot)
    assert torch.equal(written, counted)


def test_a_router_is_no_parameter_and_is_saved(tmp_path):
    model = shake(student(start="routed"))
    config = model.config
    assert config.rings == [5, 9]  # the short one has two fifths
    assert set(new_tensors(config)) - set(new_parameters(config)) == {"router.weight", "router.thresholds"}
    assert not any("router" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].self_attn.router.weight, model.model.layers[1].self_attn.router.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "routed", "rings": [3, 3]}, "together be num_slots - num_sinks = 7"),
        ({"start": "routed", "rings": [7]}, "two or more"),
        ({"start": "routed", "rings": []}, "two or more, got none"),
        ({"start": "routed", "num_sinks": 7}, r"needs two slots beside the sinks.*start 'window'"),
        ({"start": "routed", "rings": [[3, 4], [4, 3]]}, "rings name 2 layers, num_hidden_layers is 3"),
        ({"start": "routed", "rings": [[3, 4], [4, 3], [4, 4]]}, "together be"),
        ({"start": "routed", "rings": [[3, 4], [4, 3], [1, 2, 4]]}, "as many in each layer"),
        ({"start": "window", "rings": [3, 4]}, "rings belong to start 'routed'"),
    ],
)
def test_bad_rings(options, message):
    with pytest.raises(ValueError, match=message):
        T2RConfig(**SHAPE | {"num_slots": 8, "num_sinks": 1} | options)


def test_the_fewest_slots_are_two_rings():
    assert T2RConfig(**SHAPE, start="routed", num_slots=6, num_sinks=4).rings == [1, 1]
