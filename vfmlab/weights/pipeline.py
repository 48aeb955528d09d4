"""Runs as diffusers has models: a tokenizer as an autoencoder, a diffusion run as a pipeline around it.

    save("pocket_vfm_vae", "exported")                             # a run -> a folder
    from vfmlab.weights.pipeline import VFMLabPipeline
    pipe = VFMLabPipeline.from_pretrained("exported")              # or a repository of the hub
    images = pipe([0, 3], seed=7, guidance_scale=1.5).images       # PIL images

The folder is laid out as diffusers does it (`model_index.json`, `vae`, `transformer`). diffusers imports no
module because a folder names it, so the classes stand here and are imported first; nothing of a folder is
run. A frozen VFM is named in the config, not included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from vfmlab import api, config, runs
from vfmlab.config.files import read_json
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.tokenizers.base import LOGVAR_RANGE, Tokenizer
from vfmlab.weights import export, io, load
from vfmlab.weights.card import card

INDEX, CONFIG = "model_index.json", "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
AUTOENCODER = ["from vfmlab.weights.pipeline import VFMLabAutoencoder", "",
               'vae = VFMLabAutoencoder.from_pretrained("PATH OR REPOSITORY")',
               "z = vae.encode(images).latent_dist.mode()  # images: B 3 H W in [-1, 1]",
               "restored = vae.decode(z).sample"]
PIPELINE = ["from vfmlab.weights.pipeline import VFMLabPipeline", "",
            'pipe = VFMLabPipeline.from_pretrained("PATH OR REPOSITORY")',
            "images = pipe([0], seed=0).images"]
Previews = Callable[[int, int, float, Tensor], object]


class Exported(ModelMixin, ConfigMixin):
    """A model around one of ours, the attribute `_own`, whose weights a folder holds under that name."""

    _own: ClassVar[str]

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, revision: str | None = None,
                        torch_dtype: torch.dtype | None = None, **_: Any) -> Self:
        """With the weights of a folder or a repository of the hub, in eval mode.

        Names and shapes must fit. diffusers' own loading would build it without its first values, which a
        frozen VFM with random weights needs, and would only warn of names that are missing.

        Raises:
            CheckpointError: files are missing, damaged, of another class, or do not fit.
        """
        if torch_dtype not in (None, torch.float32):
            raise ConfigError(f"torch_dtype {torch_dtype}: weights stay fp32; run the model under "
                              "torch.autocast")
        folder, inside = Path(source).expanduser(), f"{subfolder}/" if subfolder else ""
        if folder.is_dir():
            weights, file = io.in_folder(folder / inside)
            if file is None:
                raise CheckpointError(f"'{folder / inside}' lacks {CONFIG}; give a folder that vfmlab has "
                                      "exported")
        else:
            way = "put it into a folder and give that"
            file, weights = (io.fetch(str(source), inside + name, revision, way)
                             for name in (CONFIG, WEIGHTS))
        values = read_json(file, CheckpointError, "config")
        if values.get("_class_name") != cls.__name__:
            raise CheckpointError(f"'{file}' is of class '{values.get('_class_name')}', not {cls.__name__}; "
                                  "give what vfmlab export --form diffusers has written")
        model, own = cls.from_config(values), f"{cls._own}."
        tensors, _ = io.read(weights)
        io.load(getattr(model, cls._own), {key.removeprefix(own): value for key, value in tensors.items()},
                f"weights: '{weights}'")
        return model.eval()


class VFMLabAutoencoder(Exported):
    """A tokenizer with continuous latents, in the form of diffusers' `AutoencoderKL`.

    Its latents are normalised, so `scaling_factor` is 1 and `shift_factor` 0.

    Args:
        run: the recipe that the tokenizer was trained with, as JSON. fingerprint: of the images of its latent
            statistics. vfm_fingerprint: of the VFM's weights.
    """

    _own = "tokenizer"

    @register_to_config
    def __init__(self, run: dict[str, Any], fingerprint: str = "", vfm_fingerprint: str = "",
                 sample_size: int = 0, latent_channels: int = 0, scaling_factor: float = 1.0,
                 shift_factor: float = 0.0):
        super().__init__()
        self.tokenizer = load.build_tokenizer(config.parse(dict(run), CONFIG))
        self.tokenizer.fingerprint = fingerprint
        vfm = self.tokenizer.vfm
        if vfm is not None and vfm_fingerprint not in ("", vfm.fingerprint):
            raise CheckpointError(f"the tokenizer was trained on VFM weights {vfm_fingerprint}, but those "
                                  f"found here are {vfm.fingerprint}; put the old ones into timm's cache")

    @classmethod
    def of(cls, tokenizer: Tokenizer, run: config.Phase) -> Self:
        """The tokenizer of a run, its weights shared. Raises ConfigError where its latents are codes."""
        if tokenizer.quantised:
            raise ConfigError(f"tokenizer.method '{run.tokenizer.method}' makes codes, which diffusers' "
                              "autoencoders do not; export it without --form")
        vfm = tokenizer.vfm
        model = cls(run.recipe.model_dump(mode="json"), tokenizer.fingerprint,
                    "" if vfm is None else vfm.fingerprint, tokenizer.size, tokenizer.config.channels)
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Self:
        """As of the generator; a tokenizer without latent statistics is refused."""
        model = super().from_pretrained(*args, **options)
        _ = model.tokenizer.statistics
        return model

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images in [-1, 1] (B 3 H W) -> the distribution of normalised latents (B C h w)."""
        q = self.tokenizer.encode(x)
        logvar = torch.full_like(q.mean, LOGVAR_RANGE[0]) if q.logvar is None else q.logvar
        moments = torch.cat([q.mean, logvar], 1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=q.logvar is None)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple:
        """Normalised latents (B C h w) -> images in [-1, 1] (B 3 H W)."""
        images = self.tokenizer.decode(z)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
                generator: torch.Generator | None = None) -> DecoderOutput | tuple:
        """Images through the tokenizer and back."""
        q = self.encode(sample).latent_dist
        return self.decode(q.sample(generator) if sample_posterior else q.mode(), return_dict)


