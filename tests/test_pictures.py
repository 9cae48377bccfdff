"""Pictures say what was measured: their titles, their lines, the samples they show and how far these are off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from matplotlib.text import Text
from PIL import Image

from dywspan.cli import main
from dywspan.evaluate import pictures
from dywspan.evaluate.pictures import draw_samples, error_maps, finding, places, plots
from dywspan.evaluate.report import changes, write_results
from dywspan.plot import COLORS, GREY, color, label_ends, picture

CLASSICAL = {"Euler": {2: 1.0, 3: 0.5, 4: 0.4}, "UniPC": {2: 2.0, 3: 0.4, 4: 0.1}}


def rows_of(learned: dict[int, float], metric: str = "latent_mse") -> list[dict[str, Any]]:
    curves = {**CLASSICAL, "DyWeight (learned)": learned}
    return [
        {"solver": name, "learned": "learned" in name, "nfe": n, metric: v, "interval": {metric: [0.9 * v, 1.1 * v]}}
        for name, own in curves.items()
        for n, v in own.items()
    ]


def results_of(learned: dict[int, float], metric: str = "latent_mse", lower: bool = True) -> dict[str, Any]:
    facts = {metric: {"lower_is_better": lower}}
    return {"rows": rows_of(learned, metric), "metrics": facts, "settings": {}, "versions": {"dywspan": "0"}}


@pytest.mark.parametrize(
    ("learned", "metric", "lower", "said"),
    [
        ({2: 0.5, 3: 0.3, 4: 0.09}, "latent_mse", True, "10 to 50 % less error than the best classical one at 2 to 4"),
        ({2: 0.5, 3: 0.3, 4: 0.2}, "latent_rmse", True, "25 to 50 % less error .* at 2, 3 evaluations, not at 4"),
        ({2: 3.0, 3: 0.1, 4: 1.0}, "psnr", False, "0.6 to 1 dB more PSNR .* at 2, 4 evaluations, not at 3"),
        ({3: 0.3}, "fid", True, "25 % less fid than the best classical one at 3 evaluations"),
        ({2: 3.0, 3: 0.9}, "latent_mse", True, "no better error than the best classical one at 2, 3 evaluations"),
        ({}, "latent_mse", True, "^Mean squared error of the latent over the number of evaluations$"),
    ],
)
def test_a_title_is_what_the_numbers_say(learned: dict[int, float], metric: str, lower: bool, said: str) -> None:
    title = finding(rows_of(learned, metric), metric, lower)
    assert re.search(said, title), title


def test_a_plot_has_the_classical_ones_as_a_band_and_names_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    (drawn,) = plots(results_of({2: 0.5, 3: 0.3}), tmp_path / "q.png")
    assert drawn == tmp_path / "q-latent_mse.png" and drawn.exists()
    (axes,) = kept[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_legend() is None
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == ["DyWeight", "Euler", "UniPC", "best classical,\nhere UniPC"]
    edge = next(line for line in axes.lines if line.get_color() == GREY)
    assert edge.get_ydata().tolist() == [1.0, 0.4, 0.1]
    assert len(axes.collections) == 2, "the band of all classical ones, and the learned one's interval"
    monkeypatch.undo()
    pyplot.close(kept[0])


def test_a_solver_has_one_colour_and_names_do_not_overlap() -> None:
    assert color("DyWeight (learned)") == color("DyWeight, my-solvers") == COLORS["DyWeight"]
    assert color("SpanLift + TimeLift (learned)") != color("SpanLift (learned)") and color("PNDM") == GREY
    assert len({color("DyWeight", again) for again in range(3)}) == 3
    figure, axes = pyplot.subplots()
    axes.plot([1, 2], [0, 1])
    label_ends(axes, [(2, 0.5, "a", "red"), (2, 0.5, "b\nc", "blue"), (2, 0.51, "d", "red"), (1, 0, "e", "red")], True)
    figure.canvas.draw()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    right = [boxes[name] for name in ("a", "b\nc", "d")]
    assert not any(one.overlaps(other) for one in right for other in right if one is not other)
    assert boxes["e"].x1 < axes.bbox.x1 < min(box.x0 for box in right)
    pyplot.close(figure)


def test_half_of_a_sheet_is_the_worst_and_half_is_typical() -> None:
    errors = torch.tensor([5.0, 1.0, 9.0, 3.0, 2.0, 8.0, 4.0, 7.0, 6.0])
    worst, typical = places(errors, 4)
    assert worst == [2, 5] and {float(errors[i]) for i in typical} == {5.0, 6.0}
    assert places(None, 3) == ([], [0, 1, 2])
    few = places(errors[:3], 8)
    assert few == ([2], [0, 1]), "all there are, each once"


def test_an_error_map_is_five_times_the_difference() -> None:
    one, other = torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.5)
    one[0, :, 0, 0], one[0, :, 1, 1] = torch.tensor([0.6, 0.5, 0.35]), 1.0
    shown = error_maps(one, other)
    assert shown.shape == (1, 3, 2, 2) and float(shown[0, 1, 0, 1]) == 0 and float(shown[0, 2, 1, 1]) == 1
    assert float(shown[0, 0, 0, 0]) == pytest.approx(5 * (0.1 + 0.15) / 3)


def test_a_sheet_is_made_smaller_until_it_is_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    rows = [("reference, 50", images), ("it, 3", images.flip(0))]
    draw_samples(rows, ["a prompt"] * 4, tmp_path / "large.png", {0: "worst", 2: "typical"})
    monkeypatch.setattr(pictures, "LARGEST", 40_000)
    draw_samples(rows, ["a prompt"] * 4, tmp_path / "small.png", {})
    sizes = {name: (tmp_path / f"{name}.png").stat().st_size for name in ("large", "small")}
    assert sizes["small"] <= 40_000 < sizes["large"] <= 200_000
    with Image.open(tmp_path / "large.png") as large:
        assert large.height == 66 + 3 * 130, "the reference, the solver and its error"


def test_a_sheet_has_its_images_where_its_labels_are() -> None:
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    sheet = picture([("a", [red, blue]), ("b", [blue, red])], ["x", "y"], 20, {0: "worst", 1: "typical"})
    left, apart = sheet.width - 2 * 22 - 12, 22 + 12  # a gap between the two kinds
    for (i, j), own in {(0, 0): red, (0, 1): blue, (1, 0): blue, (1, 1): red}.items():
        at = (left + j * apart + 10, 66 + i * 22 + 10)
        assert sheet.getpixel(at) == own.getpixel((0, 0))


def test_what_changed_is_said_number_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = results_of({2: 0.5, 3: 0.3, 4: 0.2}), results_of({2: 0.505, 3: 0.45})
    for name, own in (("old", older), ("new", newer)):
        write_results(tmp_path / f"{name}.json", own["rows"], metrics=own["metrics"])
    assert main(["bench", "table", str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")]) == 0
    shown = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert ["latent_mse", "", "3", "DyWeight (learned)", "UniPC"] in shown, "the best is another one"
    moved = {tuple(line[2:]) for line in shown if line[3:4] == ["DyWeight (learned)"] and len(line) == 6}
    assert moved == {("3", "DyWeight (learned)", "0.3", "0.45"), ("4", "DyWeight (learned)", "0.2", "")}
    assert "no number moved" in changes(older, older)
    with pytest.raises(ValueError, match="Nothing to compare"):
        changes(older, results_of({2: 1.0}, "psnr", False))


def test_table_draws_what_a_file_holds(tmp_path: Path) -> None:
    own = results_of({2: 0.5})
    write_results(tmp_path / "r.json", own["rows"], metrics=own["metrics"], settings={})
    assert main(["bench", "table", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.svg")]) == 0
    assert (tmp_path / "r-latent_mse.svg").read_text().startswith("<?xml")
