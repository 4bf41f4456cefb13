"""Sets whose images are encoded in training, sets of prompts only, buckets that are too small."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import settings, write_folder
from torch.testing import assert_close

from data_pipeline.description import load_description
from data_pipeline.errors import DataError
from data_pipeline.inspection import contact_sheet, verify
from data_pipeline.online import OnlineEncoder
from data_pipeline.prepare import prepare
from data_pipeline.stream import LatentStream, read_all

COUNT = 27
"""Nine of each bucket."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(latents stored, the same encoded on line)"""
    folder = tmp_path_factory.mktemp("online")
    photos = write_folder(folder / "photos", COUNT)
    prepare(settings(folder / "stored", photos), show_progress=False)
    prepare(settings(folder / "online", photos, latents="online", like=str(folder / "stored")), show_progress=False)
    return folder / "stored", folder / "online"


def open_stream(root: Path, **arguments) -> LatentStream:
    return LatentStream(root, "train", **({"batch_size": 4, "seed": 0} | arguments))


def take(stream: LatentStream, batches: int) -> list[tuple[str, torch.Tensor]]:
    taken = [stream.next() for _ in range(batches)]
    return [pair for batch in taken for pair in zip(batch["keys"], batch["latents"], strict=True)]


def assert_same(got: list, want: list) -> None:
    assert [key for key, _ in got] == [key for key, _ in want]
    for (_, one), (_, two) in zip(got, want, strict=True):
        assert torch.equal(one, two)


def test_latents_are_those_that_would_have_been_stored(sets: tuple[Path, Path]) -> None:
    stored, online = sets
    description = load_description(online)
    assert description.latents == "online"
    assert [bucket.latent_shape for bucket in description.buckets("train")] == [
        (48, 12, 20),
        (48, 16, 16),
        (48, 20, 12),
    ]
    assert verify(description) == []
    assert np.asarray(contact_sheet(description, "train", 3)).std() > 30
    for (key, made), (same, kept) in zip(take(open_stream(online), 6), take(open_stream(stored), 6), strict=True):
        assert key == same
        assert_close(made, kept, rtol=1e-3, atol=2e-3)  # stored in float16
    with pytest.raises(ValueError, match="read_all gives stored latents"):
        read_all(online, "train")


