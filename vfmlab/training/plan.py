"""`vfmlab plan`: what a run would cost, before anything of it is allocated.

The training objective itself is built on the meta device and run once on fake tensors (shapes without
storage), forward and backward, for one image with every term at work. That gives exact parameter counts and
FLOPs (a multiply-add counts as two; matrix products, convolutions and attention only, as everywhere in the
literature) and the size of what autograd stores. Memory is an estimate from these: what a kernel needs
besides and the allocator's slack are not in it; `--measure` runs the real worst step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfmlab import config, data, vfm
from vfmlab.ar.llamagen import CodeShape
from vfmlab.ar.objective import ARObjective
from vfmlab.data import Batch
from vfmlab.diffusion import sampling
from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.nn.frozen import Frozen
from vfmlab.nn.quantizers.base import counting
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import SampleRandom
from vfmlab.tokenizers.base import Statistics, Tokenizer
from vfmlab.training import ar, diffusion, dryrun, recompute, repa_e
from vfmlab.training.meter import Meter, Undrawn, everything, shapes_only, weightless
from vfmlab.training.objective import TokenizerObjective
from vfmlab.training.task import trainable
from vfmlab.training.tokenizer import TokenizerTask

IMAGENET_CLASSES = 1000


def plan(run: config.Recipe, measure: bool = False) -> dict[str, Any]:
    """Costs of every phase of `run`, in JSON-like form; see :func:`table` for how it reads.

    Args:
        measure: also time the most expensive training step on this machine and take its peak memory. This
        allocates.

    Raises:
        ConfigError: the run cannot be built (unknown part, sizes that do not divide, a pretraining run).
    """
    if run.tokenizer is None:
        raise ConfigError(f"run '{run.name}' is a pretraining run; plan takes presets with a tokenizer")
    phases = []
    for phase in run.phases():
        generator = _diffusion_phase if phase.ar is None else _ar_phase
        costs = _tokenizer_phase(phase) if phase.generator is None else generator(phase)
        phases.append({**costs, "phase": phase.stage})
        if measure and phase.imported is None:
            phases[-1]["measured"] = measured(phase)
    return {"name": run.name, "id": run.id, "tier": run.tier, "phases": phases}


def measured(phase: config.Phase) -> dict[str, Any]:
    """Seconds and peak memory of a real training step of one phase on this machine, at the full batch.

    A generator's phase is measured on an untrained tokenizer: its latents are noise, its cost is the same.
    """
    from vfmlab import api

    tokenizer = api.build_tokenizer(phase)
    if phase.generator is None:
        return dryrun.measure(TokenizerTask(phase, None if phase.parent is None else tokenizer))
    ones = torch.ones(phase.tokenizer.channels)
    tokenizer.set_statistics(Statistics(0 * ones, ones, 1, "untrained"))
    with tempfile.TemporaryDirectory() as folder:
        if phase.ar is not None:
            return dryrun.measure(ar.ARTask(phase, tokenizer, cache_root=Path(folder)))
        return dryrun.measure(diffusion.DiffusionTask(phase, tokenizer.eval(), cache_root=Path(folder)))


# -- building without storage ------------------------------------------------------------------------------


def empty_tokenizers(run: config.Phase, count: int = 1) -> list[Tokenizer]:
    """So many copies of the run's tokenizer (on one VFM) with shapes only."""
    with shapes_only():
        model = None if run.vfm is None else vfm.build(weightless(run.vfm), run.data.size)
        return [TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, model)
                for _ in range(count)]


def classes(cfg: config.Data) -> tuple[int, str]:
    """Number of classes of the data, and a remark where it had to be assumed."""
    if cfg.source.partition(":")[0] != "hf":  # a plan downloads nothing
        try:
            return data.open_source(cfg, "train").num_classes, ""
        except VfmlabError as error:
            reason = str(error).partition(" (choose from")[0]
    else:
        reason = f"'{cfg.source}' is not opened for a plan"
    return IMAGENET_CLASSES, f"{IMAGENET_CLASSES} classes assumed: {reason}"


# -- one pass over shapes ----------------------------------------------------------------------------------


def _watch_tokenizer(meter: Meter, objective: TokenizerObjective) -> None:
    """Which part of the plan the steps of a tokenizer's training forward belong to."""
    tokenizer, discriminators = objective.tokenizer, objective.discriminators
    for part in tokenizer.frozen.parts.values():
        meter.watch(part, "features", "vfm")
    for method, part in {"own_features": "encode", "posterior": "encode", "decode_raw": "decode",
                         "rebuild": "decode"}.items():
        meter.watch(tokenizer, method, part)
    if objective.frozen.get("parent") is not None:
        meter.watch(objective, "_reference", "parent")
    meter.watch(objective, "terms", "losses")
    if discriminators is not None:
        meter.watch(discriminators, "outputs", "discriminators")
        meter.watch(discriminators, "forward", "discriminators")
    for book in counting(tokenizer):
        book.count = lambda indices: torch.zeros(())  # counts values, of which there are none


