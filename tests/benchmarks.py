"""The choices that the library makes, timed against their alternatives: `python tests/benchmarks.py [NAME ...]`.

Two variants are timed in turn by `torch.utils.benchmark`, in alternating order, so that a machine that gets busy or warm
slows both. Each pair of neighbours gives a ratio; the median ratio is printed with the middle half of the ratios. No
threshold is enforced: `goal` says what the design expects, and the reader sees whether it holds. The figures go to
`--out` as JSON, with the machine they are from.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from vfmlab import api, config, data, presets, runs
from vfmlab.diffusion import latents
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.errors import ConfigError, VfmlabError, nearest
from vfmlab.evaluation import frechet
from vfmlab.evaluation.representation import cknna
from vfmlab.nn.modulation import modulated_conv
from vfmlab.registry import NETWORKS
from vfmlab.seeding import StepRandom, generator
from vfmlab.tokenizers.base import Statistics

Result = dict[str, Any]
Call = Callable[[], Any]
PROCESS = "/proc/self/status"
MATRIX_UNITS = "above 1 where bf16 has matrix units (GPU, AMX)"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Call) -> float:
    """Seconds of one call; the GPU's queue is empty before and after."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.timeit(1).median  # torch calls it twice more, to warm up


def ratio(ours: Call, other: Call, repeats: int) -> Result:
    """Seconds of `other` over seconds of `ours`: median and middle half of the ratios of alternating pairs."""
    pairs = []
    for k in range(repeats):
        first, second = (ours, other) if k % 2 == 0 else (other, ours)
        times = {first: seconds(first), second: seconds(second)}
        pairs.append((times[ours], times[other]))
    ratios = [theirs / mine for mine, theirs in pairs]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    mine, theirs = (median(column) for column in zip(*pairs, strict=True))
    return {"ratio": median(ratios), "spread": [low, high], "ours_seconds": mine, "other_seconds": theirs, "repeats": repeats}


def trainer(module: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype | None = None) -> Call:
    """A training step of `module`: forward in `precision` (None: fp32), backward, AdamW."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype=precision) if precision else contextlib.nullcontext():
            value = loss()
        value.backward()
        optimizer.step()

    return step


# -- parts ----------------------------------------------------------------------------------------------------------


def grouped_modulated_conv(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True) -> Tensor:
    """`modulated_conv` with one set of weights per sample in a grouped convolution."""
    batch, _, height, width = x.shape
    weights = weight[None] * style[:, None, :, None, None]  # B O I k k
    if demodulate:
        weights = weights * (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    y = F.conv2d(x.reshape(1, -1, height, width), weights.flatten(0, 1), padding=weight.shape[-1] // 2, groups=batch)
    return y.view(batch, -1, height, width)


def modulated_layers(shapes: Sequence[tuple[int, int, int]], batch: int, repeats: int) -> Result:
    """Forward and backward of modulated 1x1 layers (inputs, outputs, side in pixels) in both formulations."""
    layers, difference = [], 0.0
    for inputs, outputs, side in shapes:
        draw = generator("bench", inputs, outputs, side)
        sizes = {"x": (batch, inputs, side, side), "weight": (outputs, inputs, 1, 1), "style": (batch, inputs)}
        tensors = {k: torch.randn(*s, generator=draw).to(DEVICE).requires_grad_() for k, s in sizes.items()}
        layers.append(tensors)
        with torch.no_grad():
            a, b = modulated_conv(**tensors), grouped_modulated_conv(**tensors)
            difference = max(difference, float((a - b).abs().max() / b.abs().max()))

    def both(function: Callable[..., Tensor]) -> None:
        for tensors in layers:
            torch.autograd.grad(function(**tensors).square().mean(), list(tensors.values()))

    result = ratio(partial(both, modulated_conv), partial(both, grouped_modulated_conv), repeats)
    shown = ", ".join(f"{i} -> {o} at {side} px" for i, o, side in shapes)
    what = f"grouped convolution / shared weights, {shown}, batch {batch}"
    return {"what": what, **result, "detail": {"relative difference": difference}}


def modulation(repeats: int) -> Result:
    """Modulated 1x1 layers at the paper's widths: scales on the activations against weights per sample."""
    batch = 32 if DEVICE.type == "cuda" else 8
    return {**modulated_layers([(512, 2048, 8), (512, 2048, 16)], batch, repeats), "goal": "above 1"}