def test_augmentation_is_resumed_exactly_on_any_number_of_ranks(sets: tuple[Path, Path]) -> None:
    online = sets[1]
    whole = open_stream(online, augment=True)
    want = take(whole, 14)  # the second epoch begins after six
    plain = take(open_stream(online), 6)
    assert [key for key, _ in plain] == [key for key, _ in want[:24]]
    # A square image in the square bucket has but one crop, so that half of those stay as they are.
    assert sum(torch.equal(one, two) for (_, one), (_, two) in zip(want, plain, strict=False)) <= 8
    again = dict(want[24:48])
    changed = [not torch.equal(latents, again[key]) for key, latents in want[:24] if key in again]
    assert len(changed) > 12 and sum(changed) > len(changed) / 2  # another crop in another epoch
    for after in (0, 4, 8):
        first = open_stream(online, augment=True, num_workers=1)
        take(first, after)
        state = first.state_dict()
        first.close()
        resumed = open_stream(online, augment=True)
        resumed.load_state_dict(state)
        assert_same(take(resumed, 14 - after), want[4 * after :])
        resumed.close()
        ranks = [
            open_stream(online, augment=True, batch_size=2, dp_rank=rank, dp_size=2, num_workers=rank)
            for rank in range(2)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        parts = [take(rank, 2) for rank in ranks]
        assert_same(parts[0][:2] + parts[1][:2] + parts[0][2:] + parts[1][2:], want[4 * after : 4 * after + 8])
        for rank in ranks:
            rank.close()
    with pytest.raises(ValueError, match="saved data position has augment=True"):
        open_stream(online).load_state_dict(state)


def test_half_of_the_images_are_mirrored(sets: tuple[Path, Path]) -> None:
    encoder = OnlineEncoder(load_description(sets[1]), seed=0, batch_size=4, augment=True)
    draws = np.array([encoder._draws(epoch, f"key {i}") for epoch in range(2) for i in range(500)])
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.05
    assert len({tuple(draw) for draw in draws}) == 1000


def test_an_image_that_does_not_decode_is_named(sets: tuple[Path, Path]) -> None:
    encoder = OnlineEncoder(load_description(sets[1]), seed=0, batch_size=4)
    stream = open_stream(sets[1])
    good = stream._shards[0]["image"]
    with pytest.raises(DataError, match="Sample b: its image cannot be decoded"):
        encoder.decode([good, good[:-200]], ["a", "b"], 0, (48, 16, 16))


def test_pixels_that_are_not_there_cannot_be_augmented(sets: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="augment=true changes pixels, but .* Prepare it with latents=online"):
        open_stream(sets[0], augment=True)


def test_prompts_only_give_the_shape(sets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red flower\nan officer in uniform\n" * 4)
    arguments = {"source": "prompts", "like": str(sets[0])}
    prepare(settings(tmp_path / "set", tmp_path / "prompts.txt", **arguments), show_progress=False)
    batch = open_stream(tmp_path / "set").next()
    assert batch["latents"].shape == (4, 48, 16, 16) and not batch["latents"].any()
    assert sorted(set(batch["prompts"])) == ["a red flower", "an officer in uniform"]
    with pytest.raises(DataError, match="holds prompts only: there is nothing to show"):
        contact_sheet(load_description(tmp_path / "set"), "train", 3)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        (0, ["data.augment=true"], "data.augment=true changes pixels, but .* holds latents"),
        (0, ["train.batch_size=10"], "9 samples in the largest bucket of split train, fewer than one batch"),
        (0, ["model.latent_channels=16"], "latents of 48 channels, the model wants model.latent_channels=16"),
        (2, [], "holds prompts only, objective=flow_matching needs images. Set objective=imitation_datafree"),
    ],
)
def test_the_launcher_refuses_data_that_do_not_fit(
    sets: tuple[Path, Path], tmp_path: Path, source: int, overrides: list[str], message: str
) -> None:
    from piflow_dist.config import ConfigError, load_config
    from piflow_dist.launch.preflight import check_data

    if source == 2:
        (tmp_path / "prompts.txt").write_text("a red flower\n" * 9)
        arguments = {"source": "prompts", "like": str(sets[0])}
        prepare(settings(tmp_path / "set", tmp_path / "prompts.txt", **arguments), show_progress=False)
    root = tmp_path / "set" if source == 2 else sets[0]
    shape = ["model=qwen_image_tiny", "model.latent_channels=48", "model.joint_attention_dim=8"]
    config = [*shape, "objective=flow_matching", f"data.root={root}", f"run_dir={tmp_path}", "train.batch_size=4"]
    if source == 0:
        check_data(load_config(config))  # it is the override that does not fit
    with pytest.raises(ConfigError, match=message):
        check_data(load_config([*config, *overrides]))


def test_a_bucket_with_fewer_samples_than_a_batch_is_left_out(tmp_path: Path, caplog) -> None:
    from data_sets import write_set

    write_set(tmp_path, train={(4, 4): 40, (2, 8): 7})
    with caplog.at_level(logging.WARNING):
        stream = open_stream(tmp_path, batch_size=8)
    assert "bucket 2x8 of split train of" in caplog.text and "its 7 samples do not fill a batch of 8" in caplog.text
    assert stream.samples_per_epoch == 40
    assert {tuple(stream.next()["latents"].shape[2:]) for _ in range(5)} == {(4, 4)}
    caplog.clear()
    assert open_stream(tmp_path, batch_size=7).samples_per_epoch == 35 + 7
    assert not caplog.text
