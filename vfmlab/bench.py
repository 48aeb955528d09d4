"""`vfmlab bench`: the choices that the library made, timed against their alternatives on this machine.

Two variants are timed in turn, in alternating order, so that a machine that gets busy or warm slows both; each pair of
neighbours gives a ratio, and the median ratio is told with the middle half of the ratios beside it. No threshold is
enforced here: `goal` says what the design expects, and the reader sees whether it holds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from vfmlab import api, config, data, presets, runs
from vfmlab.bench_evaluation import cknna_sparse, frechet_distance  # noqa: F401  (they file themselves)
from vfmlab.diffusion import latents, sampling
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.errors import ConfigError, nearest
from vfmlab.nn.modulation import grouped_modulated_conv, modulated_conv
from vfmlab.registry import DECODERS, NETWORKS
from vfmlab.seeding import SampleRandom, StepRandom, generator
from vfmlab.timing import BENCHMARKS, NEEDS_CUDA, Result, benchmark, compare, device, timed
from vfmlab.tokenizers.base import Statistics


def run(only: Sequence[str] = (), repeats: int = 7) -> Iterator[Result]:
    """Run benchmarks one by one; each result has `name`, `seconds` it took, and what :func:`compare` or it reports.

    Raises:
        ConfigError: an unknown name, or one that needs a GPU where there is none.
    """
    for name in only:
        if name not in BENCHMARKS:
            raise ConfigError(f"--only: unknown benchmark '{name}'{nearest(name, BENCHMARKS)}")
        if name in NEEDS_CUDA and not torch.cuda.is_available():
            raise ConfigError(f"--only: benchmark '{name}' needs a CUDA device, and there is none")
    if repeats < 3:
        raise ConfigError(f"--repeats {repeats}: a median needs at least 3")
    for name in only or [n for n in BENCHMARKS if n not in NEEDS_CUDA or torch.cuda.is_available()]:
        begin = time.perf_counter()
        result = BENCHMARKS[name](repeats)
        yield {"name": name, **result, "seconds": time.perf_counter() - begin}


def save(results: Sequence[Result], path: Path) -> None:
    """All results with the machine they are from, as JSON."""
    machine = {
        **runs.environment(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, {"machine": machine, "results": list(results)})


def line(result: Result) -> str:
    """A result as one line."""
    if "ratio" in result:
        low, high = result["spread"]
        told = f"{result['ratio']:.3g}x ({low:.3g} to {high:.3g})"
    else:
        told = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result["figures"].items())
    goal = f"  [{result['goal']}]" if result.get("goal") else ""
    more = f"  {json.dumps(result['detail'])}" if result.get("detail") else ""
    return f"{result['name']:<18} {result['what']}: {told}{goal}{more}"


def trainer(module: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype | None = None) -> Callable[[], None]:
    """A training step of `module`: forward in `precision` (None: fp32), backward, AdamW."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    where = parameters[0].device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(where, dtype=precision) if precision else contextlib.nullcontext():
            value = loss()
        value.backward()
        optimizer.step()

    return step


# -- parts ----------------------------------------------------------------------------------------------------------