class VFMLabGenerator(Exported):
    """The network of a diffusion run.

    Args:
        run: its recipe as JSON. latent_shape: (C, h, w). class_names: of its classes, in order.
    """

    _own = "network"

    @register_to_config
    def __init__(self, run: dict[str, Any], latent_shape: Sequence[int], class_names: Sequence[str]):
        super().__init__()
        phase = config.parse(dict(run), CONFIG).last
        self.network = load.build_network(phase, tuple(latent_shape), list(class_names))

    @classmethod
    def of(cls, loaded: load.LoadedDiffusion) -> Self:
        """The network of a run, its weights shared."""
        recipe = export.public(loaded.run).recipe
        model = cls(recipe.model_dump(mode="json"), list(loaded.tokenizer.latent_shape), loaded.class_names)
        model.network = loaded.network
        return model

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Velocity noise - data (B C h w) at states on the way (B C h w), times (B; 1: noise), labels (B)."""
        return self.network(hidden_states, timestep, class_labels)


class VFMLabPipeline(DiffusionPipeline):
    """A diffusion run: labels -> images. Samples are those of `vfmlab.sample` with the same seed."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, vae: VFMLabAutoencoder, transformer: VFMLabGenerator):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer)

    @property
    def loaded(self) -> load.LoadedDiffusion:
        """What `vfmlab.sample` takes."""
        run = config.parse(dict(self.transformer.config.run), CONFIG).last
        names = list(self.transformer.config.class_names)
        return load.LoadedDiffusion(self.transformer.network, self.vae.tokenizer, run, len(names), names)

    @torch.no_grad()
    def __call__(self, class_labels: Sequence[int] | None = None, prompt: str | Sequence[str] | None = None,
                 seed: int = 0, guidance_scale: float | None = None, num_inference_steps: int | None = None,
                 output_type: str = "pil", callback: Previews | None = None,
                 return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """Draw one image of each label, or of each prompt where the generator reads text.

        Args:
            class_labels: None: all classes, or all prompts.
            seed: image i is drawn from noise seeded by (seed, i), whatever else is in the batch.
            guidance_scale, num_inference_steps: by default those of the run's protocol.
            output_type: "pil"; "np": N H W 3; "pt": N 3 H W; both in [0, 1].
            callback(step, steps, t, images): after every step, with what the estimate of the clean latents
                decodes to (N 3 H W in [-1, 1]). An exception in it ends the sampling.

        Raises:
            ConfigError: a label, seed, scale or number of steps that cannot be.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type '{output_type}': choose pil, np or pt")
        previews, images = 0 if callback is None else 10**6, None
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for step in api.sample(self.loaded, class_labels, seed, guidance_scale, num_inference_steps,
                               previews=previews, prompts=prompts):
            images = step.images
            if callback is not None:
                callback(step.step, step.total, step.t, images)
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def save(ref: str | Path, folder: str | Path | None = None, root: str | Path = "runs", ema: bool = True,
         licence: str | None = None, overwrite: bool = False, data_licence: str | None = None) -> Path:
    """Write run `ref` as diffusers has it: a tokenizer run as an autoencoder, a diffusion run as a pipeline.

    Args:
        as in :func:`vfmlab.weights.export.save_pretrained`; folder None: `diffusers` in the run's directory.

    Raises:
        RunError, CheckpointError: no such run, or no trained weights. ConfigError: codes, a generator of
        codes, code from a notebook, a second run as guidance; a folder that cannot be taken.
    """
    run_dir = runs.open_run(ref, root, kind="tokenizer")
    run = export.public(run_dir.config())
    if run.recipe.parts:
        raise ConfigError(f"run '{run_dir.id}' has parts from a notebook ({', '.join(run.recipe.parts)}), "
                          "whose code does not travel; export its tokenizer without --form")
    weights = load.weights_file(run_dir, ema)
    if run.generator is None:
        folders, usage = [run_dir], AUTOENCODER
        model: Any = VFMLabAutoencoder.of(load.load_tokenizer(run_dir.path, root, ema, "cpu"), run)
    else:
        if run.ar is not None or run.protocol.guidance.kind == "auto":
            what = "draws codes" if run.ar is not None else "is guided by a second run (guidance.kind=auto)"
            raise ConfigError(f"run '{run_dir.id}' {what}, which has no form in diffusers here; export its "
                              "tokenizer without --form")
        loaded = load.load_diffusion(run_dir.path, root, ema, "cpu")
        others = [] if run.tuned else [load.tokenizer_run(run_dir.path, root)]
        folders, usage = [run_dir, *others], PIPELINE
        vae = VFMLabAutoencoder.of(loaded.tokenizer, export.public(loaded.run.before))
        model = VFMLabPipeline(vae, VFMLabGenerator.of(loaded))
    first = CONFIG if run.generator is None else INDEX
    folder = export.target(folder, run_dir, "diffusers", functools.partial(made, first=first), overwrite)
    facts = io.metadata(weights)
    models = getattr(model, "components", {"vae": model}).values()
    count = sum(p.numel() for part in models for p in part.parameters())
    licence = export.of_release(licence, facts)
    readme = card(run, folders, count, facts, usage, "diffusers", licence, data_licence)
    model.save_pretrained(folder)
    runs.write_atomic(folder / export.CARD, readme)
    return folder


def made(folder: Path, first: str) -> bool:
    """Whether `folder` is an export of this module, of the form that `first` tells: where both were, a reader
    would take the pipeline's autoencoder."""
    if [name for name in (INDEX, CONFIG) if (folder / name).is_file()] != [first]:
        return False
    return str(read_json(folder / first).get("_class_name", "")).startswith("VFMLab")