def modulation_pocket(repeats: int) -> Result:
    """The same at the pocket tier's widths, where weights are small beside activations."""
    result = modulated_layers([(64, 256, 8), (64, 256, 16), (32, 128, 32)], 32, repeats)
    return {**result, "goal": "below 1 where memory traffic decides"}


def frechet_distance(repeats: int) -> Result:
    """Frechet distance at 2048 dimensions: eigenvalues of a symmetric product against scipy's matrix square root."""
    import numpy as np
    from scipy.linalg import sqrtm

    dimension, count = 2048, 4096
    draw = generator("bench", "frechet")
    mix = torch.randn(dimension, dimension, generator=draw, dtype=torch.float64) / dimension**0.5
    sides = []
    for shift in (0.0, 0.05):
        moments = frechet.Moments(dimension)
        for _ in range(count // 1024):
            moments.update(torch.randn(1024, dimension, generator=draw, dtype=torch.float64) @ mix + shift)
        sides.append(moments)
    means, covariances = [m.mean.numpy() for m in sides], [m.covariance.numpy() for m in sides]

    def classic() -> float:
        root = np.trace(sqrtm(covariances[0] @ covariances[1])).real
        apart = means[0] - means[1]
        return float(apart @ apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)

    ours, theirs = frechet.frechet_distance(*sides), classic()
    result = ratio(lambda: frechet.frechet_distance(*sides), classic, min(repeats, 3))
    detail = {"relative difference": abs(ours - theirs) / abs(theirs)}
    what = f"scipy sqrtm / eigenvalues, {dimension} dimensions"
    return {"what": what, **result, "goal": "5x, difference below 1e-6", "detail": detail}


def dense_cknna(a: Tensor, b: Tensor, k: int = 10, product: bool = True) -> Tensor:
    """CKNNA as its definition reads, with N x N kernels and masks; features of unit length. Unbiased HSIC.

    Args:
        product: the last term from a product of two N x N matrices, as in the formula; False: from sums of them.
    """
    n = len(a)

    def neighbours(kernel: Tensor) -> Tensor:
        best = kernel.clone().fill_diagonal_(-math.inf).topk(k, dim=1).indices
        return torch.zeros_like(kernel).scatter_(1, best, 1.0)

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        chained = (one @ other).sum() if product else one.sum(0) @ other.sum(1)
        ends = one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)
        return ((one * other.T).sum() + ends) / (n * (n - 3))

    kernels = [x @ x.T for x in (a, b)]
    masks = [neighbours(kernel) for kernel in kernels]

    def similarity(i: int, j: int) -> Tensor:
        mask = (masks[i] * masks[j]).fill_diagonal_(0)
        return hsic(mask * kernels[i], mask * kernels[j])

    return similarity(0, 1) / (similarity(0, 0) * similarity(1, 1)).sqrt()