def modulated_layers(shapes: Sequence[tuple[int, int, int]], batch: int, repeats: int) -> Result:
    """Forward and backward of modulated 1x1 layers (inputs, outputs, side in pixels) in both formulations."""
    layers, difference = [], 0.0
    for inputs, outputs, side in shapes:
        draw = generator("bench", inputs, outputs, side)
        sizes = {"x": (batch, inputs, side, side), "weight": (outputs, inputs, 1, 1), "style": (batch, inputs)}
        tensors = {k: torch.randn(*s, generator=draw).to(device()).requires_grad_() for k, s in sizes.items()}
        layers.append(tensors)
        with torch.no_grad():
            a, b = modulated_conv(**tensors), grouped_modulated_conv(**tensors)
            difference = max(difference, float((a - b).abs().max() / b.abs().max()))

    def both(function: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            for tensors in layers:
                torch.autograd.grad(function(**tensors).square().mean(), list(tensors.values()))

        return step

    found = compare(both(modulated_conv), both(grouped_modulated_conv), repeats)
    shown = ", ".join(f"{i} -> {o} at {side} px" for i, o, side in shapes)
    what = f"grouped convolution / shared weights, {shown}, batch {batch}"
    return {"what": what, **found, "goal": "above 1", "detail": {"relative difference": difference}}


@benchmark("modulation")
def modulation(repeats: int) -> Result:
    """Modulated 1x1 layers at the paper's widths: scales on the activations against weights per sample."""
    return modulated_layers([(512, 2048, 8), (512, 2048, 16)], 32 if torch.cuda.is_available() else 8, repeats)


@benchmark("modulation_pocket")
def modulation_pocket(repeats: int) -> Result:
    """The same at the pocket tier's widths, where weights are small beside activations."""
    found = modulated_layers([(64, 256, 8), (64, 256, 16), (32, 128, 32)], 32, repeats)
    return {**found, "goal": "below 1 where memory traffic decides"}


# -- training -------------------------------------------------------------------------------------------------------


def pocket() -> config.Run:
    return presets.get("pocket_vfm_vae")


def pocket_diffusion(run: config.Run, num_classes: int = 10) -> tuple[DiffusionObjective, Tensor, Tensor]:
    """The objective of a run's diffusion phase with random latents and labels of its batch size."""
    shape = latent_shape(run)
    network = NETWORKS.get(run.diffusion.network.kind)(run.diffusion.network, shape, num_classes)
    batch, draw = run.diffusion.train.batch, generator("bench", "latents")
    z = torch.randn(batch, *shape, generator=draw).to(device())
    labels = torch.randint(num_classes, (batch,), generator=draw).to(device())
    return DiffusionObjective(network, run.diffusion).to(device()), z, labels


def latent_shape(run: config.Run) -> tuple[int, int, int]:
    side = run.data.size // run.tokenizer.factor
    return run.tokenizer.channels, side, side


def untrained_tokenizer(run: config.Run) -> nn.Module:
    """The run's tokenizer on the device, with statistics that say so; its cost is a trained one's."""
    tokenizer = api.build_tokenizer(run)
    ones = torch.ones(run.tokenizer.channels)
    tokenizer.set_statistics(Statistics(0 * ones, ones, 1, "untrained"))
    return tokenizer.to(device()).eval()


def tokenizer_loss(run: config.Run, tokenizer: nn.Module) -> Callable[[], Tensor]:
    """Encode, sample, decode and compare one batch: the tokenizer's own part of its training step."""
    size = run.data.size
    images = torch.rand(run.train.batch, 3, size, size, generator=generator("bench", "images")) * 2 - 1
    images = images.to(device()).contiguous(memory_format=torch.channels_last)
    features = tokenizer.vfm.features(images, tokenizer.layers).maps if tokenizer.layers else None

    def loss() -> Tensor:
        posterior = tokenizer.posterior(images, features)
        restored = tokenizer.decode_raw(posterior.sample())[0].float()
        return (restored - images).abs().mean() + 1e-6 * posterior.kl().mean()

    return loss


def diffusion_loss(run: config.Run, objective: DiffusionObjective, z: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    steps = itertools.count()
    return lambda: objective((z, labels), StepRandom(run.seed, next(steps), len(z), device=device()), 0)[0]


@benchmark("bf16")
def bf16(repeats: int) -> Result:
    """A diffusion training step of the pocket tier in fp32 against bf16 autocast."""
    run = pocket()
    objective, z, labels = pocket_diffusion(run)
    loss = diffusion_loss(run, objective, z, labels)
    found = compare(trainer(objective, loss, torch.bfloat16), trainer(objective, loss), repeats)
    return {"what": f"fp32 / bf16, pocket diffusion step, batch {len(z)}", **found, "goal": "above 1 where bf16 has matrix units (GPU, AMX)"}


@benchmark("bf16_vae")
def bf16_tokenizer(repeats: int) -> Result:
    """A tokenizer training step of the pocket tier in fp32 against bf16 autocast."""
    run = pocket()
    tokenizer = untrained_tokenizer(run).train()
    loss = tokenizer_loss(run, tokenizer)
    found = compare(trainer(tokenizer, loss, torch.bfloat16), trainer(tokenizer, loss), repeats)
    what = f"fp32 / bf16, pocket tokenizer step, batch {run.train.batch}"
    return {"what": what, **found, "goal": "above 1 where bf16 has matrix units (GPU, AMX)"}


@benchmark("latents")
def latent_cache(repeats: int) -> Result:
    """Diffusion training steps on cached latents against encoding every batch on the fly."""
    run = config.override(pocket(), {"data.train": 1024})
    source, tokenizer = data.open_source(run.data, "train"), untrained_tokenizer(run)
    objective, z, _ = pocket_diffusion(run, source.num_classes)
    batch, steps = len(z), 4
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for _ in latents.build(folder, tokenizer, source):
            pass
        cached = latents.cached_stream(latents.LatentSource(folder), batch, run.seed)
        images = data.BatchStream(source, batch, run.seed)
        fresh = latents.fresh_stream(images, tokenizer, batch, run.seed)

        def train(stream: Iterator[latents.LatentBatch]) -> Callable[[], None]:
            counter = itertools.count()

            def loss() -> Tensor:
                found = next(stream)
                rng = StepRandom(run.seed, next(counter), batch, device=device())
                return objective((found.z.to(device()), found.labels.to(device())), rng, 0)[0]

            step = trainer(objective, loss)

            def some() -> None:
                with torch.enable_grad():
                    for _ in range(steps):
                        step()

            return some

        found = compare(train(cached), train(fresh), repeats)
        for stream in (cached, fresh, images):
            if hasattr(stream, "close"):
                stream.close()
    return {"what": f"on the fly / cached, {steps} pocket diffusion steps of {batch}", **found, "goal": "above 1"}


@benchmark("loading")
def loading(repeats: int) -> Result:
    """Seconds to make a batch of images (drawn anew, nothing cached or hidden) over seconds of a training step."""
    run = pocket()
    tokenizer = untrained_tokenizer(run).train()
    step = trainer(tokenizer, tokenizer_loss(run, tokenizer))
    source, batch = data.open_source(run.data, "train"), run.train.batch
    indices = itertools.count()

    def load() -> None:
        first = next(indices) * batch % (len(source) - batch)
        source.batch(torch.arange(first, first + batch))

    found = compare(step, load, repeats)
    what = f"loading / training step, {run.data.source} {run.data.size} px, batch {batch}"
    return {"what": what, **found, "goal": "below 0.1"}


# -- on a GPU -------------------------------------------------------------------------------------------------------


def gpu_step(module: nn.Module, loss: Callable[[], Tensor], images: int, repeats: int) -> dict[str, float]:
    """Median step time in bf16, images per second and peak memory."""
    step = trainer(module, loss, torch.bfloat16)
    for _ in range(3):
        step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = median(timed(step) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"step_seconds": seconds, "images_per_second": images / seconds, "peak_GiB": peak}


@benchmark("gpu_decoder", cuda=True)
def gpu_decoder(repeats: int, run: config.Run | None = None, batch: int = 16) -> Result:
    """Training step of the decoder that the paper describes, from latents to images."""
    run = run or presets.get("paper_vfm_vae")
    channels, side, _ = latent_shape(run)
    kind = run.tokenizer.decoder
    decoder = DECODERS.get(kind.kind)(kind, channels, side, run.data.size).to(device())
    z = torch.randn(batch, channels, side, side, generator=generator("bench", "decoder")).to(device())
    figures = gpu_step(decoder, lambda: decoder(z)[0].float().square().mean(), batch, repeats)
    return {"what": f"{run.name} decoder, bf16 training step, batch {batch}", "figures": figures}


@benchmark("gpu_dit", cuda=True)
def gpu_dit(repeats: int, run: config.Run | None = None, batch: int = 128) -> Result:
    """Training step and sampling of LightningDiT-B/1 on the latents of the paper's tokenizer."""
    small = {"diffusion.network": {"kind": "lightningdit", "size": "B", "patch": 1}, "diffusion.train.batch": batch}
    run = run or config.override(presets.get("paper_vfm_vae"), small)
    objective, z, labels = pocket_diffusion(run, 1000)
    figures = gpu_step(objective, diffusion_loss(run, objective, z, labels), len(z), repeats)
    network, steps = objective.network.eval(), 25
    sampler, guidance = config.Sampler(steps=steps), config.Guidance(scale=2.0)

    def draw() -> None:
        with torch.no_grad(), torch.autocast(device().type, dtype=torch.bfloat16):
            noise = SampleRandom(0, range(len(labels)), device())
            for _ in sampling.trajectory(network, labels, noise, sampler, guidance):
                pass

    draw()
    seconds = median(timed(draw) for _ in range(3))
    figures |= {"sampling_seconds": seconds, "samples_per_second": len(labels) / seconds}
    kind = run.diffusion.network.kind
    what = f"{kind} on {run.name} latents, bf16, batch {len(z)}; sampling with {steps} guided Euler steps"
    return {"what": what, "figures": figures}
