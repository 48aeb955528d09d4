"""Parts from a notebook's cell: the id carries their source, the run keeps it, another kernel refuses."""

from __future__ import annotations

import linecache

import pytest
import torch
from tiny import COMMON
from torch import Tensor, nn

import vfmlab
from vfmlab import api, presets, runs
from vfmlab.errors import ConfigError, TrainingError
from vfmlab.nn import parts

SMALL = {**COMMON, "train.samples": 16, "train.batch": 8, "train.log_every": 8, "train.evaluate_at": [], "train.checkpoint_every": 8,
         "diffusion.train.samples": 16, "diffusion.train.batch": 8, "diffusion.train.evaluate_at": []}  # fmt: skip
STRENGTH = 0.5
taken: list[int] = []
kernel = torch.ones(3)


def halved(x: Tensor) -> Tensor:
    return STRENGTH * x


def edges(r):
    """Mean difference of neighbouring pixels' errors."""
    error = r.images[0] - r.target
    return halved((error[..., 1:] - error[..., :-1]).abs().mean())


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, r):
        return (self.scale * r.z).square().mean()


class Plain(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.old = old
        self.more = nn.Linear(2, 2)

    def forward(self, *inputs):
        return self.old(*inputs)


def after(task, step, numbers):
    assert numbers["loss"] > 0
    taken.append(step)


def source_in(folder, name):
    return (folder.path / "parts" / f"{name}.py").read_text()


def forget():
    """As a kernel that has not run the cell."""
    parts._given.clear()


def test_a_loss_and_a_callback_train_and_resume(tmp_path):
    given = {"losses.edges": (edges, 0.5), "losses.distance": Distance, "on_step": after}
    recipe = api.resolve("tiny_plain_vae", SMALL, parts=given)
    run = recipe.phases()[0]
    assert run.id != api.resolve("tiny_plain_vae", SMALL).phases()[0].id
    taken.clear()
    events = api.train("tiny_plain_vae", tmp_path, SMALL, until="tokenizer", parts=given)
    for event in events:
        if "loss" in event.data:
            events.close()
            break
    folder = runs.open_run(run.id, tmp_path)
    assert folder.status().state == "interrupted"
    text = source_in(folder, "losses.edges")
    assert "STRENGTH = 0.5" in text
    assert text.index("def halved") < text.index("def edges")
    assert "class Distance" in source_in(folder, "losses.distance")
    forget()
    with pytest.raises(ConfigError, match=r"part 'losses\.edges' .* cell, which this process has not run"):
        list(api.train(folder.config(), tmp_path))
    list(api.train("tiny_plain_vae", tmp_path, SMALL, until="tokenizer", parts=given))
    assert folder.status().state == "finished"
    assert taken == [1, 2]
    assert {"edges", "distance"} <= set(folder.metrics("step")[-1])
    assert "own losses.edges" in runs.contrast([folder])[folder.id]
    again = api.resolve("tiny_plain_vae", SMALL, parts={"losses.edges": edges})
    other = runs.create(again.phases()[0], tmp_path)
    said = runs.contrast([folder, other])
    assert "own losses.edges 0.5" in said[folder.id]
    assert "own losses.edges 1.0" in said[other.id], "same source, another weight"
    step = vfmlab.open_step(recipe, tmp_path)
    assert step.terms["edges"].weight == 0.5
    assert float(step.terms["edges"].value) == float(edges(step.reconstruction))
    assert float(step.pieces.metrics["edges"]) == pytest.approx(folder.metrics("step")[0]["edges"])
    forget()
    assert api.load_tokenizer(folder.id, tmp_path), "losses are not needed to use a tokenizer"


def test_a_module_of_the_decoder(tmp_path):
    with pytest.raises(ConfigError, match="has no module 'decodr'; it has"):
        vfmlab.open_step(api.resolve("tiny_plain_vae", SMALL, parts={"tokenizer.decodr": Plain}), tmp_path)
    recipe = api.resolve("tiny_plain_vae", SMALL, parts={"tokenizer.quant": Plain})
    step = vfmlab.open_step(recipe, tmp_path)
    assert isinstance(step.tokenizer.quant, Plain)
    again = vfmlab.open_step(recipe, tmp_path)
    assert torch.equal(step.tokenizer.quant.more.weight, again.tokenizer.quant.more.weight), "drawn from the run's seed"


def test_ids_follow_the_source():
    def id_of(text, number=[0]):  # noqa: B006  a cell of its own each time
        number[0] += 1
        name = f"<cell {number[0]}>"
        space: dict = {"__name__": "__main__"}
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), space)
        return api.resolve("tiny_plain_vae", parts={"losses.own": space["own"]}).phases()[0].id

    assert id_of("def own(r):\n    return r.z.mean()\n") == id_of("\ndef own(r):\n    return r.z.mean()\n")
    assert id_of("def own(r):\n    return r.z.mean()\n") != id_of("def own(r):\n    return r.z.std()\n")
    assert id_of("a = 1\ndef own(r):\n    return a * r.z.mean()\n") != id_of("a = 2\ndef own(r):\n    return a * r.z.mean()\n")
    cell = "class own:\n    def __call__(self, r):\n        return r.z.mean()\n"
    assert id_of(cell) != id_of(cell.replace("mean", "std")), "classes too"
    assert presets.get("tiny_plain_vae").parts is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"losses": edges}, "'losses' is no place"),
        ({"decoder.x": Plain}, "is no place for a part; name losses.NAME"),
        ({"losses.own": Distance()}, "give its class"),
        ({"losses.own": lambda: 1}, r"is called as \(r\)"),
        ({"on_step": edges}, r"is called as \(task, step, numbers\)"),
        ({"losses.own": max}, "is no function and no class"),
        ({"losses.own": lambda r: (kernel * r.z.mean()).sum()}, r"reads the variable 'kernel' \(Tensor\)"),
        ({"losses.own": eval("lambda r: r.z.mean()")}, "has no source"),
        ({"losses.own": (edges, 0.0)}, r"parts\['losses.own'\]: field 'weight' = 0.0"),
        ({"losses.own": (edges, 1.0, 2.0)}, "is no function and no class"),
        ({"tokenizer.quant": (Plain, 2.0)}, "is no function and no class"),
    ],
)
def test_what_is_no_part(given, message):
    with pytest.raises(ConfigError, match=message):
        api.resolve("tiny_plain_vae", parts=given)