def related(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Two representations n x width of unit length that share a part."""
    draw = generator("bench", "cknna")
    shared = torch.randn(n, width, generator=draw)
    sides = (shared + torch.randn(n, width, generator=draw) for _ in range(2))
    first, second = (nn.functional.normalize(x, dim=1) for x in sides)
    return first, second


def cknna_neighbours(repeats: int, n: int = 10_000, width: int = 768) -> Result:
    """CKNNA on the k neighbours alone against N x N kernels and masks; peak memory of a process that does only ours.

    The formula's product of N x N matrices takes minutes on one core, so it is timed once; the ratio with a spread is to
    sums in its place.
    """
    a, b = related(n, width)
    ours, theirs = cknna(a, b), float(dense_cknna(a, b, product=False))
    result = ratio(partial(cknna, a, b), partial(dense_cknna, a, b, product=False), min(repeats, 5))
    detail = {"relative difference": abs(ours - theirs) / abs(theirs)}
    whole = seconds(partial(dense_cknna, a, b)) / seconds(partial(cknna, a, b))
    detail["ratio to the formula as it stands"] = round(whole, 1)
    if Path(PROCESS).exists():  # Linux; getrusage would give the peak of whoever started the process
        code = f"import benchmarks as b; b.cknna(*b.related({n}, {width})); print(open('{PROCESS}').read())"
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        detail["peak memory (GB)"] = round(int(done.stdout.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9, 2)
    what = f"N x N matrices / neighbours only, N = {n:,}, width {width}"
    return {"what": what, **result, "goal": "5x to the formula, under 2 GB in all", "detail": detail}


# -- training -------------------------------------------------------------------------------------------------------


def pocket() -> config.Recipe:
    return presets.get("pocket_vfm_vae")


def latent_shape(run: config.Recipe) -> tuple[int, int, int]:
    side = run.data.size // run.tokenizer.factor
    return run.tokenizer.channels, side, side


def diffusion(run: config.Recipe, num_classes: int = 10) -> tuple[DiffusionObjective, Tensor, Tensor]:
    """The objective of a run's diffusion phase with random latents and labels of its batch size."""
    shape = latent_shape(run)
    network = NETWORKS.get(run.diffusion.network.kind)(run.diffusion.network, shape, num_classes)
    batch, draw = run.diffusion.train.batch, generator("bench", "latents")
    z = torch.randn(batch, *shape, generator=draw).to(DEVICE)
    labels = torch.randint(num_classes, (batch,), generator=draw).to(DEVICE)
    return DiffusionObjective(network, run.diffusion).to(DEVICE), z, labels


def untrained_tokenizer(run: config.Recipe) -> nn.Module:
    """The run's tokenizer on the device, with statistics that say so; its cost is a trained one's."""
    tokenizer = api.build_tokenizer(run)
    ones = torch.ones(run.tokenizer.channels)
    tokenizer.set_statistics(Statistics(0 * ones, ones, 1, "untrained"))
    return tokenizer.to(DEVICE).eval()


def tokenizer_loss(run: config.Recipe, tokenizer: nn.Module) -> Callable[[], Tensor]:
    """Encode, sample, decode and compare one batch: the tokenizer's own part of its training step."""
    size = run.data.size
    images = torch.rand(run.train.batch, 3, size, size, generator=generator("bench", "images")) * 2 - 1
    images = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
    features = tokenizer.vfm.features(images, tokenizer.layers).maps if tokenizer.layers else None

    def loss() -> Tensor:
        posterior = tokenizer.posterior(images, features)
        restored = tokenizer.decode_raw(posterior.sample())[0].float()
        return (restored - images).abs().mean() + 1e-6 * posterior.kl().mean()

    return loss


def diffusion_loss(run: config.Recipe, objective: DiffusionObjective, z: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    steps = itertools.count()
    return lambda: objective((z, labels), StepRandom(run.seed, next(steps), len(z), device=DEVICE), 0)[0]


def bf16(repeats: int) -> Result:
    """A diffusion training step of the pocket tier in fp32 against bf16 autocast."""
    run = pocket()
    objective, z, labels = diffusion(run)
    loss = diffusion_loss(run, objective, z, labels)
    result = ratio(trainer(objective, loss, torch.bfloat16), trainer(objective, loss), repeats)
    return {"what": f"fp32 / bf16, pocket diffusion step, batch {len(z)}", **result, "goal": MATRIX_UNITS}


def bf16_tokenizer(repeats: int) -> Result:
    """A tokenizer training step of the pocket tier in fp32 against bf16 autocast."""
    run = pocket()
    tokenizer = untrained_tokenizer(run).train()
    loss = tokenizer_loss(run, tokenizer)
    result = ratio(trainer(tokenizer, loss, torch.bfloat16), trainer(tokenizer, loss), repeats)
    return {"what": f"fp32 / bf16, pocket tokenizer step, batch {run.train.batch}", **result, "goal": MATRIX_UNITS}


def latent_cache(repeats: int, steps: int = 4) -> Result:
    """Diffusion training steps on cached latents against encoding every batch on the fly."""
    run = config.override(pocket(), {"data.train": 1024})
    source, tokenizer = data.open_source(run.data, "train"), untrained_tokenizer(run)
    objective, z, _ = diffusion(run, source.num_classes)
    batch = len(z)

    def train(stream: Iterator[latents.LatentBatch]) -> Call:
        counter = itertools.count()

        def loss() -> Tensor:
            latent = next(stream)
            rng = StepRandom(run.seed, next(counter), batch, device=DEVICE)
            return objective((latent.z.to(DEVICE), latent.labels.to(DEVICE)), rng, 0)[0]

        step = trainer(objective, loss)

        def several() -> None:
            with torch.enable_grad():
                for _ in range(steps):
                    step()

        return several

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for _ in latents.build(folder, tokenizer, source):
            pass
        cached = latents.cached_stream(latents.LatentSource(folder), batch, run.seed)
        with contextlib.closing(data.BatchStream(source, batch, run.seed)) as images:
            fresh = latents.fresh_stream(images, tokenizer, batch, run.seed)
            result = ratio(train(cached), train(fresh), repeats)
    return {"what": f"on the fly / cached, {steps} pocket diffusion steps of {batch}", **result, "goal": "above 1"}


def loading(repeats: int) -> Result:
    """Seconds to draw a batch of images (nothing cached or hidden) over seconds of a training step."""
    run = pocket()
    tokenizer = untrained_tokenizer(run).train()
    step = trainer(tokenizer, tokenizer_loss(run, tokenizer))
    source, batch = data.open_source(run.data, "train"), run.train.batch
    counter = itertools.count()

    def load() -> None:
        first = next(counter) * batch % (len(source) - batch)
        source.batch(torch.arange(first, first + batch))

    what = f"loading / training step, {run.data.source} {run.data.size} px, batch {batch}"
    return {"what": what, **ratio(step, load, repeats), "goal": "below 0.1"}


BENCHMARKS: dict[str, Callable[[int], Result]] = {
    "modulation": modulation, "modulation_pocket": modulation_pocket, "frechet": frechet_distance,
    "cknna": cknna_neighbours, "bf16": bf16, "bf16_vae": bf16_tokenizer, "latents": latent_cache, "loading": loading,
}  # fmt: skip


def line(name: str, result: Result) -> str:
    """A result as one line."""
    low, high = result["spread"]
    shown = f"{result['ratio']:.3g}x ({low:.3g} to {high:.3g})"
    goal = f"  [{result['goal']}]" if result.get("goal") else ""
    detail = f"  {json.dumps(result['detail'])}" if result.get("detail") else ""
    return f"{name:<18} {result['what']}: {shown}{goal}{detail}"


def main(
    only: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = (),
    /,
    repeats: int = 7,
    out: Path = Path("bench.json"),
) -> None:
    """Run benchmarks (none named: all that this machine can run), print ratios and write them as JSON.

    Args:
        repeats: alternating pairs, of which the median ratio is printed.
    """
    for name in only:
        if name not in BENCHMARKS:
            raise ConfigError(f"unknown benchmark '{name}'{nearest(name, BENCHMARKS)}")
    if repeats < 3:
        raise ConfigError(f"--repeats {repeats}: a median needs at least 3")
    results = []
    for name in only or BENCHMARKS:
        results.append({"name": name, **BENCHMARKS[name](repeats)})
        print(line(name, results[-1]), flush=True)  # noqa: T201
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    processor = platform.processor() or platform.machine()
    machine = {**runs.environment(), "processor": processor, "threads": torch.get_num_threads(), "device": device}
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(out, {"machine": machine, "results": results})
    print(f"figures: {out}")  # noqa: T201


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except VfmlabError as error:
        sys.exit(f"benchmarks: error: {error}")
