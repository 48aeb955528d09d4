"""Tokenizers in the form of the Hugging Face hub, and back: config.json, model.safetensors, a model card.

    save_pretrained("pocket_vfm_vae_tokenizer", "exported")      # a run -> a folder
    tokenizer = from_pretrained("exported")                      # a folder or a hub repository -> a tokenizer
    push_to_hub("pocket_vfm_vae_tokenizer", "user/repository")

Paths of this machine are not exported. A frozen VFM is named, not included; its fingerprint is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from vfmlab import api, config, runs, vfm
from vfmlab.config.files import read_json
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation.features import OWN
from vfmlab.evaluation.number import Report, of_run
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training import checkpoint
from vfmlab.weights import io, load

CONFIG, WEIGHTS, CARD, LIBRARY = "config.json", "model.safetensors", "README.md", "vfmlab"
HUB_LICENCES = ("mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
                "cc-by-nc-sa-4.0", "openrail")
UNSTATED = "not stated"


def save_pretrained(ref: str | Path, folder: str | Path | None = None, root: str | Path = "runs",
                    ema: bool = True, licence: str | None = None, overwrite: bool = False) -> Path:
    """Write the tokenizer of run `ref` (of a diffusion run: its own) to `folder`; returns that.

    Args:
        folder: new, empty, or an earlier export; None: `exported` in the run's directory. ema: averaged
            weights.
        overwrite: take a folder with other files in it, too. licence: under which these weights are passed
            on, e.g. "mit"; by default that of the release they come from, where the run is imported.

    Raises:
        RunError, CheckpointError: no such run, or no trained weights.
        ConfigError: a folder inside a run or with other files in it, or one that cannot be written.
    """
    run_dir = api.tokenizer_run(ref, root)
    tensors, facts = io.read(load.weights_file(run_dir, ema))
    if int(tensors["stat_count"]) == 0:
        raise CheckpointError(f"run '{run_dir.id}' has no latent statistics yet (state: "
                              f"{run_dir.status().state}); finish its training")
    run, exported = public(run_dir.config()), run_dir.path / "exported"
    folder = exported if folder is None else runs.output_folder(folder, _made_here, overwrite)
    if licence is None and facts.get("licence") != UNSTATED:
        licence = facts.get("licence")
    content = {"library": LIBRARY, "format": checkpoint.FORMAT, "run_id": run_dir.id,
               "run": run.recipe.model_dump(mode="json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(folder / CONFIG, content)
        io.write(folder / WEIGHTS, tensors, facts)
        runs.write_atomic(folder / CARD, card(run, run_dir, tensors, facts, licence))
    except OSError as error:
        raise ConfigError(f"cannot write to '{folder}': {error.strerror or error}; choose another "
                          "folder") from None
    return folder


def _made_here(folder: Path) -> bool:
    """Whether `folder` is an export of this project's, with nothing else in it."""
    try:
        content = read_json(folder / CONFIG)
    except ConfigError:
        return False
    ours = content.get("library") == LIBRARY and "run" in content
    return ours and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS, CARD}


