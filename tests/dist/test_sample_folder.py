"""The folder of a sampling request while files beside it change: prompts that are edited, a training that saves on, two jobs."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import save_file

from data_pipeline.codec import load_codec
from piflow_dist.checkpoint.files import CheckpointError, newest_complete
from piflow_dist.config import ConfigError, LaunchConfig, load_config, read_config
from piflow_dist.launch import batch
from piflow_dist.launch.exits import FAILED, REFUSED
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling import control, embeddings, sampler, settings
from piflow_dist.sampling.control import Control, start_ranks
from piflow_dist.sampling.embeddings import EmbeddingCache
from piflow_dist.sampling.failures import FailureLog
from piflow_dist.sampling.gather import LATER, check_unchanged, gather, prepare_folder, sampling_seconds
from piflow_dist.sampling.images import ImageRequest, save_image
from piflow_dist.sampling.run import lock_of, open_request, sample, write_settings
from piflow_dist.sampling.sampler import Sampler, Saver, find_cuts
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request


def request_for(source: Path, out: Path, *options: str) -> SampleRequest:
    return build_request(
        load_config([f"source={source}", f"out={out}", "launch.device=cpu", *options], SampleConfig, "sample")
    )


def test_processes_read_the_prompts_as_they_were(student_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a\u2028red square", "seeds": [3, 1]}, {"prompt": "a circle", "height": 16, "width": 32}]
    prompts.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    request = request_for(student_run, tmp_path / "out", f"prompts={prompts}")
    prepare_folder(request)
    written = write_settings(request)
    prompts.write_text('{"prompt": "a triangle"}\n')
    again = build_request(read_config(written, SampleConfig))
    check_unchanged(again)
    assert again.images == request.images


def test_what_changed_since_the_folder_was_prepared_is_refused(student_run: Path, tmp_path: Path) -> None:
    request = request_for(student_run, tmp_path / "out")
    prepare_folder(request)
    written = write_settings(request)
    (tmp_path / "out" / "prompts.jsonl").write_text('{"prompt": "a triangle"}\n')
    with pytest.raises(ConfigError, match="images, prompts, seeds or sizes changed"):
        check_unchanged(build_request(read_config(written, SampleConfig)))


def test_what_is_begun_goes_on_with_its_checkpoint(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(student_run, run)
    options = [f"source={run}", f"out={out}", "launch.device=cpu"]

    def opened(*more: str) -> SampleRequest:
        return open_request(load_config([*options, *more], SampleConfig, "sample"))

    request = opened()
    prepare_folder(request)
    write_settings(request)
    newer = run / "checkpoints" / "step_00000099"
    shutil.copytree(request.checkpoint, newer)
    (newer / "manifest.json").write_text((newer / "manifest.json").read_text() + "\n")
    assert newest_complete(run / "checkpoints")[0] == newer

    assert opened().checkpoint == request.checkpoint
    assert opened("overwrite=true").checkpoint == opened("seed=7").checkpoint == newer
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = opened("overwrite=true")
    assert again.checkpoint == request.checkpoint and not again.config.overwrite
    shutil.rmtree(request.checkpoint)
    with pytest.raises(ConfigError, match="weights of the source changed"):
        prepare_folder(opened("overwrite=true"))


def test_a_job_has_the_folder_until_it_has_gathered(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho RUNNING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    request = ("sample", f"source={student_run}", f"out={out}", "launch.device=cpu")
    assert batch.main(*request) == 0
    assert capsys.readouterr().out.strip() == str(out)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert batch.main(*request) == REFUSED
    assert f"out={out} is in use by job 12 (running)" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert batch.main("gather", str(out)) == FAILED  # no task has made anything
    assert lock_of(out).read_text() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert batch.main(*request) == 0


def test_a_prompt_longer_than_its_encoder_reads_is_named(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, in the image, in manifest.jsonl and in meta.json; also where the encoder is not asked again."""
    out, device = tmp_path / "out", torch.device("cpu")
    request = request_for(student_run, out, "images_per_prompt=2")
    long, embeds_LD = request.images[2].prompt, torch.ones(3, 64)
    encoder = SimpleNamespace(encode=lambda prompts: [embeds_LD], cut=lambda prompt: "cut!" if prompt == long else "")
    monkeypatch.setattr(embeddings, "load_prompt_encoder", lambda *arguments: encoder)
    prepare_folder(request)
    cache = EmbeddingCache(request.config.embeddings_folder, request.dataset.prompt_encoder)
    save_file({"embedding": embeds_LD}, tmp_path / "earlier.safetensors")  # of a version that did not say it
    request.config.embeddings_folder.mkdir()
    (tmp_path / "earlier.safetensors").rename(cache.path(long))
    assert cache.encode([image.prompt for image in request.images], device) == {}
    monkeypatch.setattr(embeddings, "load_prompt_encoder", None)
    assert cache.encode([image.prompt for image in request.images], device) == {}

    assert find_cuts(request.images, cache, is_main=False) == {long: "cut!"} and not caplog.text
    cuts = find_cuts(request.images, cache, is_main=True)
    assert "1 of 3 prompts are longer" in caplog.text and "\n  prompt 1: cut!" in caplog.text
    saver = Saver(request, load_codec(request.dataset.codec), FailureLog(out, 0), device, cuts)
    saver.save(request.images, torch.zeros(6, 16, 4, 4), 1.0)
    saver.finish()
    assert gather(request) == ""
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line.get("cut") for line in lines] == [None, None, "cut!", "cut!", None, None]
    assert json.loads((out / "meta.json").read_text())["cut_prompts"] == 1


