"""Published solvers become tables exactly, and reading their pickles runs nothing."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from dywspan import DyWeightScheduler
from dywspan.core.step import rollout
from dywspan.inert_pickle import read_pickle
from dywspan.published import CONFIGS, convert, neuralsolver_tables, read_published

SHARED = Path(__file__).parents[2] / "shared" / "published_tables" / "dyweight.json"
PUBLISHED = json.loads(SHARED.read_text())["tables"] if SHARED.exists() else {}


# ------------------------------------------------------------------ files as DyWeight writes them


class EasyDict(dict):
    """A dictionary subclass, as that code base uses for keyword arguments: pickled by its class name."""


class _Persistent:
    """An object pickled as a call of a function, with source code that must never run."""

    def __init__(self, marker: Path, state: dict[str, Any]) -> None:
        self.marker, self.contents = marker, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "class_name": "Predictor", "state": self.contents}
        meta["module_src"] = f"open({str(self.marker)!r}, 'w').close()"
        return sys.modules["gone.persistence"].rebuild, (meta,)


@pytest.fixture
def persistent(tmp_path: Path):
    """Pickle objects whose classes and functions live in modules that are gone when the file is read."""
    package, module = types.ModuleType("gone"), types.ModuleType("gone.persistence")

    def rebuild(meta: dict[str, Any]) -> None:
        raise AssertionError("called")

    rebuild.__module__ = rebuild.__qualname__ = "gone.persistence"
    rebuild.__qualname__ = "rebuild"
    module.rebuild, module.EasyDict = rebuild, EasyDict
    marker = tmp_path / "executed"

    def dump(path: Path, predictor: dict[str, Any], loss: dict[str, Any], protocol: int) -> Path:
        sys.modules.update({"gone": package, "gone.persistence": module})
        EasyDict.__module__ = "gone.persistence"
        try:
            data = {"predictor": _Persistent(marker, predictor), "loss_fn": _Persistent(marker, loss)}
            path.write_bytes(pickle.dumps(data, protocol=protocol))
        finally:
            EasyDict.__module__ = __name__
            del sys.modules["gone"], sys.modules["gone.persistence"]
        return path

    yield dump
    assert not marker.exists(), "source code in a pickle was run"


def snapshot(dump: Any, path: Path, table: dict[str, Any], protocol: int = 4) -> Path:
    """A snapshot with the fields of ``table`` where the training code keeps them."""
    predictor: dict[str, Any] = {
        "training": False,
        "_parameters": {"hybrid_weights": torch.nn.Parameter(torch.tensor(table["weights"]))},
        "_buffers": {"mask": torch.tensor(table["mask"])},
        "_non_persistent_buffers_set": set(),
        "_init_args": (),
        "_init_kwargs": EasyDict(num_steps=table["num_steps"], loss_type="stale", nothing=None),
    }
    if table.get("t_scale") is not None:
        predictor["_parameters"]["t_scale"] = torch.nn.Parameter(torch.tensor(table["t_scale"]))
    loss = {k: v for k, v in table.items() if k not in ("weights", "mask", "t_scale", "dataset")}
    loss["dataset_name"] = table["dataset"]
    for key in ("num_steps", "max_history_steps", "afs", "guidance_rate", "guidance_type"):
        predictor[key] = loss.pop(key)
    return dump(path, predictor, loss, protocol)


def flux_file(path: Path, table: dict[str, Any]) -> Path:
    data = {
        "window_size": table["window_size"],
        "dyweight_weights_raw": torch.tensor(table["dyweight_weights_raw"]),
        "dyweight_t_scales": torch.tensor(table["dyweight_t_scales"]),
        "dyweight_meta": table["dyweight_meta"],
    }
    torch.save(data, path)
    return path


def pixel(steps: int = 4, order: int = 3, afs: bool = True, dataset: str = "cifar10", **changes: Any) -> dict[str, Any]:
    """A random table in the file's form: absolute weights, garbage outside the mask."""
    generator = torch.Generator().manual_seed(steps)
    weights = torch.randn(steps, steps, generator=generator)
    mask = torch.ones(steps, steps).tril().triu(1 - order)
    table = {"weights": weights.tolist(), "mask": mask.tolist(), "num_steps": steps + 1, "max_history_steps": order}
    scale = torch.rand(steps - afs, generator=generator) + 0.5
    table |= {"afs": afs, "t_scale": scale.tolist(), "guidance_rate": 0.0, "guidance_type": None, "dataset": dataset}
    table |= {"schedule_type": "polynomial", "schedule_rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0}
    return table | changes


FLUX = {
    "window_size": 2,
    "dyweight_weights_raw": [[1.5, 0.0, 0.0], [-0.25, 1.25, 0.0], [0.0, -0.75, 1.5]],
    "dyweight_t_scales": [1.0, 0.875, 1.125],
    "dyweight_meta": {"K": 3, "tscale_low": 0.5, "tscale_high": 1.5},
}


# ------------------------------------------------------------------ exact conversion


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("afs", [False, True])
def test_snapshot(tmp_path: Path, persistent: Any, protocol: int, afs: bool) -> None:
    stored = pixel(steps=5, order=3, afs=afs)
    table = read_published(snapshot(persistent, tmp_path / "a.pkl", stored, protocol))
    absolute = torch.tensor(stored["weights"]).double()
    assert table.weights.shape == (5, 3)
    for i in range(5):
        for lag in range(3):
            assert table.weights[i, lag] == (absolute[i, i - lag] if lag <= i else 0)
    assert table.time_scale.tolist() == [1.0] * afs + torch.tensor(stored["t_scale"]).double().tolist()
    assert table.afs is afs and table.num_inference_steps == 5 - afs
    assert table.grid == {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert table.provenance["stored"]["num_steps"] == 6 and table.provenance["dataset"] == "cifar10"
    assert "loss_type" in table.provenance["stored"]  # found although it is only in the innermost dictionary


def test_snapshot_without_time_scale(tmp_path: Path, persistent: Any) -> None:
    table = read_published(snapshot(persistent, tmp_path / "a.pkl", pixel(t_scale=None)))
    assert table.time_scale.tolist() == [1.0] * 4


def test_flux_file(tmp_path: Path) -> None:
    table = read_published(flux_file(tmp_path / "a.pt", FLUX))
    assert table.weights.tolist() == [[1.5, 0.0], [1.25, -0.25], [1.5, -0.75]]
    assert table.time_scale.tolist() == FLUX["dyweight_t_scales"]
    assert table.grid == {"name": "flow"}


def test_stable_diffusion_gets_its_own_range(tmp_path: Path, persistent: Any) -> None:
    default = pixel(afs=False, dataset="ms_coco", schedule_type="discrete", schedule_rho=1.0)
    right = default | {"sigma_min": 0.03, "sigma_max": 14.0}
    grid = read_published(snapshot(persistent, tmp_path / "a.pkl", default)).grid
    assert grid == {
        "name": "discrete",
        "sigma_min": pytest.approx(0.0292, abs=1e-4),
        "sigma_max": pytest.approx(14.6146, abs=1e-4),
    }
    stored = read_published(snapshot(persistent, tmp_path / "b.pkl", right)).grid
    assert stored == {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.0}
    # The range is the network's own first and last level, to the 4 digits that are known of it.
    prediction = DyWeightScheduler.from_config(CONFIGS["ms_coco"]).host.prediction
    ends = prediction.sigma(torch.tensor([0.0, 999.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([grid["sigma_min"], grid["sigma_max"]]).double(), rtol=1e-4, atol=0)


def test_overrides(tmp_path: Path, persistent: Any) -> None:
    file = snapshot(persistent, tmp_path / "a.pkl", pixel())
    assert read_published(file, sigma_max=40.0).grid["sigma_max"] == 40.0
    assert read_published(file, grid={"name": "logsnr", "sigma_min": 0.1}, sigma_max=9.0).grid == {
        "name": "logsnr",
        "sigma_min": 0.1,
        "sigma_max": 9.0,
    }


def test_convert_folder(tmp_path: Path, persistent: Any) -> None:
    for i, steps in enumerate([4, 6]):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        snapshot(persistent, tmp_path / "in" / str(i) / "network-snapshot.pkl", pixel(steps))
    made = convert(tmp_path / "in", tmp_path / "out")
    loaded = DyWeightScheduler.from_pretrained(tmp_path / "out")
    assert loaded.tables.keys() == made.tables.keys() == {3, 5}
    for n, steps in ((3, 4), (5, 6)):
        source = read_published(tmp_path / "in" / str((3, 5).index(n)) / "network-snapshot.pkl")
        assert torch.equal(loaded.tables[n].weights, source.weights) and len(source.weights) == steps
        assert loaded.tables[n].provenance == source.provenance
    assert type(loaded.host.scheduler).__name__ == "EDMEulerScheduler" and loaded.config["sigma_data"] == 0.5
    loaded.set_timesteps(5)
    assert len(loaded.timesteps) == 5


@pytest.mark.parametrize("dataset", ["ms_coco", "lsun_bedroom_ldm", "flux"])
def test_converted_solver_knows_its_network(tmp_path: Path, persistent: Any, dataset: str) -> None:
    if dataset == "flux":
        file = flux_file(tmp_path / "a.pt", FLUX)
    else:
        grid = {"schedule_type": "discrete", "schedule_rho": 1.0, "sigma_min": 0.05, "sigma_max": 14.0}
        identity = {"weights": torch.eye(4).tolist(), "t_scale": [1.0] * 4}
        file = snapshot(persistent, tmp_path / "a.pkl", pixel(4, 2, False, dataset, **grid, **identity))
    scheduler = convert(file, tmp_path / "out")
    reference = scheduler.host.scheduler
    if dataset == "flux":
        assert scheduler.config["use_dynamic_shifting"] and scheduler.config["prediction_type"] == "flow_prediction"
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.8)
        reference.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.8)
        # The first level is told as s * sigma; the grid is the pipeline's shift of the uniform one.
        assert float(scheduler.timesteps[0]) == 1000.0
        shifted = scheduler.tables[3].schedule(scheduler.host.prediction, 0.8)
        torch.testing.assert_close(float(shifted.levels[-1]), 0.0)
        second = 1 + 1.5 * (float(reference.sigmas[1]) - 1)  # sigma~_1 = 1 + w_00 (sigma_1 - 1)
        assert float(scheduler.timesteps[1]) == pytest.approx(1000 * 0.875 * second)
    else:
        beta = {"ms_coco": (0.00085, 0.012), "lsun_bedroom_ldm": (0.0015, 0.0195)}[dataset]
        alphas = (1 - torch.linspace(beta[0] ** 0.5, beta[1] ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
        levels = ((1 - alphas) / alphas).sqrt()
        scheduler.set_timesteps(4)
        told = scheduler.timesteps.double()
        near = levels[told.round().long()]
        assert bool((near / scheduler.sigmas[:-1] - 1).abs().max() < 5e-3)


# ------------------------------------------------------------------ refusals


def test_refuses_files_without_a_table(tmp_path: Path) -> None:
    good = flux_file(tmp_path / "good.pt", FLUX).read_bytes()
    files = {
        "values.pkl": pickle.dumps({"a": 1, "weights": [1.0, 2.0]}),
        "empty.pkl": b"",
        "text.pkl": b"not a pickle at all",
        "short.pt": good[: len(good) // 2],
        "other.pt": _archive({"state": torch.zeros(3)}),
        "bad.pkl": pickle.dumps({"hybrid_weights": torch.zeros(2, 3)}),
        "nan.pt": _archive({"dyweight_weights_raw": torch.full((2, 2), float("nan")), "window_size": 2}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"No \.pt or \.pkl file"):
        convert(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _archive(data: Any) -> bytes:
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 4}, "num_steps=4 grid points make 3 steps; the weights are for 4"),
        ({"t_scale": [1.0] * 4}, "t_scale must have 3 entries"),
        ({"t_scale": [1.0, -1.0, 1.0]}, "time_scale must be positive"),
        ({"mask": torch.ones(4, 4).tolist()}, r"row i may weigh the derivatives of steps i - 2 to i only"),
        ({"mask": torch.ones(3, 3).tolist()}, "mask has shape"),
        ({"schedule_type": "zigzag"}, "Unknown grid 'zigzag'"),
        ({"schedule_type": "discrete"}, "schedule_rho=7.0 has no counterpart"),
        ({"sigma_max": "large"}, "could not convert"),
        ({"sigma_max": float("nan")}, "sigma_max=nan must be a finite number"),
        ({"num_steps": float("inf")}, "num_steps=inf must be a finite number"),
        ({"num_steps": "5"}, "num_steps='5' must be a finite number"),
        ({"max_history_steps": -3}, "max_history_steps=-3 must be a finite number of at least 1"),
        ({"num_steps": torch.ones(3)}, r"a\.pkl: "),
    ],
)
def test_refuses_contradictions(tmp_path: Path, persistent: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_published(snapshot(persistent, tmp_path / "a.pkl", pixel(**changes)))


def test_refuses_mixtures(tmp_path: Path, persistent: Any) -> None:
    first = snapshot(persistent, tmp_path / "a.pkl", pixel())
    with pytest.raises(ValueError, match=r"b\.pkl and a\.pkl are both for 3 evaluations"):
        convert([first, snapshot(persistent, tmp_path / "b.pkl", pixel())], tmp_path / "out")
    with pytest.raises(ValueError, match="different models"):
        convert([first, snapshot(persistent, tmp_path / "b.pkl", pixel(6, dataset="ffhq"))], tmp_path / "out")
    unknown = snapshot(persistent, tmp_path / "b.pkl", pixel(dataset="mine"))
    with pytest.raises(ValueError, match=r"'mine'.*config=pipe.scheduler.config"):
        convert(unknown, tmp_path / "out")
    assert convert(unknown, tmp_path / "out", config=CONFIGS["ffhq"]).tables.keys() == {3}


# ------------------------------------------------------------------ nothing is executed


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def _payloads(marker: Path) -> dict[str, bytes]:
    import builtins
    import os
    import subprocess

    touch = f"open({str(marker)!r}, 'w').close()"
    inner = pickle.dumps(_Call(os.system, f"touch {marker}"))
    objects = {
        "os.system": _Call(os.system, f"touch {marker}"),
        "exec": _Call(builtins.exec, touch),
        "eval": _Call(builtins.eval, touch),
        "open": _Call(builtins.open, str(marker), "w"),
        "subprocess": _Call(subprocess.check_call, ["touch", str(marker)]),
        "storage": _Call(torch.storage._load_from_bytes, inner),
        "torch.load": _Call(torch.load, io.BytesIO(inner)),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "numpy": _Call(__import__, "numpy.testing"),
    }
    payloads = {k: pickle.dumps({"hybrid_weights": torch.eye(3), "x": v}) for k, v in objects.items()}
    # A chain of calls: getattr(__import__("os"), "system")("touch marker"), and dotted names of protocol 4.
    command = f"touch {marker}".encode()
    payloads["chain"] = (
        b"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'" + command + b"'\ntR."
    )
    payloads["dotted"] = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R."
    payloads["posix"] = b"cposix\nsystem\n(S'" + command + b"'\ntR."
    payloads["inst"] = b"(S'" + command + b"'\nios\nsystem\n."
    # A storage whose header is a program.
    payloads["header"] = pickle.dumps(_Call(torch.storage._load_from_bytes, payloads["posix"] * 5))
    return payloads


NAMES = sorted(_payloads(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_do_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    payload = _payloads(marker)[name]
    if name not in ("torch.load", "getattr", "numpy"):
        with contextlib.suppress(RuntimeError):  # the payload works: an ordinary load runs it, whatever it says after
            pickle.loads(payload)
        assert marker.exists()
        marker.unlink()
    for suffix in (".pkl", ".pt"):
        file = tmp_path / f"evil{suffix}"
        file.write_bytes(payload)
        try:
            convert(file, tmp_path / "out")
        except ValueError as error:
            assert str(file) in str(error)
        assert not marker.exists()


def test_no_module_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(b"cantigravity\nfly\n(tR.")
    with pytest.raises(ValueError, match="no solver table"):
        read_published(file)
    assert "antigravity" not in sys.modules


def test_objects_in_an_archive_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    good = torch.load(flux_file(tmp_path / "a.pt", FLUX))
    torch.save({**good, "extra": _Call(Path.touch, marker)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt .*holds an object"):
        read_published(tmp_path / "b.pt")
    assert not marker.exists()


def _doubled(use: bytes) -> bytes:
    """t = (t, t), 60 times over, and what is done with it: less than 300 bytes, and walking it takes 2^60 steps."""
    return b"\x80\x04" + use % (b"N" + b"2\x86" * 60) + b"."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04Nr" + (2**32 - 1).to_bytes(4, "little") + b".", "no solver table"),
        (b"\x80\x04N" + b"p4000000000\n" + b".", "no solver table"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "instruction that no table needs"),
        (b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b".", "EOFError"),
        (_doubled(b"}" + b"%sNs"), "a key is larger"),
        (_doubled(b"}(%sNu"), "a key is larger"),
        (_doubled(b"(%sNd"), "a key is larger"),
        (_doubled(b"\x8f(%s\x90"), "a key is larger"),
        (_doubled(b"(%s\x91"), "a key is larger"),
        (_doubled(b"}X\x09\x00\x00\x00num_steps%ss"), "no solver table"),
        (_doubled(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00%sK\x01\x85tR"), "a tensor of shape"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(J\xff\xff\xff\x7fX\x01\x00\x00\x00at)tR.",
            "a tensor of shape",
        ),
        (b"\x80\x04" + b"(" * 10**5, "IndexError|truncated|EOFError"),
        (b"\x80\x04)" + b"\x85" * 10**5 + b"}\x94h\x00" + b".", "no solver table"),
        (b"\x80\x04}N" + b"\x85" * 10**5 + b"Ns.", "a key is larger"),
        (b"\x80\x04" + b"".join(b"ca%d\nb\n0" % i for i in range(10**4)) + b"N.", "more than its own size"),
        (b"\x80\x04cx\nf\n\x94(" + b"N" * 10**5 + b"t\x94" + b"h\x00h\x01R0" * 10**4 + b"N.", "more than its own size"),
        (
            b"\x80\x02c_codecs\nencode\nq\x00X\x40\x42\x0f\x00"
            + b"a" * 10**6
            + b"\x85q\x01"
            + b"h\x00h\x01R0" * 10**4
            + b"N.",
            "more than its own size",
        ),
        (b"\x80\x04ctorch._utils\n_rebuild_parameter\nN}X\x01\x00\x00\x00aK\x07s\x86b.", "a state"),
    ],
    ids=count(),  # else some versions of pytest name them by their content: a megabyte
)
def test_a_pickle_takes_no_time_nor_memory_and_writes_to_no_function(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "evil.pkl").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=said) as caught, _memory(64 * 10**6 + 50 * len(content)):
        read_published(tmp_path / "evil.pkl")
    assert time.perf_counter() - start < 5
    assert len(str(caught.value)) < 1000


@contextlib.contextmanager
def _memory(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


def test_a_storage_named_often_is_one() -> None:
    """As torch.save writes 150 tensors that share theirs: read once, not 150 times."""
    storage = torch.arange(1000.0)
    views = read_pickle(_archive({"views": [storage[i:] for i in range(150)]}))["views"]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert all(torch.equal(view, storage[i:]) for i, view in enumerate(views))


def test_a_storage_within_a_pickle_made_often_is_refused(tmp_path: Path) -> None:
    call, inner = b"ctorch.storage\n_load_from_bytes\n", io.BytesIO()
    torch.save(torch.zeros(10**6).storage(), inner, _use_new_zipfile_serialization=False)
    raw = inner.getvalue()
    once = b"\x80\x03" + call + b"q\x00B" + len(raw).to_bytes(4, "little") + raw + b"\x85q\x01"
    (tmp_path / "a.pkl").write_bytes(once + b"h\x00h\x01R0" * 150 + b"N.")
    with pytest.raises(ValueError, match="more than its own size"):
        read_published(tmp_path / "a.pkl")


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x04N." + bytes(10**6))
    with pytest.raises(ValueError, match="would be larger unpacked"):
        read_published(tmp_path / "bomb.pt")


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: Path) -> None:
    class Wide:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.zeros(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, 0, (2, 2), (1000, 1000), False, {})

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"hybrid_weights": Wide()}))
    with pytest.raises(ValueError, match=r"a\.pkl is not a readable"):
        read_published(tmp_path / "a.pkl")


# ------------------------------------------------------------------ the released numbers


@pytest.mark.skipif(not PUBLISHED, reason="the published tables are not at hand")
@pytest.mark.parametrize("name", PUBLISHED)
def test_released_tables(tmp_path: Path, persistent: Any, name: str) -> None:
    stored = PUBLISHED[name]
    flux = "dyweight_weights_raw" in stored
    file = flux_file(tmp_path / "a.pt", stored) if flux else snapshot(persistent, tmp_path / "a.pkl", stored)
    scheduler = convert(file, tmp_path / "out")
    (table,) = scheduler.tables.values()
    absolute = torch.tensor(stored["dyweight_weights_raw" if flux else "weights"])
    scale = stored["dyweight_t_scales" if flux else "t_scale"]
    n, afs = len(absolute), bool(stored.get("afs", False))
    back = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for lag in range(min(i + 1, table.weights.shape[1])):
            back[i, i - lag] = table.weights[i, lag]
    assert torch.equal(back.float(), absolute)
    assert table.time_scale[int(afs) :].float().tolist() == torch.tensor(scale).tolist()
    assert table.weights.shape[1] == min(stored.get("window_size", stored.get("max_history_steps")), n)
    # The folder's name says how many evaluations it costs; guidance counts double there.
    nfe = int(name.rsplit("nfe", 1)[1].removesuffix(".pt")) // (2 if "mscoco" in name else 1)
    assert table.num_inference_steps == nfe
    # Its levels are ones the network was trained on, and it can be run.
    scheduler.set_timesteps(nfe, mu=0.8)
    assert len(scheduler.timesteps) == nfe and bool((scheduler.timesteps < 1250).all())
    if "mscoco" in name:
        assert table.grid["name"] == "discrete" and table.grid["sigma_max"] == pytest.approx(14.6146, abs=1e-4)


# ------------------------------------------------------------------ NeuralSolver


def _data() -> dict[str, Any]:
    from importlib import resources

    return json.loads((resources.files("dywspan") / "data" / "neuralsolver.json").read_text())["tables"]


def test_neuralsolver_flow_is_the_published_update() -> None:
    """Run the published rule in its own variables (t up, v = -d, absolute steps) beside our table."""
    matrix = torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return matrix @ x * (1 + t) - t

    prediction = DyWeightScheduler(prediction_type="flow_prediction").host.prediction
    for table in neuralsolver_tables():
        data = _data()["flow_matching"][f"step{table.num_inference_steps}"]
        deltas = torch.tensor(data["timedeltas"], dtype=torch.float64)
        deltas = (deltas / deltas.sum()).tolist()
        x, t, past = torch.ones(2, dtype=torch.float64), 0.0, []
        for delta, row in zip(deltas, data["coeffs"]):
            past.append(velocity(x, t))
            mixed = sum((c * v for c, v in zip(row, past)), (1 - sum(row)) * past[-1])
            x, t = x + delta * mixed, t + delta
        schedule = table.schedule(prediction)
        ours = rollout(schedule, lambda x, sigma, tau: -velocity(x, 1 - float(tau)), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)
        assert float(schedule.levels[0]) == 1.0 and float(schedule.levels[-1]) == 0.0


def test_neuralsolver_ddpm_is_the_published_update() -> None:
    """Published: x in the variance-preserving frame, data predictions, lambda = alpha/sigma. Ours runs on x/alpha."""

    def levels(t: float) -> tuple[float, float]:
        t = max(t, 1e-3)
        integral = torch.tensor(0.1 * t + 19.9 * t * t / 2, dtype=torch.float64)
        return float((-integral / 2).exp()), float((-torch.expm1(-integral)).sqrt())

    def denoised(y: torch.Tensor, ratio: float) -> torch.Tensor:
        return torch.tanh(y / (1 + ratio**2) + 0.3) * torch.tensor([1.0, -0.5], dtype=torch.float64)

    prediction = DyWeightScheduler(beta_start=1e-4, beta_end=0.02).host.prediction
    noise = torch.tensor([0.7, -1.3], dtype=torch.float64)
    for table in neuralsolver_tables("ddpm"):
        data = _data()["ddpm"][f"step{table.num_inference_steps}"]
        t, past = 0.999, []
        alpha, sigma = levels(t)
        x = sigma * noise
        for delta, row in zip(data["timedeltas"], data["coeffs"]):
            past.append(denoised(x / alpha, sigma / alpha))
            mixed = sum((c * d for c, d in zip(row, past)), (1 - sum(row)) * past[-1])
            following = levels(t - delta)
            jump = following[0] / following[1] - alpha / sigma
            x = following[1] / sigma * x + following[1] * jump * mixed
            t, (alpha, sigma) = t - delta, following
        schedule = table.schedule(prediction)
        ours = rollout(schedule, lambda y, s, tau: (y - denoised(y, float(tau))) / s, float(schedule.levels[0]) * noise)
        torch.testing.assert_close(ours, x / alpha, rtol=1e-9, atol=1e-9)


def test_neuralsolver_serves_any_flow_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    host = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = DyWeightScheduler.from_config(host.config).with_tables(neuralsolver_tables())
    assert sorted(scheduler.tables) == [5, 6, 7, 8, 9, 10, 15]
    scheduler.set_timesteps(8)
    deltas = _data()["flow_matching"]["step8"]["timedeltas"]
    expected = [1000 * (1 - sum(deltas[:i]) / sum(deltas)) for i in range(8)]
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(expected))
    with pytest.raises(ValueError, match="family='other'"):
        neuralsolver_tables("other")
