"""The Inception space, with random weights in the file where the real ones belong."""

from __future__ import annotations

import pytest
import torch

from vfmlab.data import to_float
from vfmlab.evaluation.features import open_space

source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub folder with a random network under the name of the released weights."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        net = source.FeatureExtractorInceptionV3("random", ["2048"])
    (folder / "checkpoints").mkdir()
    torch.save(net.state_dict(), folder / "checkpoints" / source.URL_INCEPTION_V3.rpartition("/")[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(folder))
        yield folder


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_space(hub):
    space = open_space("inception", 16)
    seen = space(to_float(images(2, 0)))
    assert seen.features.shape == (2, 2048) == (2, space.dimension)
    assert seen.logits.shape == (2, 1008)
    assert "torch-fidelity" in space.facts()["version"]
    direct = space.net(images(2, 0))[0]
    torch.testing.assert_close(seen.features, direct)


def test_spatial_features_are_seven_channels_at_every_place(hub):
    """Of the first convolution of the block that TensorFlow calls mixed_6; N H W C laid out in a row, as ADM keeps them."""
    space, maps = open_space("inception", 16), []
    space.net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: maps.append(out))
    spatial = space(to_float(images(2, 1))).spatial
    assert spatial.shape == (2, 17 * 17 * 7)
    assert maps[0].shape == (2, 192, 17, 17)
    for image, row, column, channel in ((0, 0, 0, 0), (1, 3, 5, 2), (1, 16, 16, 6)):
        assert spatial[image, (row * 17 + column) * 7 + channel] == maps[0][image, channel, row, column]
