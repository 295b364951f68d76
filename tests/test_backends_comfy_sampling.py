"""What a schedule reads an output of the network as, found out by asking it."""

from __future__ import annotations

from typing import Any

import pytest

from realera_nodes.backends.comfy_sampling import predicted


class Read:
    def __init__(self, how: Any):
        self.how = how

    def calculate_denoised(self, sigma, output, latent):
        return self.how(sigma.view(-1, 1, 1, 1), output, latent)


def eps(sigma, output, latent):
    return latent - output * sigma


def v(sigma, output, latent):
    return latent / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


@pytest.mark.parametrize(
    ("schedule", "meant"),
    [
        (Read(eps), "eps"),
        (Read(v), "v"),
        (Read(lambda sigma, output, latent: output), "other"),  # x0
        (Read(lambda sigma, output, latent: latent + output * sigma), "other"),
        (Read(lambda sigma, output: output), "other"),  # asked otherwise
        (object(), "other"),
    ],
)
def test_a_schedule_is_judged_by_what_it_makes_of_an_output(schedule: Any, meant: str) -> None:
    assert predicted(schedule) == meant
