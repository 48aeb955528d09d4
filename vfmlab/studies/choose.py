"""Which VFM and which tokenizer for my images and my budget? Two rounds, a ranking with its uncertainty, and
the recipe to go on with.

Round one trains a small tokenizer for every method and VFM and a very short generator on each, with one
seed. Round two trains a longer one on the first few and on the plain VAE, with several seeds, and ranks them
by gFD. What is trained and shared is not trained again, in round two or by a later call with more VFMs or
seeds.

Round one trains generators because nothing that was measured without one ranks tokenizers in the same way on
drawings and on photographs (docs/results/choose.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vfmlab import api, presets, vfm
from vfmlab.config import VFM, Data, Recipe, override
from vfmlab.data import open_source
from vfmlab.errors import ConfigError
from vfmlab.evaluation.contrasts import LEVEL, Block, holm
from vfmlab.evaluation.number import LOWER, groups, quantity
from vfmlab.evaluation.reference import SHIPPED, bare, family
from vfmlab.plots import primitives
from vfmlab.runs import write_json
from vfmlab.studies import compare, compare_page, correlation
from vfmlab.studies.page import Page, definitions
from vfmlab.studies.results import Result, collect, records, spread
from vfmlab.studies.rows import Row, check_seeds

METHODS = ("vfm_vae", "va_vae")
BASELINE, PLAIN = "plain_vae", "plain VAE"
TARGET = "gfd"
# Fields that --set would change in vain, or in one of the rounds alone: field -> what to give.
GIVEN = {"seed": "--seeds", "data.source": "--data", "vfm.name": "--vfm",
         "train.samples": "--tokenizer-images",
         "diffusion.train.samples": "--generator-images"}
# Fields that it sets for each VFM, or for each round.
FIXED = ("vfm.layers", "vfm.upscale", "vfm.stride", "losses.vf.layer", "protocol.noise",
         "diffusion.train.evaluate_at")


class Budget(NamedTuple):
    """Images seen by a tokenizer, by a generator, and by one of round one."""

    tokenizer: int = 7680
    generator: int = 25_600
    screening: int = 12_800


SHORT = Budget()


class Standing(NamedTuple):
    """A finalist: its gFD by seed, and how far it is behind the first, with the half-width of the 95 %
    interval, and with p by Holm over all finalists behind it."""

    label: str
    values: tuple[float, ...]
    behind: float
    half_width: float
    p: float = 1.0

    @property
    def tied(self) -> bool:
        """Whether the seeds do not tell it from the first."""
        return self.p > 1 - LEVEL


def settings(name: str, size: int, factor: int) -> dict[str, Any]:
    """Fields that let a VFM serve tokenizers whose latent has size / factor places a side.

    Its last map lies on the latent's grid. Hierarchical models are read at an early stage, which keeps the
    pixels, at the last but one and at the last; where their convolutions can be dilated the last has stride
    16.

    Raises:
        ConfigError: no such VFM.
    """
    facts = vfm.facts(name)
    side, layers, last, stride = size // factor, list(facts.layers), -1, None
    if facts.hierarchical:
        stride = 16 if _dilates(name, side * 16 / size, size) else None
        depth = _model(name, side * (stride or facts.patch) / size, size, stride).depth
        layers, last = [1, depth - 1, -2], -2
    upscale = side * (stride or facts.patch) / size
    return {"vfm.name": name, "vfm.layers": layers, "vfm.upscale": upscale, "vfm.stride": stride,
            "losses.vf.layer": last}


def _model(name: str, upscale: float, size: int, stride: int | None) -> vfm.VisionModel:
    return vfm.build(VFM(name=name, upscale=upscale, stride=stride, weights="random"), size)


def _dilates(name: str, upscale: float, size: int) -> bool:
    try:
        return _model(name, upscale, size, 16).grid(-2)[0] == round(size * upscale / 16)
    except ConfigError:
        return False


def images(data: Data) -> dict[str, Any]:
    """`data.train` and `data.val` as the source allows, which keeps a fifth apart where it has no split of
    its own. {} for scenes."""
    if data.source.startswith("scenes:"):
        return {}
    train, _, held_out = open_source(data, "train").sizes
    return {"data.val": held_out, "data.train": train}


def judge(features: str, vfms: Sequence[str]) -> str:
    """A feature space to judge all candidates in: the one given, or a shipped one of a family that none of
    them has, or at least of another model.

    Raises:
        ConfigError: every shipped judge is itself a candidate.
    """
    if not features.startswith("classifier:"):
        return features
    judges = dict.fromkeys((features, *(f"classifier:{name}" for name in SHIPPED)))
    for same in (family, bare):
        for one in judges:
            if same(one) not in map(same, vfms):
                return one
    raise ConfigError(f"--vfm {' '.join(vfms)}: every judge that is at hand ({', '.join(judges)}) is a "
                      "candidate; name others, or set protocol.features to a vision model that is none")


def specs(vfms: Sequence[str], methods: Sequence[str], tier: str,
          fields: Mapping[str, Any]) -> dict[str, Any]:
    """label -> (recipe, fields): the baseline, and every method on every VFM, under the baseline's
    generator."""
    if not vfms:
        raise ConfigError(f"--vfm names no vision model; choose from {', '.join(vfm.names())}, or "
                          "timm:NAME")
    rows = {PLAIN: (f"{tier}_{BASELINE}", {})}
    for method in methods:
        preset = f"{tier}_{method}"
        run = override(presets.get(preset), dict(fields))
        if run.vfm is None:
            raise ConfigError(f"--methods {method}: '{preset}' reads no VFM; the plain VAE is compared "
                              "anyway")
        for name in vfms:
            own = settings(name, run.data.size, run.tokenizer.factor)
            if run.vfm.layers is not None and len(run.vfm.layers) == 1:  # the method reads one
                own["vfm.layers"] = [own["losses.vf.layer"]]
            own = {k: v for k, v in own.items() if k != "losses.vf.layer" or "vf" in (run.losses or {})}
            rows[f"{method} on {name}"] = (f"{preset}@{tier}_{BASELINE}", own)
    return rows


def run(source: str, vfms: Sequence[str], root: str | Path, out: str | Path, command: str,
        methods: Sequence[str] = METHODS, tier: str = "photo", seeds: Sequence[int] = (0, 1, 2),
        finalists: int = 3, budget: Budget = SHORT, overrides: Mapping[str, Any] | None = None,
        jobs: int | None = None, cluster: str | None = None, retry: bool = False) -> Path:
    """Both rounds; writes `out`.md (returned), .json, .html, and `out`.recipe.json, the first's recipe at the
    tier's own budget.

    Args:
        source: of images, as `data.source`. finalists: rows with a generator, the plain VAE besides. The rest
            as in :func:`vfmlab.studies.compare.run`.

    Raises:
        ConfigError: no VFM, no seed, a method or VFM that does not exist, a field that the rounds set.
        TrainingError: every row failed.
    """
    check_seeds(seeds)
    if finalists < 1:
        raise ConfigError(f"finalists = {finalists}: at least one goes on beside the plain VAE")
    for field in overrides or {}:
        if field in GIVEN:
            raise ConfigError(f"--set {field}: a choice sets it itself; give {GIVEN[field]} in its place")
        if field in FIXED:
            raise ConfigError(f"--set {field}: a choice sets it itself; leave it out")
    root, out = Path(root).expanduser(), compare.writable(out)
    baseline = presets.get(f"{tier}_{BASELINE}")
    fields = {"data.source": source, **(overrides or {})}
    if "protocol.features" not in fields:
        fields["protocol.features"] = judge(baseline.protocol.features, vfms)
    fields |= images(override(baseline, dict(fields)).data)
    there, chosen = override(baseline, dict(fields)).data.train, specs(vfms, methods, tier, fields)
    short = fields | _short(budget, budget.screening, there)
    first = compare.trained(_rows(chosen, seeds[:1], short), root, jobs, cluster, retry)
    order = screened(first)
    last = [*[label for label in order if label != PLAIN][:finalists], PLAIN]
    longer = fields | _short(budget, budget.generator, there)
    rows = _rows({label: chosen[label] for label in last}, seeds, longer)
    second = collect(rows, root, compare.train(rows, root, jobs, None, cluster, retry))
    ranking = standings(second)
    name, own = chosen[ranking[0].label if ranking else last[0]]
    recipe = out.with_name(f"{out.name}.recipe.json")
    write_json(recipe, api.resolve(name, fields | own).model_dump(mode="json", exclude_unset=True))
    page = build(first, order, second, ranking, recipe.name, command)
    space = rows[0].run.protocol.features
    kin = [name for name in vfms if family(name) == family(space)]
    page.lead = f"The judge, {space}, is of one family with {', '.join(kin)} and favours it." if kin else ""
    return page.publish(out, {"first": [r.as_json() for r in first], "results": [r.as_json() for r in second],
                              "ranking": [s._asdict() for s in ranking]})


def _short(budget: Budget, generator: int, there: int | None) -> dict[str, Any]:
    """Fields of a round. Of the images that are there it reads as many as a tokenizer sees: a VFM would pass
    over all others for the latents alone."""
    return {"train.samples": budget.tokenizer, "diffusion.train.samples": generator,
            "diffusion.train.evaluate_at": [generator],
            "data.train": min(budget.tokenizer, there or budget.tokenizer), "protocol.noise": "run"}


def _rows(chosen: Mapping[str, Any], seeds: Sequence[int], fields: Mapping[str, Any]) -> list[Row]:
    images = fields["train.samples"]
    rest = {field: value for field, value in fields.items() if field != "train.samples"}
    whole = {label: {**rest, **own, **_stages(api.resolve(name, own), images)}
             for label, (name, own) in chosen.items()}
    return [Row(label, seed, api.resolve(name, whole[label], seed), None)
            for seed in seeds for label, (name, _) in chosen.items()]


def _stages(run: Recipe, images: int) -> dict[str, int]:
    """So many images for all stages of a tokenizer together, shared out as its preset shares its own."""
    parts = [phase for phase in run.phases() if phase.generator is None]
    total = sum(phase.budget for phase in parts)
    if len(parts) == 1:
        return {"train.samples": images}
    return {f"stages.{phase.stage}.train.samples": max(1, images * phase.budget // total) for phase in parts}


def screened(results: Sequence[Result]) -> list[str]:
    """Labels, the best :data:`TARGET` first; those without it are left out."""
    values, sign = correlation.values(results, TARGET), 1 if quantity(TARGET).better == LOWER else -1
    return sorted(values, key=lambda label: sign * statistics.fmean(values[label].values()))


def standings(results: Sequence[Result]) -> list[Standing]:
    """Finalists by mean gFD, best first, each with its distance from the first and the interval of it."""
    values = correlation.values(results, TARGET)
    seeds = {seed for mine in values.values() for seed in mine}
    values = {label: mine for label, mine in values.items() if set(mine) == seeds}
    if not values:
        return []
    block, sign = Block.of(values), 1 if quantity(TARGET).better == LOWER else -1
    order = [label for label in screened(results) if label in values]
    gaps = [block.contrast({label: float(sign), order[0]: -float(sign)}) for label in order[1:]]
    levels = holm([gap.p_beyond(0.0) for gap in gaps])
    behind = [(0.0, 0.0), *((gap.estimate, gap.half_width(), p) for gap, p in zip(gaps, levels, strict=True))]
    return [Standing(label, tuple(values[label][s] for s in sorted(seeds)), *mine)
            for label, mine in zip(order, behind, strict=True)]


def verdict(ranking: Sequence[Standing], seeds: int) -> str:
    """The sentence that a reader takes along."""
    if not ranking:
        return "None: no finalist has a generator that was measured."
    first, rest = ranking[0], ranking[1:]
    text, close = f"{first.label}, gFD {spread(first.values)}", [s.label for s in rest if s.tied]
    if not rest:
        return f"None: no other finalist was measured with every seed. It is {text}."
    if seeds < 2:
        return f"None: one seed, so nothing is known of the spread. First: {text}."
    if close:
        return f"None: {seeds} seeds do not tell {', '.join(close)} from the first, {text}."
    return f"{text}: ahead of all others by more than {seeds} seeds leave open."


def why(results: Sequence[Result], ranking: Sequence[Standing]) -> str:
    """What of the first's gFD is its decoder's and what its latents', beside the next; "" without both, and
    where the next is not told from it.

    rFD says what the decoder loses, gFD to own reconstructions how well the latents are modelled.
    """
    if len(ranking) < 2 or ranking[1].tied:
        return ""
    sides = {}
    for name in ("rfd", "gfd_own"):
        mine = correlation.values(results, name)
        if not all(s.label in mine for s in ranking[:2]):
            return ""
        one, other = (statistics.fmean(mine[s.label].values()) for s in ranking[:2])
        sides[name] = one < other, f"{quantity(name).label} {one:.3g} against {other:.3g}"
    (keeps, decoder), (learnt, latents) = sides.values()
    text = {(True, True): "its decoder loses less and its latents are modelled better",
            (True, False): "its decoder loses less, though its latents are modelled worse",
            (False, True): "its latents are modelled better, though its decoder loses more",
            (False, False): "neither its decoder nor its latents alone say it"}[keeps, learnt]
    return f" Why, beside {ranking[1].label}: {text} ({decoder}, {latents}; means, no verdicts)."


def build(first: Sequence[Result], order: Sequence[str], second: Sequence[Result],
          ranking: Sequence[Standing], recipe: str, command: str) -> Page:
    """The page of a choice."""
    question = "Which VFM and which tokenizer serve a generator of these images best?"
    said = verdict(ranking, len({r.seed for r in second})) + why(second, ranking)
    title = "Which tokenizer for these images?"
    page = Page(title, question, said, definitions=definitions(), command=command)
    table = [{"row": s.label, quantity(TARGET).head: spread(s.values)} for s in ranking]
    for line, s in zip(table[1:], ranking[1:], strict=True):
        line |= {"behind the first": f"{s.behind:+.3g} ± {s.half_width:.2g}",
                 "p (Holm)": "< .001" if s.p < 0.001 else f"{s.p:.3f}",
                 "told apart": "no" if s.tied else "yes"}
    note = ("A generator of one network and budget on each finalist's latents. Behind the first: with its "
            "95 % interval from all finalists and seeds. Told apart: at 5 %, by Holm over all behind it.")
    page.add("Ranking", note, primitives.table(table), *compare_page.over_training(second))
    page.add("Go on", "The recipe of the first by its mean, at the tier's own budget: "
             f"`vfmlab train {recipe}`.")
    for part in groups(second):
        page.add("Finalists", compare_page.note(part), primitives.table(records(part, "**{}**")))
    values = correlation.values(first, TARGET)
    head = quantity(TARGET).head
    cells = [{"row": label, head: spread(list(values[label].values()))} for label in order]
    note = ("A very short generator on every latent, one seed, the best first. How such an order agrees with "
            "that of whole studies: docs/results/choose.md.")
    page.add("Round one", note, primitives.table(cells))
    for part in groups(first):
        page.add("", compare_page.note(part), primitives.table(records(part, "**{}**")))
    compare_page.add_failed(page, (*first, *second))
    return page