def _step(meter: Meter, objective: nn.Module, discriminators: nn.Module | None, batch: Any) -> None:
    """One training step: forward and backward of the objective and of its discriminators."""
    samples = 0 if discriminators is None else discriminators.all_on()
    loss, _, *pairs = objective(batch, Undrawn(), samples)
    with meter.part("backward"):
        loss.backward()
    if discriminators is not None:
        loss, _ = discriminators(*pairs, Undrawn(), samples)
        with meter.part("backward"):
            loss.backward()


def _tokenizer_phase(run: config.Phase) -> dict[str, Any]:
    size, meter = run.data.size, Meter()
    tokenizer, parent = empty_tokenizers(run, 2)
    costs = {
        "kind": "tokenizer",
        "id": run.id,
        "latent_shape": list(tokenizer.latent_shape),
        "parameters": _parts(tokenizer),
        "loss_parameters": {},
        "vfm_parameters": _frozen_of(tokenizer),
        "frozen_in_losses": 0,
        "notes": [],
    }
    if run.imported is not None:  # released weights: what an image costs, and no training
        with meter.fake(tokenizer), torch.no_grad():
            with meter.part("encode"):
                z = tokenizer.posterior(torch.empty(1, 3, size, size)).mode()
            with meter.part("decode"):
                tokenizer.decode_raw(z)
        bytes_ = 4 * (costs["vfm_parameters"] + _count(tokenizer))
        idle = dict.fromkeys(("batch", "micro_batch", "steps", "total_flops", "activations_per_image",
                              "trained"), 0)
        return costs | idle | {"flops": meter.flops, "memory": {"weights": bytes_, "total": bytes_}}
    with shapes_only():
        parent = None if run.parent is None else parent
        objective = TokenizerObjective(tokenizer, weightless(run.losses), run.equivariance, parent)
    others = objective.discriminators
    trained = sum(p.numel() for p in trainable(objective, tokenizer, run.trains, "tokenizer"))
    costs["loss_parameters"] = {name: _count(loss) for name, loss in objective.losses.items() if _count(loss)}
    if others is not None:
        costs["loss_parameters"] |= {f"{name} (discriminator)": _count(others[name]) for name in others.terms}
        trained += _count(others)
    costs["frozen_in_losses"] = _frozen_in(objective) - costs["vfm_parameters"]
    frozen = costs["vfm_parameters"] + costs["frozen_in_losses"]
    frozen += sum(p.numel() for p in tokenizer.parameters() if not p.requires_grad)
    _watch_tokenizer(meter, objective)
    costs["notes"] += _recompute(tokenizer, run.train)
    with meter.fake(objective):
        batch = Batch(torch.empty(1, 3, size, size, dtype=torch.uint8), *torch.zeros(2, 1, dtype=torch.long))
        _step(meter, objective, others, batch)
    return _finish({**costs, "trained": trained, "flops": meter.flops}, run.train, frozen, meter.activations)


