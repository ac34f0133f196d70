"""The page's colours are told apart and its numbers legible: arithmetic alone. test_report_browser.py looks at them."""

from __future__ import annotations

import itertools
import math

from colours import lab, linear, luminance, srgb

from pyprune.report import figures, page


def test_numbers_on_fields_are_legible() -> None:
    """Behind a number of `linears-*` is up to STRONGEST of the colour; the script sees only the page behind it."""
    for scheme in (page.LIGHT, page.DARK):
        for i in range(len(figures.SERIES)):
            share = figures.STRONGEST
            mixed = [
                share * a + (1 - share) * b for a, b in zip(srgb(scheme[f"s{i}"]), srgb(scheme["paper"]), strict=True)
            ]
            low, high = sorted((luminance(mixed), luminance(srgb(scheme["ink"]))))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_colours_differ_for_the_colour_blind() -> None:
    """Machado, Oliveira & Fernandes (2009), severity 1: any two colours are 10 apart in CIELAB and more, where 2.3 is
    just noticeable."""
    seen_by = {
        "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        "protans": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutans": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        "tritans": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    }
    for scheme in (page.LIGHT, page.DARK):
        for name, matrix in seen_by.items():
            colors = [linear(srgb(scheme[f"s{i}"])) for i in range(len(figures.SERIES))]
            seen = [[sum(m * c for m, c in zip(row, color, strict=True)) for row in matrix] for color in colors]
            pairs = itertools.combinations(map(lab, seen), 2)
            assert min(math.dist(a, b) for a, b in pairs) >= 10, name