def from_pretrained(source: str | Path, revision: str | None = None, vfm_weights: str | None = None,
                    on: str | torch.device | None = None) -> Tokenizer:
    """A tokenizer in eval mode from an exported folder, or from a hub repository ("user/name").

    Args:
        revision: of the repository. vfm_weights: a file in place of the VFM's published weights. on: device.

    Raises:
        CheckpointError: files are missing, damaged, of another format, or made with other VFM weights.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise CheckpointError(f"'{source}' lacks {missing[0]}; give a folder that vfmlab has exported")
        paths = [folder / name for name in (CONFIG, WEIGHTS)]
    elif str(source).count("/") == 1:
        way = f"put it into a folder with {' and '.join((CONFIG, WEIGHTS))}, and give that folder"
        paths = [io.fetch(str(source), name, revision, way) for name in (CONFIG, WEIGHTS)]
    else:
        raise CheckpointError(f"'{source}' is neither a folder nor a hub repository of the form user/name")
    content = read_json(paths[0], CheckpointError, "config")
    if content.get("format") != checkpoint.FORMAT or "run" not in content:
        raise CheckpointError(f"'{paths[0]}' is not of the format {checkpoint.FORMAT}; give what vfmlab has "
                              "exported")
    run = config.parse(content["run"], str(paths[0]))
    if vfm_weights is not None:
        run = config.override(run, {"vfm.weights": vfm_weights})
    way = "give the old ones: from_pretrained(..., vfm_weights=FILE)"
    return load.tokenizer_from(run, paths[1], f"'{source}'", way, on)


def push_to_hub(ref: str | Path, repo: str, root: str | Path = "runs", private: bool = False,
                licence: str | None = None, hub: Any = None) -> str:
    """Export run `ref` to the hub repository `repo`, which is made if need be; returns its address.

    Args:
        hub: what does the upload; by default huggingface_hub's HfApi with the token of this machine's login.
    """
    if repo.count("/") != 1:
        raise ConfigError(f"hub repository '{repo}' is not of the form user/name")
    from huggingface_hub import HfApi, constants

    hub = hub or HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(ref, temporary, root, licence=licence)
        try:
            hub.create_repo(repo_id=repo, repo_type="model", private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo, repo_type="model", folder_path=str(folder),
                              commit_message="Upload tokenizer")
        except Exception as error:  # no network, no token, no rights, ...: the hub's client raises many kinds
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"cannot push to the hub repository '{repo}' ({type(error).__name__}: "
                                  f"{reason}); log in with `hf auth login`, or export to a folder and upload "
                                  "it yourself") from None
    return f"{constants.ENDPOINT}/{repo}"


def public(run: config.Phase) -> config.Phase:
    """`run` without paths of this machine: of a path to images the last part, else the published name."""
    kind, _, where = run.data.source.partition(":")
    changes: dict[str, Any] = {}
    if run.vfm is not None and run.vfm.weights not in ("pretrained", "random"):
        changes["vfm.weights"] = "pretrained"
    pretrained = getattr(run.tokenizer, "pretrained", None)
    if pretrained is not None and Path(pretrained).expanduser().is_dir():
        changes["tokenizer.pretrained"] = None
    if run.protocol.features.partition(":")[0] in OWN:  # of a run's directory
        changes["protocol.features"] = run.protocol.features.partition(":")[0]
    recipe = config.override(run.recipe, changes)
    if "/" in where and kind != "hf":  # not by an override, which would make the path absolute again
        data = recipe.data.model_copy(update={"source": f"{kind}:{Path(where).name}"})
        recipe = recipe.model_copy(update={"data": data})
    return recipe.last


# -- the model card ----------------------------------------------------------------------------------------


def card(run: config.Phase, run_dir: runs.RunDir, tensors: dict[str, torch.Tensor], facts: dict[str, str],
         licence: str | None) -> str:
    """README.md of an exported tokenizer: where it comes from, how to load it, and what report.json says."""
    t = run.tokenizer
    latent = t.latent_text(run.data.size)
    images = "  # images: B 3 H W in [-1, 1]"
    back = [f"z = tokenizer.encode(images).mode(){images}", "restored = tokenizer.decode(z)"]
    if t.quantised:
        back = [f"codes = tokenizer.codes(images){images}", "restored = tokenizer.decode_codes(codes)"]
    count = sum(value.numel() for key, value in tensors.items() if not key.startswith("stat_"))
    lines = ["---", "library_name: vfmlab", *_licence_lines(licence), "tags:", "- vfmlab",
             "- image-tokenizer", f"- {t.method}", "---", "", f"# {run_dir.id}", "",
             f"A visual tokenizer made with vfmlab: images of {run.data.size} x {run.data.size} px to "
             f"latents of {latent.partition(' (')[0]} and back.",
             "", "```python", "from vfmlab.weights.export import from_pretrained", "",
             'tokenizer = from_pretrained("PATH OR REPOSITORY")', *back, "```", "", "| | |", "|---|---|"]
    rows = {"method": t.method, "latent": latent, "numbers in the weights": f"{count:,}"}
    rows |= _vfm_rows(run, facts)
    rows |= _origin_rows(run, facts)
    rows["images of the latent statistics"] = facts.get("fingerprint") or "unknown"
    rows["licence of these weights"] = licence or f"{UNSTATED} by who exported them"
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*lines, "", *_numbers(of_run(run_dir)), ""])


def _licence_lines(licence: str | None) -> list[str]:
    if not licence or licence == UNSTATED:
        return []
    return ([f"license: {licence}"] if licence in HUB_LICENCES
            else ["license: other", f"license_name: {licence.lower().replace(' ', '-')}"])


def _vfm_rows(run: config.Phase, facts: dict[str, str]) -> dict[str, str]:
    if run.vfm is None:
        return {"vision foundation model": "none"}
    row = vfm.facts(run.vfm.name)
    hub = f", `{row.hub}`" if row.hub else ", bundled with vfmlab"
    if row.shipped is not None:
        hub = f", shipped by the package `{row.shipped.package}`; {row.shipped.origin}"
    weights = ("random weights" if run.vfm.weights == "random"
               else f"fingerprint {facts.get('vfm_fingerprint', 'unknown')}")
    return {"vision foundation model": f"{run.vfm.name}{hub} ({weights})",
            "licence of that model": row.licence}


def _origin_rows(run: config.Phase, facts: dict[str, str]) -> dict[str, str]:
    rows = {}
    if facts.get("imported"):
        where = (f": `{facts['imported_file']}` of `{facts['imported_repo']}`" if facts.get("imported_repo")
                 else ", from a file given by hand")
        rows["imported"] = f"{facts['imported']}{where} (SHA-256 {facts['imported_sha256']})"
        rows["licence of that release"] = facts.get("licence", UNSTATED)
    if run.recipe.stages:
        rows["stages"] = ", ".join(stage.name for stage in run.recipe.stages)
    if run.imported is None:
        rows["trained on"] = f"{run.data.source}, {int(facts.get('samples', 0)):,} images seen"
        rows["losses"] = ", ".join(f"{name} {term.weight:g}" for name, term in run.losses.items())
    return rows


def _numbers(report: Report | None) -> list[str]:
    if report is None:
        return ["## Evaluation", "", "Not measured."]
    lines = ["## Evaluation", "",
             "Numbers of one protocol hash can be compared with each other, others cannot. Whole protocol: "
             f"`{report.hash}`.",
             "", "| metric | value | spread | better | images | protocol |", "|---|---|---|---|---|---|"]
    for name, one in report.measured.items():
        spread = "" if one.spread is None else f"{one.spread:.4g}"
        cells = (name, f"{one.value:.4g}", spread, one.better or "", one.n or "", f"`{one.protocol or ''}`")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    used = {one.protocol for one in report.measured.values()} | {report.hash}
    lines += ["", "| protocol | what it means |", "|---|---|"]
    for digest, protocol in report.protocols.items():
        if digest in used:
            shown = {**protocol,
                     "images": {k: v for k, v in protocol.get("images", {}).items() if k != "source"}}
            lines.append(f"| `{digest}` | `{json.dumps(shown, separators=(', ', ': '))}` |")
    return lines
