"""tools/sample.py: images that depend on prompt, seed, weights and settings alone; folders that are whole or say so; plain refusals."""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS, REPO, run_tool
from numerics.reference import GaussianMixture, sample, warp
from PIL import Image
from ranks import run_ranks
from torch import Tensor
from torch.testing import assert_close

from data_pipeline.codec import load_codec
from data_pipeline.prompts import TokenTableEncoder, vocabulary
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.checkpoint.runs import read_run_config
from piflow_dist.config import ScheduleConfig, load_config
from piflow_dist.evaluation.samples import load_samples, read_image, read_latents
from piflow_dist.models.pretrained import load_model
from piflow_dist.models.qwen_image import QwenImage
from piflow_dist.sampling import embeddings, sampler
from piflow_dist.sampling.control import Control
from piflow_dist.sampling.gather import gather, prepare_folder, seconds_of
from piflow_dist.sampling.settings import SampleConfig, build_request

IMAGES = 2 * len(PROMPTS)
COMMON = ("images_per_prompt=2", "seed=5", "launch.device=cpu", "launch.threads=1")
# Noise between the steps and a sharpened mixture: every part of the sampler has a say in the images.
STUDENT = (*COMMON, "h=0.5", "temperature=auto")
TEACHER = (*COMMON, "steps=6", "guidance=2", "guidance_interval=[0,0.7]")


def run_sampler(source: Path, out: Path, *arguments: str, code: int = 0) -> str:
    done = run_tool("sample", f"source={source}", f"out={out}", *arguments)
    assert done.returncode == code, done.stdout
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Job:
    """A request for some ranks that are there already."""

    source: Path
    out: Path
    options: tuple[str, ...]
    tp: int = 1


def sample_jobs(rank: int, world_size: int, jobs: list[Job]) -> list[str]:
    """What tools/sample.py does, without a launcher: one complaint per job."""
    if any(job.tp > 1 for job in jobs):
        from piflow_dist.parallel.groups import start_groups

        start_groups(2, timedelta(seconds=600))
    control = Control()
    return [sample_job(rank, world_size, job, control) for job in jobs]


def sample_job(rank: int, world_size: int, job: Job, control: Control) -> str:
    from piflow_dist.parallel.topology import Topology

    world = (f"launch.processes={world_size}", f"parallel.tp={job.tp}")
    request = build_request(
        load_config([f"source={job.source}", f"out={job.out}", *job.options, *world], SampleConfig, "sample")
    )
    if rank == 0:
        prepare_folder(request)
    control.wait_for_all()
    sampler.run(request, Topology(rank, world_size, rank, torch.device("cpu"), job.tp), control)
    return gather(request) if rank == 0 else ""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def by_image(folder: Path) -> dict[tuple, tuple[Tensor, Tensor]]:
    """(prompt, seed, height, width) -> latents and pixels."""
    return {
        (line["prompt"], line["seed"], line["height"], line["width"]): (
            read_latents(folder / line["latents"]),
            read_image(folder / line["file"]),
        )
        for line in lines_of(folder)
    }


def assert_same_images(got: Path, want: Path, atol: float | None = None) -> None:
    """To the bit, or latents to atol."""
    found, wanted = by_image(got), by_image(want)
    assert found.keys() <= wanted.keys() and found
    for key, (latents_CHW, image_chw) in found.items():
        assert_close(latents_CHW, wanted[key][0], rtol=0, atol=atol or 0)
        assert atol or torch.equal(image_chw, wanted[key][1])


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def student_images(tmp_path_factory: pytest.TempPathFactory, student_run: Path) -> Path:
    """From 2 processes."""
    out = tmp_path_factory.mktemp("samples") / "student"
    run_sampler(student_run, out, *STUDENT, "launch.processes=2")
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, student_run: Path, teacher_run: Path) -> Path:
    """The same images by 1, 2 and 4 ranks, split and whole, in other batches and another order; and some others."""
    out = tmp_path_factory.mktemp("made")
    backwards, sizes = out / "backwards.txt", out / "sizes.jsonl"
    backwards.write_text("\n".join(sorted(PROMPTS, reverse=True)))
    wide = {"prompt": PROMPTS[0], "seed": 6, "height": 16, "width": 32}
    tall = {"prompt": PROMPTS[1], "seeds": [5, 7], "height": 48, "width": 16}
    usual = {"prompt": PROMPTS[1], "seed": 6}
    sizes.write_text("".join(json.dumps(line) + "\n" for line in (wide, tall, usual)))

    def student(name: str, *options: str, tp: int = 1) -> Job:
        return Job(student_run, out / name, (*STUDENT, *options), tp)

    run_ranks(
        sample_jobs,
        4,
        4,
        [
            student("four"),
            student("tp2-dp2", "batch_size=1", tp=2),
            student("tp2-dp2-sharded", "parallel.shard_base=true", "batch_size=1", tp=2),
        ],
        time_limit=300,
    )
    run_ranks(
        sample_jobs,
        2,
        2,
        [
            student("two-backwards", "batch_size=1", f"prompts={backwards}"),
            student("sharded", "parallel.shard_base=true", "batch_size=1"),
            student("tp2", tp=2),
            Job(teacher_run, out / "teacher-two", (*TEACHER, "batch_size=1")),
        ],
        time_limit=300,
    )
    run_ranks(
        sample_jobs,
        1,
        1,
        [
            student("one", "batch_size=4"),
            student("elastic", "nfe=6", "h=0"),
            student("bf16", "dtype=bf16"),
            student("no-latents", "latents=false"),
            student("raw", "ema=false"),
            Job(student_run, out / "sizes", ("launch.device=cpu", "h=0.5", f"prompts={sizes}")),
            Job(teacher_run, out / "teacher-one", TEACHER),
        ],
        time_limit=300,
    )
    return out