def _diffusion_phase(run: config.Phase) -> dict[str, Any]:
    tune, meter = run.diffusion.tune, Meter()
    original, twin = empty_tokenizers(run, 2)
    num_classes, remark = classes(run.data)
    bare = weightless(run.diffusion)
    with shapes_only():
        parts = diffusion.build(bare, run.data.size, run.seed, original.latent_shape, num_classes)
        if tune is None:
            objective: nn.Module = diffusion.DiffusionObjective(parts.network, run.diffusion,
                                                                parts.projection)
            weights, trains, own = parts.network, ("*",), None
        else:
            weights = repa_e.Tuned(parts.network, twin)
            objective = repa_e.TunedObjective(weights, bare, weightless(run.losses), original,
                                              parts.projection)
            trains, own = repa_e.trains(tune), objective.own
    others = None if own is None else own.discriminators
    trained = sum(p.numel() for p in trainable(objective, weights, trains, "diffusion"))
    trained += 0 if others is None else _count(others)
    teachers = [] if parts.targets is None else zip(parts.targets.teachers, parts.targets.cached, strict=True)
    frozen = sum(p.numel() for p in weights.parameters() if not p.requires_grad)
    frozen += sum(_count(teacher.model) for teacher, cached in teachers if not cached)
    if tune is not None or not run.diffusion.cache:
        frozen += 0 if original.vfm is None else _count(original.vfm)
        frozen += _count(original) if tune is None else 0
    meter.watch(parts.network, "forward", "network")
    if (stale := run.diffusion.stale) is not None:  # its halves are called by themselves
        meter.watch(parts.network, "encode", "network")
        meter.watch(parts.network, "head", "heads")
    if parts.projection is not None:
        meter.watch(parts.projection, "forward", "alignment")
    if own is not None:
        _watch_tokenizer(meter, own)
    notes = _recompute(weights, run.diffusion.train)
    with meter.fake(objective):
        shape, size = original.latent_shape, run.data.size
        _step(meter, objective, others,
              diffusion.example(1, shape, size, num_classes, parts.targets, tune is not None))
    if tune is None and not run.diffusion.cache:
        _encode(meter, original, size)
    costs = {
        "kind": "diffusion",
        "cached": run.diffusion.cache and tune is None and run.imported is None,
        "views": 1 + run.data.flip,
        "id": run.id,
        "latent_shape": list(original.latent_shape),
        "num_classes": num_classes,
        "parameters": _parts(parts.network),
        "loss_parameters": {} if parts.projection is None else {"alignment": _count(parts.projection)},
        "trained": trained,
        "flops": meter.flops,
        "notes": [*([remark] if remark else []), *notes],
    }
    solver = run.protocol.sampler
    if solver.solver != "dopri5":  # an adaptive solver decides its evaluations while it runs
        once = meter.flops["network"] // meter.calls["network"]
        once += 0 if stale is None else meter.flops["heads"] // stale.heads
        costs["sampling_flops"] = once * _evaluations(run.protocol)
    if solver.reuse is not None:
        costs["notes"].append("a sample is priced without sampler.reuse, which makes it cheaper")
    return _finish(costs, run.diffusion.train, frozen, meter.activations)


def _evaluations(protocol: config.Protocol) -> int:
    """How often the network sees one sample while the protocol draws it: the sampler is run on a network that
    only counts. Internal guidance reads one evaluation twice; a weaker model is taken to cost as much."""
    seen = 0

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(x)
        return x

    guidance = protocol.guidance
    null_label = guidance if guidance.kind is None else config.Guidance()
    sampling.sample(network, torch.zeros(1, dtype=torch.long), SampleRandom(0, [0]),
                    protocol.sampler.model_copy(update={"reuse": None, "parallel": None}), null_label,
                    latent_shape=(1, 1, 1), null=1)
    return seen * (2 if guidance.kind == "auto" else 1)


def _ar_phase(run: config.Phase) -> dict[str, Any]:
    meter, tokenizer = Meter(), empty_tokenizers(run)[0]
    num_classes, remark = classes(run.data)
    codes = CodeShape.of(tokenizer)
    with shapes_only():
        network = ar.build(run.ar, run.seed, codes, num_classes)
        objective = ARObjective(network, run.ar)
    frozen = 0
    if not run.ar.cache:
        frozen = _count(tokenizer) + _frozen_of(tokenizer)
    meter.watch(network, "forward", "network")
    notes = _recompute(network, run.ar.train)
    with meter.fake(objective):
        _step(meter, objective, None, ar.example(1, codes, num_classes))
    if not run.ar.cache:
        _encode(meter, tokenizer, run.data.size)
    costs = {
        "kind": "ar",
        "cached": run.ar.cache and run.imported is None,
        "views": 1 + run.data.flip if run.ar.ten_crops is None else 10,
        "id": run.id,
        "latent_shape": list(tokenizer.latent_shape),
        "num_classes": num_classes,
        "parameters": _parts(network),
        "loss_parameters": {},
        "trained": sum(p.numel() for p in trainable(objective, network, ("*",), "ar")),
        "flops": meter.flops,
        "notes": [*([remark] if remark else []), *notes],
    }
    # Keys and values are kept, so drawing all tokens costs what one pass over them does.
    costs["sampling_flops"] = meter.flops["network"] * (2 if run.protocol.guidance.scale > 1 else 1)
    return _finish(costs, run.ar.train, frozen, meter.activations)


def _encode(meter: Meter, tokenizer: Tokenizer, size: int) -> None:
    """One image, as each step of a generator without a cache encodes those that it sees."""
    with meter.fake(tokenizer.eval()), torch.no_grad(), meter.part("encode"):
        tokenizer.posterior(torch.empty(1, 3, size, size))


