"""Frozen text encoders: prompts -> tokens that a generator reads. `diffusion.text.encoder` names one.

    words                    the language of drawn scenes, offline; no language model: a fixed vector for each
                             word and each place, so that the generator's first layer on them is a table of
                             words that it learns itself
    pocket                   a text tower in miniature for that language, trained here by contrast with the
                             pocket VFM, bundled; pocket:PATH of a run with pretrain.objective=contrast
    transformers:NAME        the text tower of any model of transformers (CLIP, T5, SigLIP, ...), a hub name
                             or a folder; tokens of its last layer
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmlab.data.captions import WORDS
from vfmlab.errors import CheckpointError, ConfigError, nearest
from vfmlab.registry import TEXT_ENCODERS
from vfmlab.seeding import generator


class TextEncoder(nn.Module):
    """Base of all encoders. Frozen, in eval mode; reads prompts as :meth:`forward` says.

    Every prompt has `length` tokens; what it does not fill is padding, which is read like the rest. The empty
    prompt is what guidance leads away from.

    Attributes:
        name: as asked for. length, width: L and D of the tokens. fingerprint: of weights and code.
    """

    name: str
    length: int
    width: int
    fingerprint: str

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt.

        Raises:
            ConfigError: a word that the encoder does not know.
        """
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts that fit -> fp32 B L D."""
        raise NotImplementedError

    def check(self, prompts: Sequence[str]) -> None:
        """:class:`ConfigError` for a prompt that is too long or has an unknown word."""
        for prompt in prompts:
            if (n := self.tokens(prompt)) > self.length:
                raise ConfigError(f"prompt '{shown(prompt)}' has {n} tokens, encoder '{self.name}' takes "
                                  f"{self.length}; make it shorter")

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> tokens, fp32 B L D; errors as :meth:`check`."""
        self.check(prompts)
        return self.encode(prompts)

    def train(self, mode: bool = True) -> TextEncoder:
        """Frozen: stays in eval mode."""
        return super().train(False)


def shown(prompt: str) -> str:
    """A prompt as messages show it."""
    return prompt if len(prompt) < 60 else f"{prompt[:57]}..."


def open_encoder(name: str, length: int) -> TextEncoder:
    """The encoder called `name`. length: tokens of a prompt, L.

    Raises:
        ConfigError: no such encoder, a library that is missing, more tokens than it takes.
        CheckpointError: its weights are not to be had.
    """
    kind, _, rest = name.partition(":")
    encoder = TEXT_ENCODERS.get(kind)(rest, length)
    encoder.name, encoder.length = name, length
    return encoder.requires_grad_(False).eval()


@TEXT_ENCODERS.register("words")
class Words(TextEncoder):
    """The words of :mod:`vfmlab.data.captions`, in the order they stand in.

    A token is the word's vector plus the place's, each of 64 fixed normal numbers. Nothing is trained or
    stored.
    """

    WIDTH, VERSION = 64, "words-1"

    def __init__(self, rest: str, length: int):
        super().__init__()
        if rest:
            raise ConfigError(f"diffusion.text.encoder 'words:{rest}': the encoder 'words' has no options; "
                              "write 'words'")
        self.width, self.fingerprint = self.WIDTH, self.VERSION
        vectors = {word: torch.randn(self.WIDTH, generator=generator("word", word)) for word in ("", *WORDS)}
        places = [torch.randn(self.WIDTH, generator=generator("place", i)) for i in range(length)]
        self.numbers = {word: i for i, word in enumerate(vectors)}
        self.register_buffer("words", torch.stack(list(vectors.values())), persistent=False)
        self.register_buffer("places", torch.stack(places), persistent=False)

    def tokens(self, prompt: str) -> int:
        return len(known(prompt, self.numbers))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.words[numbered(prompts, self.numbers, self.length).to(self.words.device)] + self.places


def known(prompt: str, words: Collection[str]) -> list[str]:
    """The words of a prompt; :class:`ConfigError` for one that is not among `words`."""
    parts = prompt.split()
    for word in parts:
        if word not in words:
            named = [name for name in words if name]
            raise ConfigError(f"prompt '{shown(prompt)}': '{word[:40]}' is not among the {len(named)} words "
                              f"of drawn scenes{nearest(word, named)}")
    return parts


def numbered(prompts: Sequence[str], numbers: Mapping[str, int], length: int) -> Tensor:
    """Prompts of known words -> their numbers, long B length; the rest is that of the empty word."""
    padded = [(prompt.split() + [""] * length)[:length] for prompt in prompts]
    rows = torch.tensor([[numbers[word] for word in words] for words in padded], dtype=torch.long)
    return rows.view(-1, length)


@TEXT_ENCODERS.register("pocket")
class Pocket(TextEncoder):
    """A :class:`~vfmlab.vfm.pocket_text.TextNet` for the language of drawn scenes. Padding is a word too.

    Args:
        weights: a file or a run's directory; empty: the bundled one. length: of the prompts, 16 at most.
    """

    def __init__(self, weights: str, length: int):
        from vfmlab.vfm import pocket_text
        from vfmlab.weights import io

        super().__init__()
        self.net, self.fingerprint = pocket_text.read(weights or io.ASSETS / "pocket_text.safetensors")
        self.width, most = self.net.spec["width"], self.net.spec["length"]
        if length > most:
            raise ConfigError(f"diffusion.network.text: {length} tokens a prompt, but 'pocket' takes at most "
                              f"{most}")

    def tokens(self, prompt: str) -> int:
        return len(known(prompt, self.net.numbers))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.net(numbered(prompts, self.net.numbers, self.length).to(self.net.places.device))


@TEXT_ENCODERS.register("transformers")
class Tower(TextEncoder):
    """A text tower of the library transformers; weights are safetensors.

    Args:
        name: hub name, or a folder that `save_pretrained` wrote.
    """

    def __init__(self, name: str, length: int):
        from vfmlab.weights import io

        super().__init__()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise ConfigError("diffusion.text.encoder 'transformers:...' needs the package 'transformers'; "
                              "run: pip install 'vfmlab[text]', or take the encoder 'words'") from None
        if not name:
            raise ConfigError("diffusion.text.encoder 'transformers:' names no model; write for example "
                              "transformers:openai/clip-vit-base-patch32")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        except Exception as error:  # the library raises many types for files, names and the network alike
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise CheckpointError(f"diffusion.text.encoder 'transformers:{name}' cannot be loaded "
                                  f"({reason}); check name and network, or give a folder") from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model = getattr(model, "text_model", model)
        own = getattr(self.model, "config", model.config)
        most = getattr(own, "max_position_embeddings", None)
        if most is not None and length > most:
            raise ConfigError(f"diffusion.network.text: {length} tokens a prompt, but 'transformers:{name}' "
                              f"takes at most {most}")
        self.width = own.hidden_size
        self.fingerprint = io.digest(self.model)[:16]

    def tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])

    def encode(self, prompts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        fed = self.tokenizer(list(prompts), padding="max_length", max_length=self.length,
                             return_tensors="pt").to(device)
        taken = {key: fed[key] for key in ("input_ids", "attention_mask") if key in fed}
        return self.model(**taken).last_hidden_state.float()