def test_what_a_bad_disk_leaves_of_a_folder_is_made_again(
    student_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    request = request_for(student_run, out, "latents=false")
    pixels_chw, info = torch.zeros(1, 16, 16, dtype=torch.uint8), {"seconds": 1.0}

    def make_all() -> str:
        for image in request.missing():
            save_image(out, image, pixels_chw, None, info)
        return gather(request)

    prepare_folder(request)
    assert make_all() == "" and prepare_folder(request)
    for lost in ("manifest.jsonl", "contact_sheet.png", "meta.json"):
        (out / lost).unlink()
        assert not prepare_folder(request)  # there is something to do
        assert make_all() == "" and prepare_folder(request)
    (out / "meta.json").unlink()
    prepare_folder(request)
    damaged = out / request.images[1].file
    damaged.write_bytes(damaged.read_bytes()[:60] + damaged.read_bytes()[-20:])  # both ends are those of a PNG
    assert "1 of 3 images are not in" in gather(request) and f"{damaged} is damaged" in caplog.text
    assert not prepare_folder(request)
    assert make_all() == "" and len((out / "manifest.jsonl").read_text().splitlines()) == 3
    for name, words in (("request.json", "not readable JSON"), ("settings.yaml", "Remove it to go on")):
        write_settings(request)
        (out / "meta.json").unlink(missing_ok=True)
        (out / name).write_text("{")
        with pytest.raises((CheckpointError, ConfigError), match=words):
            open_request(request.config)
        shutil.rmtree(out)
        prepare_folder(request)


def test_a_process_on_a_cpu_has_one_thread_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "Control", lambda: None)
    device = torch.device("cpu")

    def started(*arguments: object) -> SimpleNamespace:
        torch.set_num_threads(2)  # of the cores shared out
        return SimpleNamespace(device=device)

    monkeypatch.setattr(control, "start_process_group", started)
    try:
        threads = {None: 1, 1: 1, 2: 2}
        for wanted, found in threads.items():
            start_ranks(SampleConfig(launch=LaunchConfig(threads=wanted)))
            assert torch.get_num_threads() == found
        device = torch.device("cuda")
        start_ranks(SampleConfig())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_folder_that_a_kill_left_half_prepared_is_known(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    request, other = request_for(student_run, out), request_for(student_run, out, "seed=7", "overwrite=true")

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)  # the folders are there
        prepare_folder(request)
    assert not prepare_folder(request)
    for folder in ("images", "latents"):
        (out / folder / "a.png").write_text("")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path, **options: killed() if any(path.iterdir()) else path.rmdir())
        prepare_folder(other)
    assert not prepare_folder(other) and not any((out / "images").iterdir())

    shutil.rmtree(out)
    for folder in ("images", "failures"):  # of a version that wrote request.json last
        (out / folder).mkdir(parents=True)
    (out / ".request.json.17.tmp").write_text("{")
    assert not prepare_folder(request)
    (out / "request.json").unlink()
    (out / "images" / "holiday.png").write_text("")
    with pytest.raises(ConfigError, match="was not made by this tool"):
        prepare_folder(other)
    assert (out / "images" / "holiday.png").exists()


