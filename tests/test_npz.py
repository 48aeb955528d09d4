"""npz files of ADM's evaluator: read, compared with, written; Frechet distances held against closed forms and against
torch-fidelity.
"""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from evaluation_toys import CFG, SIZE, Knows, Lossless, Toy, one_per_class, setup
from PIL import Image
from torch import Tensor

from vfmlab import config, data
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import npz, samples
from vfmlab.evaluation import protocol as p
from vfmlab.evaluation.features import FeatureSpace, Seen
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.generation import evaluate_generation, labels_of
from vfmlab.evaluation.instruments import perceptual, pixels
from vfmlab.evaluation.protocol import real_features
from vfmlab.evaluation.reconstruction import evaluate_reconstruction

BASE = config.Protocol(n=60, batch=25, sampler=config.Sampler(steps=2))


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    for module in (pixels, perceptual):
        monkeypatch.setattr(module, "perceptual", lambda *_: "no weights in this test")


class Stand(Toy):
    """In the place of Inception: ten features, five spatial ones, twelve classes."""

    def forward(self, images: Tensor) -> Seen:
        features = super().forward(images).features
        return Seen(features, 9 * features @ self.weight[:12].T, images.flatten(1)[:, 100:105])


def stand() -> Stand:
    space = Stand()
    space.name = "inception"
    return space


