"""Released LlamaGen transformers: the importer gives the stored logits, gradients, caches, greedy codes and probabilities."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_values import close
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.ar.llamagen import SIZES, CodeShape, LlamaGen
from vfmlab.ar.sampling import choose, guidance_at, probabilities, sample
from vfmlab.config import Guidance, TokenSampler
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.rope import rotate
from vfmlab.seeding import SampleRandom
from vfmlab.weights import import_state_dict
from vfmlab.weights.families.llamagen_gpt import arguments

GREEDY = TokenSampler(temperature=0)
COUNTS = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "2B": 2_188_389_120, "3B": 3_096_659_200}


@pytest.fixture(scope="module")
def config(golden):
    return json.loads((golden / "discrete" / "ar_transformer.json").read_text())


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "discrete" / "ar_transformer.safetensors")


@pytest.fixture(scope="module")
def state(stored):
    return {key.removeprefix("sd."): value for key, value in stored.items() if key.startswith("sd.")}


@pytest.fixture(scope="module")
def network(state, config):
    return import_state_dict("llamagen-gpt", state, config)


@torch.no_grad()
def test_logits(network, stored, config):
    labels, codes = stored["in.labels"], stored["in.tokens"]
    close(network.logits(labels, codes), stored["out.logits"])
    nobody = torch.full_like(labels, config["num_classes"])
    null = network.logits(nobody, codes)
    close(null, stored["out.logits_uncond"])
    close(null + config["cfg_scale"] * (network.logits(labels, codes) - null), stored["out.logits_cfg"])
    dropped = torch.where(stored["in.force_drop"] == 1, nobody, labels)
    close(network.class_embedding(dropped)[:, None], stored["out.class_token_forced_drop"])


@torch.no_grad()
def test_one_token_at_a_time(network, stored):
    labels, codes = stored["in.labels"], stored["in.tokens"]
    cache = network.cache(len(labels))
    logits = [network.first(labels, cache)] + [network.next(code, cache) for code in codes.T[:-1]]
    close(torch.stack(logits, 1), stored["out.logits_incremental"])
    close(cache.blocks[0].keys, stored["cache.k_layer0"])
    close(cache.blocks[0].values, stored["cache.v_layer0"])


def test_rotation(network, stored):
    table = stored["rope.table"]
    close(network.rope[1, :, ::2], table[..., 0])
    close(network.rope[0, :, 1::2], table[..., 1])
    close(rotate(stored["rope.in"].transpose(1, 2), network.rope).transpose(1, 2), stored["rope.out"])


def test_loss_and_gradients(state, config, stored):
    network = import_state_dict("llamagen-gpt", state, config)
    loss = F.cross_entropy(network(stored["in.labels"], stored["in.tokens"]).flatten(0, 1), stored["in.tokens"].flatten())
    assert loss.item() == pytest.approx(stored["out.loss"].item(), rel=1e-5)
    loss.backward()
    found = {
        "cls_embedding.embedding_table.weight": network.class_embedding, "tok_embeddings.weight": network.token_embedding,
        "layers.0.attention.wqkv.weight": network.blocks[0].qkv, "layers.0.attention_norm.weight": network.blocks[0].norm1,
        "layers.1.feed_forward.w2.weight": network.blocks[1].down, "norm.weight": network.norm, "output.weight": network.head,
    }  # fmt: skip
    for name, module in found.items():
        theirs = stored[f"grad.{name}"]
        close(module.weight.grad, theirs, 1e-3 * theirs.abs().max().item())


def test_greedy_codes(network, stored, config):
    labels, random = stored["in.labels"], SampleRandom(0, range(len(stored["in.labels"])))
    guidance = Guidance(scale=config["cfg_scale"])
    first = GREEDY.model_copy(update={"guided": config["cfg_interval"] + 2})  # the first token, then interval + 1 steps
    assert torch.equal(sample(network, labels, random, GREEDY), stored["out.greedy"].long())
    assert torch.equal(sample(network, labels, random, GREEDY, guidance), stored["out.greedy_cfg"].long())
    assert torch.equal(sample(network, labels, random, first, guidance), stored["out.greedy_cfg_interval"].long())


def test_probabilities(golden):
    stored = load_file(golden / "discrete" / "sampling.safetensors")
    facts = json.loads((golden / "discrete" / "sampling.json").read_text())
    for i, combo in enumerate(facts["combos"]):
        sampler = TokenSampler(**{key: combo[key] for key in ("temperature", "top_k", "top_p")})
        p = probabilities(stored["in.cond"], stored["in.uncond"], combo["cfg_scale"], sampler)
        close(p, stored[f"probs.{i}"])
        assert torch.equal(p > 0, stored[f"kept.{i}"].bool())
        assert torch.equal(p.gather(1, stored[f"argmax.{i}"]), p.amax(1, keepdim=True)), "one row's logits are all alike"
        assert (p > 0).sum(1).tolist() == combo["kept"]
    for i, course in enumerate(facts["rar_schedules"]):
        sampler = TokenSampler(guidance_power=course["guidance_scale_pow"])
        scales = [guidance_at(k, course["steps"], course["guidance_scale"], sampler) for k in range(course["steps"])]
        assert scales == pytest.approx(stored[f"rar_scale.{i}"].tolist(), abs=1e-9)


def test_published_sizes(golden):
    released = json.loads((golden / "discrete" / "released_keys.json").read_text())["gpt_b"]
    for size in SIZES:
        with torch.device("meta"):
            network = LlamaGen(LlamaGen.Config(size=size), CodeShape(16_384, 256, (16, 16)), 1000)
        assert sum(p.numel() for p in network.parameters()) == COUNTS[size]
    assert sum(math.prod(shape) for shape in released.values()) == COUNTS["B"]
    assert arguments({"gpt_model": "GPT-B", "image_size": 384}) == {"block_size": 576, "dim": 768, "n_layer": 12, "n_head": 12}


def test_what_does_not_fit_is_one_line(state, config):
    for change, words in {"block_size": 15, "n_kv_head": 2, "rope_base": 500}.items():
        with pytest.raises(ConfigError, match=change):
            import_state_dict("llamagen-gpt", state, config | {change: words})
    with pytest.raises(ConfigError, match="block_size 0 is no square of 1 or more"):
        import_state_dict("llamagen-gpt", state, config | {"block_size": 0})
    with pytest.raises(ConfigError, match="has no field 'n_head'"):
        import_state_dict("llamagen-gpt", state, {k: v for k, v in config.items() if k != "n_head"})
    with pytest.raises(ConfigError, match="the config is a list; give a dict"):
        import_state_dict("llamagen-gpt", state, [*config])
    with pytest.raises(ConfigError, match="llamagen-gpt: the release's config cannot be: field .width. = 0"):
        import_state_dict("llamagen-gpt", state, config | {"dim": 0})
    for broken in ({k: v for k, v in state.items() if k != "norm.weight"}, state | {"layers.0.extra": torch.zeros(1)}):
        with pytest.raises(CheckpointError):
            import_state_dict("llamagen-gpt", broken, config)


def test_a_code_is_drawn_where_the_sum_passes_the_number():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, 4)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.75, 0.99999])
    assert choose(p, u).tolist() == [0, 0, 2, 2, 3, 3]