def test_a_closure_is_refused():
    scale = torch.ones(())
    with pytest.raises(ConfigError, match="reads scale of the function around it"):
        api.resolve("tiny_plain_vae", parts={"losses.own": lambda r: scale * r.z.mean()})


def test_what_a_loss_may_not_give(tmp_path):
    def each(r):
        return r.z.flatten(1).mean(1)

    def broken(r):
        return r.z.mean() * float("nan")

    def run(part, name="own"):
        return vfmlab.open_step(api.resolve("tiny_plain_vae", SMALL, parts={f"losses.{name}": part}), tmp_path)

    with pytest.raises(ConfigError, match=r"losses\.own, your own, gives shape \(8,\)"):
        run(each)
    with pytest.raises(TrainingError, match=r"losses\.own, your own, is nan"):
        run(broken)
    with pytest.raises(ConfigError, match="'l1' is a term of this recipe already"):
        run(edges, "l1")
    with pytest.raises(TrainingError, match="your own, is nan"):
        list(api.train("tiny_plain_vae", tmp_path, SMALL, parts={"losses.own": broken}))
    assert runs.scan(tmp_path)[0].status().state == "failed"


def test_a_network_of_ones_own(tmp_path):
    """Trained, saved, loaded; the tokenizer's run stays the one without it."""
    recipe = api.resolve("tiny_plain_vae", SMALL, parts={"network": Mixer})
    assert recipe.phases()[0].id == api.resolve("tiny_plain_vae", SMALL).phases()[0].id
    list(api.train(recipe, tmp_path))
    model = api.load_diffusion(recipe.id, tmp_path)
    assert isinstance(model.network, Mixer)
    assert list(api.sample(model, [0, 1], steps=2))[-1].images.isfinite().all()
    forget()
    with pytest.raises(ConfigError, match="part 'network'"):
        api.load_diffusion(recipe.id, tmp_path)


class Mixer(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.num_classes = old.num_classes
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, t, y):
        return self.mix(x)