def pictures(n: int, seed: int, side: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def statistics(d: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"mu": draw.normal(size=d), "sigma": np.diag(draw.uniform(0.5, 2, d))}


def against(path, space: FeatureSpace | None = None, protocol=BASE):
    """The set-up of an evaluation that compares samples with the file."""
    s = setup(protocol, space=space or stand())
    s.reference = npz.open_reference(path, SIZE)
    return s


def knowing(noise: float = 0.3):
    tokenizer = Lossless()
    images = one_per_class(data.open_source(CFG, "val"))
    return Knows(tokenizer.encode(images).mode(), noise), tokenizer, len(images)


def drawn(tmp_path, name="samples.npz", protocol=BASE, **more):
    network, tokenizer, classes = knowing()
    about = samples.facts(protocol, run="toy")
    return samples.write(network, tokenizer, protocol, classes, tmp_path / name, about, **more)


def measured(s, protocol=BASE):
    network, tokenizer, classes = knowing()
    return evaluate_generation(network, tokenizer, CFG, protocol, classes, setup=s)


# -- Frechet distances ----------------------------------------------------------------------------------------------------


def test_distance_of_given_statistics_is_the_closed_form(tmp_path):
    """Diagonal covariances a, b: |m - n|^2 + sum (sqrt a - sqrt b)^2; spatial statistics likewise."""
    files = []
    for k in (0, 1):
        spatial = {f"{key}_s": value for key, value in statistics(5, 10 + k).items()}
        files.append(tmp_path / f"{k}.npz")
        np.savez(files[-1], **statistics(10, k), **spatial)
    a, b = (npz.open_reference(path) for path in files)
    for of, seeds, d in (("features", (0, 1), 10), ("spatial", (10, 11), 5)):
        one, two = (statistics(d, seed) for seed in seeds)
        roots = np.sqrt(np.diag(one["sigma"])) - np.sqrt(np.diag(two["sigma"]))
        expected = ((one["mu"] - two["mu"]) ** 2).sum() + (roots**2).sum()
        assert frechet_distance(a.moments(of), b.moments(of)) == pytest.approx(expected, rel=1e-9)


def test_our_distance_is_torch_fidelitys_on_the_same_folders(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):
        """The toy space as torch-fidelity wants it."""

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.space = Toy()

        def forward(self, images):
            return (self.space(data.to_float(images)).features,)

        @staticmethod
        def get_provided_features_list():
            return ("toy",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "toy"

    fidelity.register_feature_extractor("toy", Extractor)
    folders = []
    for k in (0, 1):
        folders.append(tmp_path / f"set{k}" / "all")
        folders[-1].mkdir(parents=True)
        for i, image in enumerate(pictures(64, k) // (k + 1)):
            Image.fromarray(image).save(folders[-1] / f"{i:03d}.png")
    theirs = fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, feature_extractor="toy", feature_layer_fid="toy",
        cuda=False, batch_size=16, verbose=False, cache=False, save_cpu_ram=True,
    )["frechet_inception_distance"]  # fmt: skip
    space = Toy()
    sets = [FeatureSet.empty(space.dimension).update(space(torch.stack(
        [data.to_float(data.read_image(path, SIZE)) for path in sorted(folder.iterdir())])).features) for folder in folders]
    assert frechet_distance(*sets) == pytest.approx(theirs, rel=1e-4)
    assert theirs > 1


# -- a reference ----------------------------------------------------------------------------------------------------------


def test_a_round_trip_of_samples_is_their_own_reference(tmp_path):
    """Samples written to npz, taken as reference of the same run: every distance is zero, precision and recall one."""
    numbers = measured(against(drawn(tmp_path)))
    for name in ("gfd", "sfd"):
        assert numbers[name].value == pytest.approx(0, abs=1e-6), name
    assert numbers["precision"].value == numbers["recall"].value == 1
    assert numbers["gfd_own"].value > 0.01
    assert {"reference"} < set(numbers.protocol)
    assert numbers["gfd"].protocol != measured(setup(BASE, space=stand()))["gfd"].protocol


def test_training_images_are_a_reference():
    """Of the same images one distance is zero; held-out ones, their hash and their stored features stay apart."""
    trained = BASE.model_copy(update={"reference": "train"})
    s = p.open_setup(CFG, trained)
    assert s.reference.n == CFG.train
    parts = list(s.reference.images(7))
    images = data.open_source(CFG, "train").batch(torch.arange(CFG.train)).images
    assert torch.equal(torch.cat(parts), images)
    space = s.space(data.to_float(images)).features
    torch.testing.assert_close(p.compared_features(s).features(), space, atol=1e-4, rtol=1e-4)
    assert s.resolved(compared=True).hash != p.open_setup(CFG, BASE).resolved(compared=True).hash
    assert s.resolved().hash == p.open_setup(CFG, BASE).resolved().hash, "reconstructions have their own images"


def test_statistics_of_a_file_stand_in_for_its_images(tmp_path):
    """mu and sigma are compared with; rows, for precision and the kernel distance, are those of arr_0."""
    np.savez(tmp_path / "both.npz", arr_0=pictures(30, 0), **statistics(10, 0))
    np.savez(tmp_path / "images.npz", arr_0=pictures(30, 0))
    np.savez(tmp_path / "numbers.npz", **statistics(10, 0))
    both, images, alone = (measured(against(tmp_path / f"{name}.npz")) for name in ("both", "images", "numbers"))
    assert both["gfd"].value == pytest.approx(alone["gfd"].value) != pytest.approx(images["gfd"].value)
    for name in ("gkd", "precision", "recall", "sfd"):
        assert both[name].value == pytest.approx(images[name].value)
        assert alone[name].absent
    for name in ("gfd_own", "gkd_own"):  # reconstructions have images, whatever the reference
        assert alone[name].value == pytest.approx(both[name].value)
    assert "without images" in alone["precision"].reason
    assert "classes of the images" in both["gkd_corrected"].reason
    assert "mu_s" in alone["sfd"].reason
    assert alone["gfd"].n == 60
    rows = stand()(data.to_float(torch.from_numpy(pictures(30, 0)).permute(0, 3, 1, 2))).features
    torch.testing.assert_close(p.compared_features(against(tmp_path / "both.npz")).features(), rows)


def test_reconstructions_are_compared_with_the_reference_beside_their_own_images(tmp_path):
    np.savez(tmp_path / "numbers.npz", **statistics(10, 0))
    s = against(tmp_path / "numbers.npz")
    numbers = evaluate_reconstruction(Lossless(), CFG, BASE, s)
    plain = evaluate_reconstruction(Lossless(), CFG, BASE, setup(BASE, space=stand()))
    assert numbers["rfd"] == plain["rfd"], "against the same images, whatever the reference"
    assert "rfd_reference" not in plain
    expected = frechet_distance(real_features(s), s.reference.moments("features"))
    assert numbers["rfd_reference"].value == pytest.approx(expected, rel=1e-6)
    assert numbers["rfd_reference"].protocol != numbers["rfd"].protocol


def test_rows_of_many_images_are_held_all_over_the_file(tmp_path, monkeypatch):
    """It may be sorted by class: the first rows would be those of the first classes."""
    for module in ("frechet", "npz"):
        monkeypatch.setattr(f"vfmlab.evaluation.{module}.ROWS", 8)
    np.savez(tmp_path / "many.npz", arr_0=pictures(30, 0))
    np.savez(tmp_path / "few.npz", arr_0=pictures(8, 0))
    features = stand()(data.to_float(torch.from_numpy(pictures(30, 0)).permute(0, 3, 1, 2))).features
    many, few = (against(tmp_path / f"{name}.npz", protocol=BASE.model_copy(update={"batch": 7})) for name in ("many", "few"))
    for _ in range(2):  # measured, then cached
        torch.testing.assert_close(p.compared_features(many).features(), features[[0, 4, 8, 12, 15, 19, 23, 27]])
    assert p.compared_features(many).count == 30
    torch.testing.assert_close(p.compared_features(few).features(), stand()(next(
        data.to_float(x) for x in few.reference.images(8))).features)
    assert many.resolved(compared=True).sections["reference"]["rows"] == "spread"
    assert "rows" not in few.resolved(compared=True).sections["reference"]


def test_score_precision_and_recall_are_adms(tmp_path):
    """By hand: parts of 5,000 in order, the third neighbour's distance as radius."""
    pytest.importorskip("torch_fidelity")
    np.savez(tmp_path / "images.npz", arr_0=pictures(40, 0) // 2 + 60)
    numbers = measured(against(tmp_path / "images.npz"))
    space, (network, tokenizer, classes) = stand(), knowing()
    seen = [space(batch) for batch in _drawn(network, tokenizer, classes)]
    rows, real = torch.cat([s.features for s in seen]), p.compared_features(against(tmp_path / "images.npz")).features()

    def inside(points: Tensor, manifold: Tensor) -> float:
        radii = torch.cdist(manifold, manifold).sort(1).values[:, 3]
        return float((torch.cdist(points, manifold) <= radii).any(1).float().mean())

    assert numbers["precision"].value == pytest.approx(inside(rows, real))
    assert numbers["recall"].value == pytest.approx(inside(real, rows))
    p_yx = torch.cat([s.logits for s in seen]).double().softmax(1)
    score = float((p_yx * (p_yx.log() - p_yx.mean(0).log())).sum(1).mean().exp())
    assert numbers["inception_score"].value == pytest.approx(score, rel=1e-6)


def _drawn(network, tokenizer, classes):
    from vfmlab.evaluation.generation import drawn as batches
    from vfmlab.evaluation.roundtrip import as_saved

    return [as_saved(b) for b in batches(network, tokenizer, BASE, torch.arange(60).split(25), classes)]


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, "images of 8 px, this run's have 16 px"),
        ({"arr_0": np.zeros((4, SIZE, SIZE, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((4, 3, SIZE, SIZE), np.uint8)}, r"arr_0 is uint8 \(4, 3, 16, 16\)"),
        ({"arr_0": np.zeros((0, SIZE, SIZE, 3), np.uint8)}, "arr_0 is uint8"),
        ({"images": np.zeros((4, SIZE, SIZE, 3), np.uint8)}, "neither arr_0 .* but images"),
        ({"mu": np.zeros(10)}, "one of mu and sigma"),
        ({"mu": np.zeros(10), "sigma": np.eye(9)}, r"sigma \(9, 9\)"),
        ({"mu": np.full(10, np.nan), "sigma": np.eye(10)}, "not finite"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "2048 Inception features"),
        ({"mu": np.array([None] * 10, object), "sigma": np.eye(10)}, "mu cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, arrays, line):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=line) as error:
        p.given(against(tmp_path / "x.npz"), "features")
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_or_damaged_is_one_line(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        npz.open_reference(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(DataError, match="no npz file"):
        npz.open_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0))
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        whole = file.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as file:
        file.writestr("arr_0.npy", whole[:-100])
    with pytest.raises(DataError, match="ends early"):
        list(npz.open_reference(tmp_path / "short.npz").images(2))
    np.savez_compressed(tmp_path / "x.npz", arr_0=pictures(5, 0))
    content = (tmp_path / "x.npz").read_bytes()
    flags = content.rindex(b"PK\x01\x02") + 8
    for at, junk in ((0, b"XXXX"), (45, b"\xff" * 40), (flags, b"\x01")):  # its head, its data, "encrypted"
        (tmp_path / "y.npz").write_bytes(content[:at] + junk + content[at + len(junk):])
        with pytest.raises(DataError, match="arr_0 cannot be read"):
            list(npz.open_reference(tmp_path / "y.npz").images(2))


def test_one_image_is_no_reference_unless_its_statistics_are_given(tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=pictures(1, 0))
    protocol = BASE.model_copy(update={"reference": str(tmp_path / "one.npz")})
    with pytest.raises(DataError, match="one image.*a reference of at least 2 images"):
        p.open_compared(protocol, CFG)
    np.savez(tmp_path / "one.npz", arr_0=pictures(1, 0), **statistics(10, 0))
    assert p.open_compared(protocol, CFG).n == 1


def test_statistics_belong_to_inception(tmp_path):
    np.savez(tmp_path / "x.npz", **statistics(10, 0))
    with pytest.raises(DataError, match=r"protocol.features 'toy' .* set protocol.features=inception"):
        p.given(against(tmp_path / "x.npz", Toy()), "features")


# -- samples into a file --------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_evaluation_and_a_broken_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "PART", 16)
    seen, network = [], knowing()[0]
    path = drawn(tmp_path, progress=lambda *x: seen.append(x))
    with np.load(path) as file:
        whole = file["arr_0"]
    assert (whole.shape, whole.dtype) == ((60, SIZE, SIZE, 3), np.uint8)
    network, tokenizer, classes = knowing()
    expected = data.to_uint8(torch.cat(_drawn(network, tokenizer, classes))).permute(0, 2, 3, 1).numpy()
    assert np.abs(whole.astype(int) - expected).max() <= 1
    assert [tuple(x) for x in seen] == [(16, 60), (32, 60), (48, 60), (60, 60)]
    assert sorted(each.name for each in tmp_path.glob("samples*")) == ["samples.json", "samples.npz"]

    def stops(done, total):
        if done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path, "two.npz", progress=stops)
    kept = tmp_path / "two.parts" / "00000000.npy"
    stamp = kept.stat().st_mtime_ns
    monkeypatch.setattr(samples.shutil, "rmtree", lambda folder: None)
    with np.load(drawn(tmp_path, "two.npz")) as file:
        assert np.array_equal(file["arr_0"], whole)
    assert kept.stat().st_mtime_ns == stamp, "what was there is not drawn anew"


def test_a_place_that_other_samples_have_taken_is_refused(tmp_path):
    drawn(tmp_path)
    assert drawn(tmp_path).exists()
    for change in ({"seed": 1}, {"labels": "random"}, {"n": 50}):
        with pytest.raises(DataError, match="other samples; give another --out"):
            drawn(tmp_path, protocol=BASE.model_copy(update=change))
    np.savez(tmp_path / "mine.npz", x=np.zeros(1))
    with pytest.raises(DataError, match="other samples"):
        drawn(tmp_path, "mine.npz")


def test_random_labels_follow_the_id_and_the_seed():
    ids = torch.arange(3000)
    drawn_ = labels_of(ids, 7, BASE.model_copy(update={"labels": "random"}))
    counts = drawn_.bincount(minlength=7)
    assert counts.min() > 350
    assert counts.unique().numel() > 1, "drawn, not balanced"
    assert torch.equal(labels_of(ids[100:], 7, BASE.model_copy(update={"labels": "random"})), drawn_[100:])
    assert not torch.equal(labels_of(ids, 7, BASE.model_copy(update={"labels": "random", "seed": 1})), drawn_)
    assert torch.equal(labels_of(ids, 7, BASE), ids % 7)


def test_labels_and_precision_are_part_of_the_hash():
    hashes = {BASE.labels: setup(BASE).resolved(sampling=True).hash}
    for change in ({"labels": "random"}, {"precision": "bf16"}, {"precision": "tf32"}):
        hashes[str(change)] = setup(BASE.model_copy(update=change)).resolved(sampling=True).hash
    assert len(set(hashes.values())) == 4
    protocol = BASE.model_copy(update={"precision": "tf32"})
    with pytest.raises(ConfigError, match="'cpu' has no TF32"):
        measured(setup(protocol), protocol)


def test_two_calls_do_not_draw_into_one_file(tmp_path):
    def second(*_):
        with pytest.raises(DataError, match=r"samples.npz' is being drawn by another call; wait for it, or give another --out"):
            drawn(tmp_path)
        calls.append(drawn(tmp_path, "other.npz"))

    calls: list = []
    first = drawn(tmp_path, progress=second)
    assert first.read_bytes() == calls[0].read_bytes(), "what was refused has not changed it"