def test_a_dry_run_checks_and_writes_nothing(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    request = request_for(student_run, out, "launch.dry_run=true", "launch.processes=2")
    assert sample(request.config) == out and not list(tmp_path.iterdir())
    assert f"2 processes would make 3 of 3 images in {out}" in capsys.readouterr().out
    job = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    options = (f"source={student_run}", f"out={out}", "launch.device=cpu", "launch.dry_run=true")
    assert batch.main("sample", *options) == 0 and not list(tmp_path.iterdir())
    said = capsys.readouterr()
    assert not said.out and "2 processes would make 3 of 3 images" in said.err  # stdout names a folder to be filled
    prepare_folder(request)
    save_image(out, request.images[0], torch.zeros(1, 16, 16, dtype=torch.uint8), torch.zeros(1), {})
    sample(request.config)
    sample(request_for(student_run, out, "seed=7", "overwrite=true", "launch.dry_run=true").config)
    said = capsys.readouterr().out
    assert "make 2 of 3" in said and "make 3 of 3" in said and (out / request.images[0].file).exists()
    with pytest.raises(ConfigError, match="images of other settings"):
        sample(request_for(student_run, out, "seed=7", "launch.dry_run=true").config)


def names_of_layers(rank: int, world_size: int) -> list[list[int]]:
    there, found = Control(), []
    for tp, all_ranks in ((2, False), (2, True), (1, True), (1, False)):
        there.share_layers(Topology(rank, world_size, rank, torch.device("cpu"), tp), all_ranks)
        there.wait_for_layers()
        found.append([] if there.layers is None else dist.get_process_group_ranks(there.layers))
    return found


def test_ranks_that_share_layers_wait_for_each_other_outside_them(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every evaluation, the one that a rank makes for the others' sake included."""
    everyone = [0, 1, 2, 3]
    for rank, found in enumerate(run_ranks(names_of_layers, 4, 4)):
        assert found == [everyone[rank // 2 * 2 :][:2], everyone, everyone, []]

    world = ("parallel.shard_base=true", "launch.processes=2", "batch_size=1")
    request, events = request_for(student_run, tmp_path / "out", *world), []
    monkeypatch.setattr(sampler, "load_network", lambda *arguments: None)
    monkeypatch.setattr(Sampler, "sample", lambda *arguments: events.append("sample") or torch.zeros(1, 16, 4, 4))
    monkeypatch.setattr(Saver, "save", lambda *arguments: events.append("save"))
    fake = SimpleNamespace(
        from_main=lambda flags: flags,
        any_rank=lambda flags: flags,
        share_layers=lambda topology, all_ranks: events.append(all_ranks),
        wait_for_layers=lambda: events.append("wait"),
        wait_for_all=lambda: None,
    )
    prepare_folder(request)
    cache = EmbeddingCache(request.config.embeddings_folder, request.dataset.prompt_encoder)
    cache.encode(["", *(image.prompt for image in request.images)], torch.device("cpu"))
    sampler.run(request, Topology(1, 2, 1, torch.device("cpu")), fake)  # one of three images
    assert events == [True, "wait", "sample", "save", "wait", "sample"]


def test_other_codecs_encoders_and_bases_are_other_images(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under the same paths; folders of versions that did not say them stay valid."""
    out = tmp_path / "out"
    request = request_for(student_run, out)

    def with_data(**changed: object) -> SampleRequest:
        return dataclasses.replace(request, dataset=dataclasses.replace(request.dataset, **changed))

    prepare_folder(request)
    check_unchanged(request)
    for what, key in (("codec", "scale"), ("prompt_encoder", "seed")):
        other = with_data(**{what: {**getattr(request.dataset, what), key: 7}})
        with pytest.raises(ConfigError, match=f"{what.replace('_', ' ')} of the data changed"):
            prepare_folder(other)
    said = json.loads((out / "request.json").read_text())
    (out / "request.json").write_text(json.dumps({k: v for k, v in said.items() if k not in LATER}))
    check_unchanged(other)
    vae = [with_data(codec={"kind": "vae", "path": path, "weights": "1"}).identity() for path in ("a", "b")]
    assert vae[0] == vae[1]

    adapter = SimpleNamespace(lora=request.run.lora, base=None, model=request.run.model)
    likeness = ["first"]
    monkeypatch.setattr(settings, "student_folder", lambda source: request.checkpoint)
    monkeypatch.setattr(settings, "open_student", lambda folder: adapter)
    monkeypatch.setattr(settings, "open_teacher", lambda run: None)
    monkeypatch.setattr(settings, "weights_likeness", lambda source, model: likeness[0])
    prepare_folder(request)
    likeness[0] = "second"
    with pytest.raises(ConfigError, match="weights of the base changed"):
        prepare_folder(request)
    adapter.base = "said"  # and compared as it was opened
    assert request.identity()["base_sha256"] is None


def test_a_rate_is_not_that_of_compiling(student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(student_run, tmp_path / "out", "compile=true", "batch_size=1", "images_per_prompt=3")
    prepare_folder(request)
    now = [0.0]

    def sample_slowly(self: Sampler, images: list[ImageRequest]) -> torch.Tensor:
        length = self.cache.length(images[0].prompt)
        now[0] += 1.0 if length in seen else 100.0
        seen.add(length)
        return torch.zeros(1, 16, 4, 4)

    seen = set()
    monkeypatch.setattr(sampler, "load_network", lambda *arguments: None)
    monkeypatch.setattr(Sampler, "sample", sample_slowly)
    monkeypatch.setattr(sampler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    alone = SimpleNamespace(
        from_main=lambda flags: flags,
        any_rank=lambda flags: flags,
        share_layers=lambda *arguments: None,
        wait_for_layers=lambda: None,
        wait_for_all=lambda: None,
    )
    sampler.run(request, Topology(0, 1, 0, torch.device("cpu")), alone)
    assert gather(request) == "" and len(seen) > 1
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["images"], meta["seconds"]) == (9, 9.0)
    for image in request.images[1:]:
        (request.out / image.file).unlink()
    first = [json.loads(line) for line in (request.out / "manifest.jsonl").read_text().splitlines()][:1]
    assert sampling_seconds(request, first) == 100.0  # there is no other