def _recompute(weights: nn.Module, train: config.Train) -> list[str]:
    """Wrap the blocks where `train.recompute` asks for it; a remark on what the estimate leaves out."""
    if not train.recompute:
        return []
    count = len(recompute.start(weights))
    return [f"{count} blocks are computed again in backward; what one of them stores meanwhile is not in "
            "the memory's estimate"]


def _finish(costs: dict[str, Any], train: config.Train, frozen: int, activations: int) -> dict[str, Any]:
    """Budget and memory of a phase: bytes on one device that holds the whole micro-batch."""
    trained, micro = costs["trained"], train.batch // train.accumulation
    half = train.precision != "fp32"
    image = activations // (2 if half else 1)
    memory = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "ema": 4 * trained if train.ema_halflife else 0,
        "frozen": 4 * frozen,
        "activations": image * micro,
    }
    costs["flops"]["step_per_image"] = sum(costs["flops"].values())
    costs["batch"], costs["micro_batch"], costs[
        "steps"] = train.batch, micro, -(-train.samples // train.batch)
    costs["total_flops"] = costs["flops"]["step_per_image"] * train.samples
    costs["memory"] = {**memory, "total": sum(memory.values())}
    costs["activations_per_image"] = image
    return costs


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _frozen_of(tokenizer: Tokenizer) -> int:
    """Parameters of the VFM that a tokenizer uses, and of a random one beside it."""
    return sum(_count(part) for part in tokenizer.frozen.parts.values())


def _parts(module: nn.Module) -> dict[str, int]:
    """Parameters by child, and of the module's own."""
    parts = {name: _count(child) for name, child in module.named_children() if not isinstance(child, Frozen)}
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return parts | ({"own": own} if own else {})


def _frozen_in(objective: TokenizerObjective) -> int:
    """Parameters of what losses and discriminators hold without training it, and of the tokenizer's VFMs."""
    others = everything(objective.tokenizer.frozen, *objective.losses.values(), objective.frozen)
    trained = {id(p) for module in (objective, objective.discriminators) if module is not None
               for p in module.parameters()}
    return sum(p.numel() for child in others for p in child.parameters(recurse=False) if id(p) not in trained)


# -- how it reads ------------------------------------------------------------------------------------------


def _si(value: float, unit: str = "") -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def table(costs: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{costs['name']}  tier {costs['tier']}  run {costs['id']}"]
    for phase in costs["phases"]:
        shape = phase["latent_shape"]
        latent = " x ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} codes"
        lines += ["", f"{phase['phase']}  latent {latent}"]
        for name, count in phase["parameters"].items():
            lines.append(f"  {name:<22} {count:>15,} parameters")
        lines.append(f"  {'sum':<22} {sum(phase['parameters'].values()):>15,} parameters")
        for name, count in phase.get("loss_parameters", {}).items():
            lines.append(f"  {'loss ' + name:<22} {count:>15,} parameters")
        for name, label in (("vfm_parameters", "VFM (frozen)"), ("frozen_in_losses", "in losses (frozen)")):
            if phase.get(name):
                lines.append(f"  {label:<22} {phase[name]:>15,} parameters")
        flops = "  ".join(f"{name} {_si(value, 'FLOP')}" for name, value in phase["flops"].items() if value)
        lines.append(f"  an image: {flops}")
        if "sampling_flops" in phase:
            lines.append(f"  a sample under the protocol: {_si(phase['sampling_flops'], 'FLOP')}")
        if not phase["steps"]:
            lines.append("  no training: released weights")
            continue
        total = _si(phase["total_flops"], "FLOP")
        lines.append(f"  training: {phase['steps']:,} steps of {phase['batch']} images, {total}")
        fixed = {k: v for k, v in phase["memory"].items() if v and k not in ("activations", "total")}
        shown = "  ".join(f"{name} {_bytes(value)}" for name, value in fixed.items())
        lines.append(f"  memory, estimated: {shown}  activations {_bytes(phase['activations_per_image'])} an "
                     "image")
        total = _bytes(phase["memory"]["total"])
        lines.append(f"  in all {total} with {phase['micro_batch']} images at a time on one device")
        if "measured" in phase:
            seen = phase["measured"]
            second = seen["seconds_per_step"]
            speed = f"{second:.3f} s per step, {seen['batch'] / second:.0f} images/s"
            where = f"{seen['device']}, {seen['precision']}"
            lines.append(f"  measured on {where}: {speed}, peak memory {_bytes(seen['peak_bytes'])}")
        lines += [f"  note: {note}" for note in phase["notes"]]
    return "\n".join(lines)
