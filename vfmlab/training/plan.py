"""`vfmlab plan`: what a run would cost, before anything of it is allocated.

Parts are built on the meta device and run once on fake tensors (shapes without storage), forward and backward, for one
image. That gives exact parameter counts and FLOPs (a multiply-add counts as two; matrix products, convolutions and
attention only, as everywhere in the literature) and the size of what autograd keeps. Memory is an estimate from these:
what a kernel needs besides and the allocator's slack are not in it; `--measure` runs the real worst step.
"""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vfmlab import config, data, vfm
from vfmlab.diffusion.alignment import Projection
from vfmlab.diffusion.joint import token_width
from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.losses.adversarial import Adversarial
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.discriminators.game import judge
from vfmlab.losses.preservation import Preservation
from vfmlab.registry import LOSSES, NETWORKS, TOKENIZERS
from vfmlab.tokenizers.base import Statistics
from vfmlab.training.reconstruction import Handed, Opponents

IMAGENET_CLASSES = 1000


def plan(run: config.Recipe, measure: bool = False) -> dict[str, Any]:
    """Costs of every phase of `run`, in JSON-like form; see :func:`table` for how it reads.

    Args:
        measure: also time the most expensive training step on this machine and take its peak memory. This allocates.

    Raises:
        ConfigError: the run cannot be built (unknown part, sizes that do not divide, a pretraining run).
    """
    if run.tokenizer is None:
        raise ConfigError(f"run '{run.name}' is a pretraining run; plan takes presets with a tokenizer")
    phases = []
    for phase in run.phases():
        found = _tokenizer_phase(phase) if phase.diffusion is None else _diffusion_phase(phase)
        phases.append(found)
        found["phase"] = phase.stage
        if measure and phase.imported is None:
            found["measured"] = measured(phase)
    return {"name": run.name, "id": run.id, "tier": run.tier, "phases": phases}


def measured(phase: config.Phase) -> dict[str, Any]:
    """Seconds and peak memory of a real training step of one phase on this machine, at the full batch.

    A diffusion phase is measured on an untrained tokenizer: its latents are noise, its cost is the same.
    """
    from vfmlab import api
    from vfmlab.training import dryrun

    if phase.diffusion is None:
        from vfmlab.training.tokenizer import TokenizerTask

        parents = () if phase.before is None else (api.build_tokenizer(phase),)  # not trained: the cost is the same
        return dryrun.measure(TokenizerTask(phase, *parents))
    from vfmlab.training.diffusion import DiffusionTask

    tokenizer = api.build_tokenizer(phase)
    ones = torch.ones(phase.tokenizer.channels)
    tokenizer.set_statistics(Statistics(0 * ones, ones, 1, "untrained"))
    with tempfile.TemporaryDirectory() as folder:
        return dryrun.measure(DiffusionTask(phase, tokenizer.eval(), cache_root=Path(folder)))


# -- building without storage ---------------------------------------------------------------------------------------


def empty_vfm(cfg: config.VFM | None, size: int) -> vfm.VisionModel | None:
    """The run's VFM with shapes only: no weights are looked for."""
    if cfg is None:
        return None
    with torch.device("meta"):
        return vfm.build(cfg.model_copy(update={"weights": "random"}), size)


def empty_tokenizer(run: config.Phase) -> nn.Module:
    """The run's tokenizer (and in `.vfm` its VFM) with shapes only."""
    model = empty_vfm(run.vfm, run.data.size)
    with torch.device("meta"):
        return TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, model)