@pytest.mark.parametrize("name", ["one", "two-backwards", "four", "sharded"])
def test_images_do_not_depend_on_ranks_batches_or_order(student_images: Path, made: Path, name: str) -> None:
    assert_same_images(made / name, student_images)
    assert len(by_image(made / name)) == IMAGES


def test_split_images_do_not_depend_on_ranks_or_batches(student_images: Path, made: Path) -> None:
    """Sums over two halves of a layer are rounded otherwise than the whole: to rounding the same as one process's."""
    assert_same_images(made / "tp2-dp2", made / "tp2")
    assert_same_images(made / "tp2-dp2-sharded", made / "tp2")
    assert_same_images(made / "tp2", student_images, atol=1e-4)


def test_a_teachers_images_do_not_depend_on_ranks_or_batches(made: Path) -> None:
    assert_same_images(made / "teacher-two", made / "teacher-one")


def test_settings_have_a_say(student_images: Path, made: Path) -> None:
    want = by_image(student_images)
    for name, least, most in (("bf16", 1e-4, 0.5), ("raw", 1e-4, math.inf)):
        off = [(latents - want[key][0]).abs().max().item() for key, (latents, _) in by_image(made / name).items()]
        assert min(off) > least and max(off) < most, (name, off)


def test_sizes_may_be_mixed(student_images: Path, made: Path) -> None:
    """An image of the usual size is the one that it is among others; the other sizes are as asked for."""
    found = by_image(made / "sizes")
    sizes = [(PROMPTS[0], 6, 16, 32), (PROMPTS[1], 5, 48, 16), (PROMPTS[1], 7, 48, 16), (PROMPTS[1], 6, 16, 16)]
    assert list(found) == sizes
    for (_, _, height, width), (latents_CHW, image_chw) in found.items():
        assert latents_CHW.shape == (16, height // 4, width // 4) and image_chw.shape == (1, height, width)
    assert torch.equal(found[sizes[3]][0], by_image(student_images)[sizes[3]][0])


def test_a_dynamic_shift_is_that_of_each_images_size(student_run: Path, made: Path) -> None:
    request = build_request(
        load_config([f"source={student_run}", "out=x", f"prompts={made / 'sizes.jsonl'}"], SampleConfig, "sample")
    )
    dynamic = dataclasses.replace(request, run=dataclasses.replace(request.run, schedule=ScheduleConfig(dynamic=True)))
    for image, tokens in zip(dynamic.images, (8, 12, 12, 4), strict=True):
        want = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
        assert_close(dynamic.schedule(image).shift, want, rtol=1e-9, atol=0)
    given = dataclasses.replace(dynamic, config=dataclasses.replace(request.config, shift=2.0))
    assert given.schedule(request.images[0]).shift == 2.0


def test_what_a_folder_holds(student_images: Path, made: Path) -> None:
    lines = lines_of(student_images)
    assert [line["prompt"] for line in lines] == [prompt for prompt in sorted(PROMPTS) for _ in range(2)]
    assert [line["file"] for line in lines] == [f"images/{p:05d}_{seed}.png" for p in range(3) for seed in (5, 6)]
    samples = load_samples(student_images)
    codec = load_codec({"kind": "block_dct", "image_channels": 1, "block": 4, "scale": 1.0})
    decoded = (codec.decode(samples.latents_BCHW).clamp(-1, 1) + 1) * 127.5
    assert (decoded.round().to(torch.uint8) == samples.images_BCHW).all()
    for line in lines:
        with Image.open(student_images / line["file"]) as picture:
            assert picture.size == (line["width"], line["height"])
            found = (picture.info["prompt"], picture.info["seed"], picture.info["nfe"], picture.info["h"])
            assert found == (line["prompt"], str(line["seed"]), "4", "0.5")
    meta = json.loads((student_images / "meta.json").read_text())
    assert (meta["kind"], meta["network_evaluations"], meta["images"], meta["failed"]) == ("student", 4, IMAGES, 0)
    assert meta["seconds"] == pytest.approx(sum(seconds_of(student_images / line["file"]) for line in lines))
    with Image.open(student_images / "contact_sheet.png") as sheet:
        assert sheet.size == (2 * 64, 3 * 64)
    assert not list(student_images.rglob("*.tmp")) and not (student_images / "failures").exists()
    assert not (made / "no-latents" / "latents").exists() and load_samples(made / "no-latents").latents_BCHW is None


def test_samples_are_a_child_of_the_trainings_mlflow_run(student_run: Path, student_images: Path) -> None:
    import mlflow

    from piflow_dist.sampling.publish import publish
    from piflow_dist.tracking.tracker import read_run_id, tracking_uri

    options = (*STUDENT, "mlflow=true")
    request = build_request(
        load_config([f"source={student_run}", f"out={student_images}", *options], SampleConfig, "sample")
    )
    publish(request)
    client, training = mlflow.MlflowClient(tracking_uri=tracking_uri(request.run)), read_run_id(student_run)
    (child,) = client.search_runs(
        [client.get_run(training).info.experiment_id], f"tags.`mlflow.parentRunId` = '{training}'"
    )
    assert child.info.run_name == f"samples {student_images.name}" and child.info.status == "FINISHED"
    found = {Path(file.path).name for file in client.list_artifacts(child.info.run_id)}
    assert found == {"contact_sheet.png", "manifest.jsonl", "meta.json"}


# What a kill leaves, and what fails.


def test_a_finished_folder_is_left_alone(student_images: Path, student_run: Path) -> None:
    before = written_at(student_images)
    said = run_sampler(
        student_run, student_images, *STUDENT, "nfe=4", "batch_size=2", "seeds=[5,6]", "seed=0", "images_per_prompt=1"
    )
    assert f"all {IMAGES} images are there" in said
    assert written_at(student_images) == before


def test_a_killed_run_makes_only_what_is_missing(teacher_run: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "killed", (*COMMON[1:], "images_per_prompt=4", "steps=60", "batch_size=1")
    command = [sys.executable, str(REPO / "tools" / "sample.py"), f"source={teacher_run}", f"out={out}", *options]
    process = subprocess.Popen([*command, "launch.processes=2"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while len(list(out.glob("images/*.png"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)  # the ranks die with it
    process.wait()
    while any(out.as_posix() in line for line in commands_running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = {path: path.stat().st_mtime_ns for path in out.glob("images/*.png")}
    assert 2 <= len(left) < 12 and not (out / "meta.json").exists()
    cut, *kept = left
    cut.write_bytes(cut.read_bytes()[:-20])  # as a full disk leaves it
    (out / "images" / ".00000_5.png.99999.tmp").write_bytes(b"half an image")
    run_sampler(teacher_run, out, *options, "launch.processes=1")
    assert all(path.stat().st_mtime_ns == left[path] for path in kept) and cut.stat().st_mtime_ns != left[cut]
    assert len(lines_of(out)) == 12 and not list(out.rglob("*.tmp"))
    run_ranks(sample_jobs, 1, 1, [Job(teacher_run, tmp_path / "whole", options)], time_limit=300)
    assert_same_images(out, tmp_path / "whole")


def commands_running() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_a_failing_prompt_costs_only_its_own_images(student_run: Path, student_images: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\na purple dodecahedron\n{PROMPTS[1]}\n")
    options = (*STUDENT, f"prompts={prompts}")
    for _ in range(2):  # tried again, and said again
        said = run_sampler(student_run, out, *options, "launch.processes=2", code=1)
        assert "2 of 6 images could not be made" in said and "'purple' is not in the token table" in said
        assert "Traceback" not in said
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(line["prompt_index"], line["seed"]) for line in failed] == [(1, 5), (1, 6)]
    assert "dodecahedron" in failed[0]["prompt"] and "token table" in failed[0]["reason"]
    assert_same_images(out, student_images)
    assert len(load_samples(out)) == 4


def sample_with_faults(rank: int, job: Job) -> str:
    """There is memory for one image at a time, and not for each; one diverges; the decoder fails twice; no text encoder is to be had."""
    whole, load_codec_of = sampler.Sampler.sample, sampler.load_codec

    def diverging(self: sampler.Sampler, images: list) -> Tensor:
        if len(images) > 1 or (images[0].prompt_index, images[0].seed) == (2, 5):
            raise torch.OutOfMemoryError("too much")
        latents_nCHW = whole(self, images)
        for image, latents_CHW in zip(images, latents_nCHW, strict=True):
            if (image.prompt_index, image.seed) == (1, 6):
                latents_CHW[0, 0, 0] = math.nan
        return latents_nCHW

    def failing_decoder(*arguments: object) -> object:
        codec = load_codec_of(*arguments)
        decode, faults = codec.decode, [torch.OutOfMemoryError("too much"), None]

        def failing(latents_BCHW: Tensor) -> Tensor:
            if not faults:
                return decode(latents_BCHW)
            if fault := faults.pop():
                raise fault
            return decode(latents_BCHW) * math.nan

        codec.decode = failing
        return codec

    def absent(*arguments: object) -> None:
        raise AssertionError("the encoder was loaded")

    sampler.Sampler.sample, sampler.load_codec, embeddings.load_prompt_encoder = diverging, failing_decoder, absent
    return sample_jobs(rank, 1, [job])[0]


def test_an_image_that_cannot_be_made_is_reported_and_embeddings_are_kept(
    student_run: Path, student_images: Path, tmp_path: Path
) -> None:
    kept = f"embeddings={student_images.parent / '.embeddings'}"
    job = Job(student_run, tmp_path / "out", (*STUDENT, kept))
    (complaint,) = run_ranks(sample_with_faults, 1, job, time_limit=300)
    assert "4 of 6 images could not be made" in complaint
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    for words in (
        "latents are not finite",
        "pixels are not finite",
        "not suffice to decode it",
        "not suffice to sample it",
    ):
        assert sum(words in reason for reason in reasons) == 1, reasons
    assert_same_images(tmp_path / "out", student_images)
    assert len(lines_of(tmp_path / "out")) == IMAGES - 4


# The same images from plain loops, one image at a time, in which only the network is the package's.


def network_of(run: Path) -> QwenImage:
    checkpoint, _ = newest_complete(run / "checkpoints")
    return load_model(checkpoint, read_run_config(checkpoint)).eval()


def encode(prompt: str) -> Tensor:
    (text_LD,) = TokenTableEncoder(vocabulary(PROMPTS), dim=64).encode([prompt])
    return text_LD[None]


def noise_generator(prompt: str, seed: int) -> torch.Generator:
    """Of the prompt and the seed alone."""
    digest = hashlib.blake2b(f"{seed},{prompt}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@pytest.mark.parametrize(("name", "nfe", "temperature", "h"), [("one", 4, 0.3, 0.5), ("elastic", 6, 0.5, 0.0)])
@torch.no_grad()
def test_a_student_image_is_the_formulas(
    made: Path, student_run: Path, name: str, nfe: int, temperature: float, h: float
) -> None:
    model = network_of(student_run)
    for (prompt, seed, _, _), (want_CHW, _) in by_image(made / name).items():
        generator, text = noise_generator(prompt, seed), encode(prompt)

        def predict(x: Tensor, sigma: float, text: Tensor = text) -> GaussianMixture:
            out = model(x[None].float(), torch.tensor([sigma]), text, torch.ones(text.shape[:2], dtype=torch.bool))
            out = {name: value[0].double() for name, value in out.items()}
            return GaussianMixture(out["means"], out["logstds"].reshape(()), out["logweights"], x, sigma)

        def noise(generator: torch.Generator = generator) -> Tensor:
            return torch.randn(16, 4, 4, generator=generator).double()

        options = {"last_scale": 0.5, "total_substeps": 128, "temperature": temperature, "h": h, "noise": noise}
        got = sample(predict, noise(), 1.0, nfe, **options)
        assert_close(want_CHW.double(), got, rtol=0, atol=2e-4 * got.abs().max().item())


@torch.no_grad()
def test_a_teacher_image_is_the_formulas(made: Path, teacher_run: Path) -> None:
    model, empty = network_of(teacher_run), encode("")
    for (prompt, seed, _, _), (want_CHW, _) in by_image(made / "teacher-one").items():
        x = torch.randn(1, 16, 4, 4, generator=noise_generator(prompt, seed)).double()
        for i in range(6):
            here, there = warp(1 - i / 6, 1.0), warp(1 - (i + 1) / 6, 1.0)
            sigma = torch.tensor([here])
            u, u_empty = (
                model(x.float(), sigma, text, torch.ones(text.shape[:2], dtype=torch.bool)).double()
                for text in (encode(prompt), empty)
            )
            x = x + (there - here) * (u_empty + (2 if here <= 0.7 else 1) * (u - u_empty))
        assert_close(want_CHW[None].double(), x, rtol=0, atol=2e-4 * x.abs().max().item())


# Requests that cannot work: refused before a process starts, exit code 2, value and option in the message.


@pytest.fixture
def refuse(refused_by: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return refused_by("sample")


def test_images_of_other_settings_are_kept(refuse: Callable[..., str], student_images: Path, student_run: Path) -> None:
    before = written_at(student_images)
    message = refuse(f"source={student_run}", f"out={student_images}", *STUDENT, "seed=6")
    assert "seeds: [5, 6] -> [6, 7]" in message and "overwrite=true" in message
    assert written_at(student_images) == before


def test_overwrite_makes_them_again(student_images: Path, student_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(student_images, out)
    run_ranks(sample_jobs, 1, 1, [Job(student_run, out, (*STUDENT, "seed=7", "overwrite=true"))])
    assert [line["seed"] for line in lines_of(out)] == [7, 8] * 3 and len(list(out.glob("images/*.png"))) == IMAGES


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("nfe=2", ("nfe=2 is below the 4", "Use 4 or more")),
        ("temperature=3", ("temperature=3", "(0, 1]")),
        ("temperature=warm", ("temperature=warm is not a number",)),
        ("steps=8", ("steps=8 is for teachers", "is a student", "nfe, temperature, h, substeps")),
        ("guidance=2", ("guidance=2.0 is for teachers",)),
        ("guidance_interval=[0,0.7]", ("guidance_interval=[0.0, 0.7] with guidance=1.0",)),
        ("merge=true", ("merge=true", "has no adapters (mode=full)")),
        ("h=-1", ("h=-1", "0 (ODE) or more")),
        ("images_per_prompt=0", ("images_per_prompt",)),
        ("seeds=[1,2]", ("give seeds alone",)),
        ("size=20", ("height=20 is no multiple of 8", "Use 16")),
        ("height=16", ("height and width belong together",)),
        ("parallel.tp=2", ("launch.processes=1", "parallel.tp=2")),
        ("dtype=fp8", ("dtype=fp8", "fp32, bf16")),
        ("guidanse=2", ("guidanse", "guidance")),
        ("prompts=/nowhere/prompts.txt", ("prompts=/nowhere/prompts.txt does not exist",)),
        ("source=/nowhere/run", ("source=/nowhere/run does not exist",)),
    ],
)
def test_refused(
    refuse: Callable[..., str], student_run: Path, tmp_path: Path, option: str, words: tuple[str, ...]
) -> None:
    message = refuse(f"source={student_run}", f"out={tmp_path / 'out'}", *COMMON, option)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red square", "line 1 is not JSON"),
        ('{"seed": 1}', "line 1 should look like"),
        ('{"prompt": "a", "sede": 1}', "sede, which is not known"),
        ('{"prompt": "a", "seed": "1"}', "seed=1 is not of the type int"),
        ('{"prompt": "a", "seeds": [1, 1]}', "none, or one twice"),
        ('{"prompt": "a", "width": 20}', "width=20 is no multiple of 8"),
    ],
)
def test_lines_that_cannot_be_read_are_named(
    refuse: Callable[..., str], student_run: Path, tmp_path: Path, line: str, words: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line + "\n")
    assert words in refuse(f"source={student_run}", f"out={tmp_path / 'out'}", f"prompts={prompts}", *COMMON)


@pytest.mark.parametrize("option", ["nfe=4", "temperature=0.3", "h=0.5", "substeps=64"])
def test_a_students_keys_are_refused_for_a_teacher(
    refuse: Callable[..., str], teacher_run: Path, tmp_path: Path, option: str
) -> None:
    message = refuse(f"source={teacher_run}", f"out={tmp_path / 'out'}", *COMMON, option)
    assert f"{option} is for students" in message and "steps, guidance" in message


def test_a_folder_of_somebody_else_is_refused(refuse: Callable[..., str], student_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "is not empty" in refuse(f"source={student_run}", f"out={tmp_path}", "overwrite=true")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
