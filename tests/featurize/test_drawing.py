"""Colours: the same value has the same colour in every picture, whatever else is in it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from featurize.drawing import Components, Scale, draw_labels, label_colour

SEEDS = st.integers(0, 2**31)


def _map(seed: int, side: int = 9) -> torch.Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.booleans(), st.floats(0.01, 1e4), st.floats(-1e3, 1e3))
def test_a_scale_does_not_care_about_units(seed: int, darker: bool, factor: float, shift: float) -> None:
    values = _map(seed).double()
    scale, other = Scale.of(values, darker), Scale.of(values * factor + shift, darker)
    colours, again = scale.draw(values).astype(int), other.draw(values * factor + shift).astype(int)
    assert np.abs(colours - again).max() <= 1


@given(SEEDS)
def test_what_is_near_is_bright(seed: int) -> None:
    values = _map(seed)
    near, far = values.flatten().argmin(), values.flatten().argmax()
    for sign, (bright, dark) in {False: (far, near), True: (near, far)}.items():
        pixels = Scale.of(values, larger_is_darker=sign).draw(values).reshape(-1, 3).astype(int).sum(1)
        assert pixels[bright] == pixels.max() > pixels[dark] == pixels.min()


@given(SEEDS, SEEDS)
def test_distance_is_a_share_of_the_scale(seed: int, other_seed: int) -> None:
    one, other = _map(seed), _map(other_seed)
    scale = Scale.of(one)
    assert scale.distance(one, one) == 0
    assert 0 <= scale.distance(one, other) <= 1
    assert scale.distance(one, other) == scale.distance(other, one)
    low, high = torch.full((2, 2), scale.dark - 5), torch.full((2, 2), scale.bright + 5)
    assert scale.distance(low, high) == 1


def test_a_flat_map_has_one_colour() -> None:
    flat = torch.full((4, 4), 2.5)
    assert len(np.unique(Scale.of(flat).draw(flat).reshape(-1, 3), axis=0)) == 1


def test_the_bar_runs_from_dark_to_bright() -> None:
    for scale in (Scale(1.0, 9.0), Scale(9.0, 1.0)):
        brightness = scale.bar()[0].astype(int).sum(1)
        assert (np.diff(brightness) >= 0).all()
        assert brightness[-1] > 2 * brightness[0] + 100


def test_a_label_has_its_own_colour_in_every_map() -> None:
    assert len({label_colour(label) for label in range(200)}) == 200
    labels = torch.tensor([[3, 132], [0, 3]])
    drawn = draw_labels(labels)
    assert drawn.shape == (2, 2, 3)
    for label, colour in zip(labels.flatten().tolist(), drawn.reshape(-1, 3).tolist(), strict=True):
        assert tuple(colour) == label_colour(label)


@given(SEEDS)
def test_components_depend_on_the_tokens_not_on_their_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 16, 6, generator=generator) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.2])
    shuffled = features.flatten(0, 1)[torch.randperm(32, generator=generator)].view(1, 32, 6)
    one, other = Components.of(features), Components.of(shuffled)
    difference = one.draw(features[0], 4).astype(int) - other.draw(features[0], 4).astype(int)
    assert np.abs(difference).max() <= 1


@given(SEEDS)
def test_components_show_what_varies_most(seed: int) -> None:
    """One strong direction, found whatever its sign: the first colour follows it, and the others do not."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.linspace(-50, 50, 25)[torch.randperm(25, generator=generator)]
    features = torch.randn(1, 25, 5, generator=generator)
    features[0, :, 2] += strong
    red = Components.of(features).draw(features[0], 5).reshape(-1, 3)[:, 0].astype(float)
    assert np.corrcoef(red, strong.numpy())[0, 1] > 0.95  # the largest entry of a direction is positive