def empty_network(run: config.Phase, latent_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The run's diffusion network with shapes only."""
    with torch.device("meta"):
        return NETWORKS.get(run.diffusion.network.kind)(run.diffusion.network, latent_shape, num_classes)


def empty_losses(run: config.Phase, tokenizer: nn.Module) -> tuple[nn.ModuleDict, dict[str, str]]:
    """The run's losses with shapes only, and those that cannot be built here with the reason."""
    channels, side, _ = tokenizer.latent_shape
    context = LossContext(run.data.size, channels, side, tokenizer.vfm)
    built, refused = nn.ModuleDict(), {}
    for name, term in run.losses.items():
        try:
            with torch.device("meta"), _without_weights():
                built[name] = LOSSES.get(name.partition(":")[0])(term, context)
                built[name].name = name
        except VfmlabError as error:  # a backbone that must be downloaded; the rest of the plan holds without it
            refused[name] = str(error)
    return built, refused


def empty_opponents(run: config.Phase, model: nn.Module | None) -> Opponents:
    """The discriminators of the run's adversarial terms with shapes only."""
    terms = {}
    for name, term in run.losses.items():
        if isinstance(term, Adversarial.Config):
            backbone = getattr(term.discriminator, "backbone", None)
            if backbone is not None:
                backbone = backbone.model_copy(update={"weights": "random"})
                term = term.model_copy(update={"discriminator": term.discriminator.model_copy(update={"backbone": backbone})})
            terms[name] = term
    with torch.device("meta"), _without_weights():
        return Opponents(terms, run.data.size, model)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Inside, torchvision's and torchmetrics' pretrained networks are built without their weights: no download.

    On the meta device there are no values to load, so reading the files would only cost time and a connection.
    """
    from torchvision.models import WeightsEnum

    get, load = WeightsEnum.get_state_dict, nn.Module.load_state_dict
    WeightsEnum.get_state_dict = lambda *args, **options: {}
    nn.Module.load_state_dict = lambda *args, **options: None
    try:
        yield
    finally:
        WeightsEnum.get_state_dict, nn.Module.load_state_dict = get, load


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


# -- one pass over shapes -------------------------------------------------------------------------------------------


def _conv_backward_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    """FLOPs of a convolution's backward pass: the forward's, once for the input's and once for the weight's gradient.

    torch's own formula takes the weight's gradient of a grouped convolution for a dense one, hundreds of times too much.
    """
    places = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * places * math.prod(weight) * sum(wanted[:2])


class Meter:
    """FLOPs by part, and the bytes that autograd keeps, of code that runs on fake tensors."""

    def __init__(self):
        self.flops: dict[str, int] = {}
        self._kept: dict[int, Tensor] = {}
        self._own: set[int] = set()

    @contextmanager
    def fake(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, `modules` hold fake tensors on the CPU instead of meta tensors: shapes, and a device to autocast on."""
        made: dict[int, Tensor] = {}  # parameters and modules may be shared
        with FakeTensorMode(allow_non_fake_inputs=True):
            for child in (child for module in modules for child in module.modules()):
                for table in (child._parameters, child._buffers):
                    for name, old in table.items():
                        if old is None or not old.is_meta:
                            continue
                        if id(old) not in made:
                            new = torch.empty(old.shape, dtype=old.dtype)
                            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                        table[name] = made[id(old)]
                self._own |= {id(p.untyped_storage()) for p in child.parameters(recurse=False)}
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward_flops})
        with counter, saved_tensors_hooks(self._pack, lambda kept: kept):
            yield
        self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()

    def _pack(self, tensor: Tensor) -> Tensor:
        # A storage counts once however many views of it are kept; the reference keeps its id from being reused.
        if not isinstance(tensor, nn.Parameter):
            self._kept.setdefault(id(tensor.untyped_storage()), tensor)
        return tensor

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass, parameters not counted."""
        return sum(t.untyped_storage().nbytes() for key, t in self._kept.items() if key not in self._own)


def _tokenizer_phase(run: config.Phase) -> dict[str, Any]:
    tokenizer = empty_tokenizer(run)
    losses, refused = empty_losses(run, tokenizer)
    opponents = empty_opponents(run, tokenizer.vfm)
    size, model = run.data.size, tokenizer.vfm
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and _trains(run, name))
    layers = sorted({*tokenizer.layers, *(layer for loss in losses.values() for layer in loss.layers)})
    meter, latent_shape = Meter(), list(tokenizer.latent_shape)
    parameters = {name: _count(child) for name, child in tokenizer.named_children()}
    own = sum(p.numel() for p in tokenizer.parameters(recurse=False))
    if own:
        parameters["own"] = own
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    loss_parameters = {name: _count(loss) for name, loss in losses.items() if _count(loss)}

    holders = [*losses.values(), *(opponents.discriminator(name) for name in opponents.names)]
    frozen_in_losses = [network for holder in holders for network in getattr(holder, "hidden", {}).values()]
    hidden = list({id(network): network for network in frozen_in_losses if network is not model}.values())
    with meter.fake(*(module for module in (tokenizer, model, *losses.values(), opponents, *hidden) if module is not None)):
        images = torch.empty(1, 3, size, size)
        features = {}
        if layers and model is not None:
            with meter.part("vfm"), torch.no_grad():
                features = model.features(images, tuple(layers)).maps
        with meter.part("encode"):
            own = tokenizer.own_features(images)
            posterior = tokenizer.posterior(images, own or features or None)
        z = posterior.sample()
        with meter.part("decode"):
            outputs, rebuilt = tokenizer.decode_raw(z), tokenizer.rebuild(z)
        reference, encoded = {}, None if not own else own[list(own)[-1]]
        if any(isinstance(loss, Preservation) for loss in losses.values()):
            with meter.part("parent"), torch.no_grad():
                own = tokenizer.own_features(images)
                reference = {"after": tokenizer.posterior(images, own or features or None).mode(), "before": encoded if encoded is None else encoded.detach()}
        total = outputs[0].float().square().mean()
        if opponents.names:
            with meter.part("discriminators"):
                fed = {name: judge(opponents.discriminator(name), outputs[0].float(), images, features=True) for name in opponents.names}
                rival, _ = opponents(Handed(outputs[0].detach().float(), images, torch.zeros(1, dtype=torch.long)), None, opponents.all_on())
        with meter.part("losses"):
            record = Reconstruction(images, outputs, posterior, z, features, fed if opponents.names else {}, encoded, reference, rebuilt)
            for loss in losses.values():
                total = total + loss(record)
        with meter.part("backward"):
            if total.requires_grad and run.imported is None:
                total.backward()
            if opponents.names:
                rival.backward()

    found = {
        "kind": "tokenizer",
        "id": run.id,
        "latent_shape": latent_shape,
        "parameters": parameters,
        "loss_parameters": loss_parameters | {f"{name} (discriminator)": _count(opponents.discriminator(name)) for name in opponents.names},
        "vfm_parameters": _count(model) if model is not None else 0,
        "frozen_in_losses": sum(map(_count, hidden)),
        "trained": trained + sum(loss_parameters.values()) + _count(opponents),
        "flops": meter.flops,
        "notes": [f"without loss '{name}': {reason}" for name, reason in refused.items()],
    }
    frozen = found["vfm_parameters"] + found["frozen_in_losses"] + _count(tokenizer) - trained
    if run.imported is not None:
        idle = {"batch": 0, "micro_batch": 0, "steps": 0, "total_flops": 0, "activations_per_image": 0, "trained": 0}
        return found | idle | {"memory": {"weights": 4 * (frozen + trained), "total": 4 * (frozen + trained)}}
    return _finish(found, run.train, frozen, meter.activations)


def _diffusion_phase(run: config.Phase) -> dict[str, Any]:
    tokenizer = empty_tokenizer(run)
    num_classes, remark = classes(run.data)
    shape = tuple(tokenizer.latent_shape)
    network = empty_network(run, shape, num_classes)
    meter = Meter()
    parameters = {name: _count(child) for name, child in network.named_children()}
    own = sum(p.numel() for p in network.parameters(recurse=False))
    if own:
        parameters["own"] = own
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    notes, width = [remark] if remark else [], token_width(network)
    projection, teacher = _projection(run, network)
    readout = 0 if projection is None else _count(projection)
    with meter.fake(*(module for module in (network, projection) if module is not None)):
        x, t, y = torch.empty(1, *shape), torch.empty(1), torch.zeros(1, dtype=torch.long)
        more = {} if width is None else {"token": torch.empty(1, width)}
        with meter.part("network"):
            found = network(x, t, y, **more) if projection is None else network(x, t, y, features_at=(projection.config.block,), **more)
        out, kept = (found, {}) if projection is None else found
        total = sum(v.float().square().mean() for v in ((out,) if width is None else out))
        if projection is not None:
            with meter.part("alignment"):
                target = torch.empty(1, teacher.width(projection.config.layer), *network.grid)
                total = total + projection(kept[projection.config.block], target).mean()
        with meter.part("backward"):
            total.backward()
    if run.diffusion.tune is not None:
        notes.append("tune: a step also costs what a step of the tokenizer does (see there), on the same images")
    solver = run.protocol.sampler
    calls = {"euler": 1, "sde": 1, "heun": 2}.get(solver.solver)
    found = {
        "kind": "diffusion",
        "id": run.id,
        "latent_shape": list(shape),
        "num_classes": num_classes,
        "parameters": parameters,
        "loss_parameters": {"alignment": readout} if readout else {},
        "trained": trained + readout,
        "flops": meter.flops,
        "notes": notes,
    }
    if calls is not None:  # an adaptive solver decides its evaluations while it runs
        guided = 2 if run.protocol.guidance.scale != 1 else 1
        found["sampling_flops"] = meter.flops["network"] * solver.steps * calls * guided
    frozen = _count(network) - trained
    if not run.diffusion.cache:
        frozen += _count(tokenizer) + (_count(tokenizer.vfm) if tokenizer.vfm is not None else 0)
    if teacher is not None and not run.diffusion.alignment.cache:
        frozen += _count(teacher)
    return _finish(found, run.diffusion.train, frozen, meter.activations)


def _projection(run: config.Phase, network: nn.Module) -> tuple[nn.Module | None, vfm.VisionModel | None]:
    """REPA's loss and its VFM with shapes only, where the run has them."""
    align = run.diffusion.alignment
    if align is None:
        return None, None
    teacher = empty_vfm(align.vfm.model_copy(update={"layers": None}), run.data.size)
    with torch.device("meta"):
        return Projection(align, network, teacher.width(align.layer)), teacher


def _finish(found: dict[str, Any], train: config.Train, frozen: int, activations: int) -> dict[str, Any]:
    """Budget and memory of a phase: bytes on one device that holds the whole micro-batch."""
    trained, micro = found["trained"], train.batch // train.accumulation
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
    found["flops"]["step_per_image"] = sum(found["flops"].values())
    found["batch"], found["micro_batch"], found["steps"] = train.batch, micro, -(-train.samples // train.batch)
    found["total_flops"] = found["flops"]["step_per_image"] * train.samples
    found["memory"] = {**memory, "total": sum(memory.values())}
    found["activations_per_image"] = image
    return found


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trains(run: config.Phase, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in run.trains)


# -- how it reads ---------------------------------------------------------------------------------------------------


def _si(value: float, unit: str = "") -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def table(found: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{found['name']}  tier {found['tier']}  run {found['id']}"]
    for phase in found["phases"]:
        lines += ["", f"{phase['phase']}  latent {' x '.join(map(str, phase['latent_shape']))}"]
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
        lines.append(f"  memory, estimated: {shown}  activations {_bytes(phase['activations_per_image'])} an image")
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
