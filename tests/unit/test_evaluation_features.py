"""The feature network: learns, standardises, is cached, and disturbs nothing."""

from pathlib import Path

import pytest
import torch
from evaluation_samples import striped_images

from piflow_dist.evaluation.features import (
    FeatureNetSettings,
    LabelledImages,
    TrainedFeatureNet,
    load_or_train,
    train_feature_net,
)
from piflow_dist.evaluation.samples import EvaluationError

SETTINGS = FeatureNetSettings(batch_size=50)
CLASSES = ["columns", "disc", "rows"]


def labelled(count: int, seed: int) -> LabelledImages:
    images, prompts = striped_images(count, seed)
    labels = torch.tensor([CLASSES.index(prompt.split()[-1]) for prompt in prompts])
    return LabelledImages(images_BCHW=images, labels_B=labels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedFeatureNet:
    cache = tmp_path_factory.mktemp("cache")
    return load_or_train(labelled(300, 0), labelled(60, 1), CLASSES, cache, settings=SETTINGS)


def test_it_learns_the_classes(trained: TrainedFeatureNet) -> None:
    assert not trained.cached
    assert trained.test_accuracy >= 0.95
    assert trained.train_seconds > 0


def test_features_are_standardised_over_the_training_images(trained: TrainedFeatureNet) -> None:
    features_BD, logits_BK = trained.net.describe(labelled(300, 0).images_BCHW)
    assert features_BD.shape == (300, 64) and logits_BK.shape == (300, 3)
    torch.testing.assert_close(features_BD.mean(dim=0), torch.zeros(64), rtol=0, atol=1e-4)
    torch.testing.assert_close(features_BD.std(dim=0), torch.ones(64), rtol=1e-4, atol=0)


def test_describe_does_not_depend_on_the_batch_size(trained: TrainedFeatureNet) -> None:
    images = labelled(30, 2).images_BCHW
    for whole, split in zip(trained.net.describe(images), trained.net.describe(images, batch_size=7), strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-4)


def test_the_cache_returns_the_same_network_without_training(trained: TrainedFeatureNet) -> None:
    def refuse(step: int, steps: int) -> None:
        raise AssertionError("trained again")

    again = load_or_train(
        labelled(300, 0), labelled(60, 1), CLASSES, trained.path.parent, settings=SETTINGS, progress=refuse
    )
    assert again.cached and again.path == trained.path
    assert (again.test_accuracy, again.train_seconds) == (trained.test_accuracy, trained.train_seconds)
    images = labelled(9, 3).images_BCHW
    assert torch.equal(again.net.describe(images)[0], trained.net.describe(images)[0])


def test_other_images_or_settings_are_another_network(trained: TrainedFeatureNet, tmp_path: Path) -> None:
    quick = FeatureNetSettings(batch_size=50, epochs=1)
    paths = {
        load_or_train(labelled(60, seed), labelled(30, 1), CLASSES, tmp_path, settings=settings).path
        for seed, settings in ((0, quick), (1, quick), (0, FeatureNetSettings(batch_size=50, epochs=1, seed=1)))
    }
    assert len(paths) == 3 and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_named(trained: TrainedFeatureNet, tmp_path: Path) -> None:
    copy = tmp_path / trained.path.name
    copy.write_bytes(trained.path.read_bytes()[:-100])
    with pytest.raises(EvaluationError, match=f"{copy.name} is damaged.*Delete it"):
        load_or_train(labelled(300, 0), labelled(60, 1), CLASSES, tmp_path, settings=SETTINGS)


def test_an_unusable_cache_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="cannot be kept in .*file.*Set cache=DIR"):
        load_or_train(labelled(300, 0), labelled(60, 1), CLASSES, tmp_path / "file", settings=SETTINGS)


def test_a_class_without_images_is_an_error() -> None:
    with pytest.raises(EvaluationError, match=r"\[20, 20, 20, 0\] per class"):
        train_feature_net(labelled(60, 0), 4, SETTINGS)


def test_training_is_repeatable_and_disturbs_nothing() -> None:
    settings = FeatureNetSettings(batch_size=50, epochs=1)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    nets = [train_feature_net(labelled(60, 0), 3, settings) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    for first, second in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(first, second)
