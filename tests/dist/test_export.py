"""Exports sample what their checkpoints sample; students start from them; checkpoints rewritten for other worlds.

One process trains three small students and saves them; two processes then start from them, or resume them, under tensor parallelism.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_weights, rewrite_state, run_tool
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_tensor_parallel import joined
from test_zero import ADAMW, MIXED, TIED, Course, keep_weights, make_config
from torch import Tensor
from torch.testing import assert_close

from images import sample_here
from piflow_dist.checkpoint.catalog import remove
from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import CheckpointError, newest_complete, read_json
from piflow_dist.checkpoint.reshard import reshard
from piflow_dist.config import Config, ConfigError
from piflow_dist.evaluation.samples import load_samples
from piflow_dist.launch.preflight import check_run
from piflow_dist.models.pretrained import DiffusersWeights, load_model
from piflow_dist.models.qwen_image import unread_parameters
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.embeddings import EmbeddingCache
from piflow_dist.sampling.network import load_network
from piflow_dist.sampling.sampler import Sampler
from piflow_dist.sampling.settings import SampleConfig, build_request

STUDENTS = {
    "tied": (*MIXED, *TIED),  # alpha / rank = 2
    "tied-dx": (*MIXED, *TIED, "policy.type=dx", "policy.num_nodes=3"),
    "full-dx": (*MIXED, "policy.type=dx", "policy.num_nodes=3", "policy.mode=polynomial"),
}
FAST = (*ADAMW, "optim.lr=0.02", "optim.warmup_steps=0", "ema.start_step=1", "schedule.shift=2.0")
STEPS = 3


def student_options(name: str) -> tuple[str, ...]:
    return (*STUDENTS[name], *FAST)


def topology_of(rank: int, world_size: int, tp: int = 1) -> Any:
    from datetime import timedelta

    from piflow_dist.parallel.topology import Topology

    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    return Topology(rank, world_size, rank, torch.device("cpu"), tp)


def train_students(rank: int, data: Path, teacher: Path, out: Path) -> None:
    from piflow_dist import train

    topology = topology_of(rank, 1)
    for name in STUDENTS:
        run = train.build_run(make_config(student_options(name), data, teacher, out / name), topology)
        for _ in range(STEPS):
            train.train_step(run)
            run.state.step += 1
            run.ema.update(run.model.masters, run.state.step)
        train.save(run)


@pytest.fixture(scope="module")
def students(tiny_data: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students")
    run_ranks(train_students, 1, tiny_data, teacher_run, out, time_limit=420)
    return out


@pytest.fixture(scope="module")
def exports(students: Path, student_run: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports")
    for name in ("tied", "tied-dx"):
        export(ExportConfig(source=str(students / name), out=str(out / f"{name}-adapter")))
    sources = {name: students / name for name in STUDENTS} | {"full": student_run, "teacher": teacher_run}
    for name, source in sources.items():
        whole = {"format": "merged", "dtype": "fp32", "max_shard_size": "150KB"}
        export(ExportConfig(source=str(source), out=str(out / f"{name}-merged"), **whole))
    return out


def latents(source: Path, **options: Any) -> Tensor:
    # h: every part of a student's sampler has a say in the images.
    own = {"steps": 4} if "teacher" in source.name or source.name == "uninterrupted" else {"h": "0.5"}
    request = build_request(SampleConfig(source=str(source), out="nowhere", seed=3, **own, **options))
    return sample_here(request)[1]


@pytest.mark.parametrize("name", ["tied", "tied-dx"])
def test_an_adapter_samples_its_checkpoints_images(
    students: Path, exports: Path, teacher_run: Path, tiny_data: Path, name: str
) -> None:
    want = latents(students / name)
    for base in (teacher_run, exports / "teacher-merged"):  # the run, and its export in diffusers' layout
        got = latents(exports / f"{name}-adapter", base=str(base), dataset=str(tiny_data))
        assert torch.equal(got, want)  # to the bit: alpha / rank is a power of two
    assert (want - latents(students / name, ema=False)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*STUDENTS, "full", "teacher"])
def test_a_merged_transformer_samples_its_checkpoints_images(
    students: Path, student_run: Path, teacher_run: Path, exports: Path, tiny_data: Path, name: str
) -> None:
    source = {"full": student_run, "teacher": teacher_run}.get(name, students / name)
    want, got = latents(source), latents(exports / f"{name}-merged", dataset=str(tiny_data))
    # To rounding where adapters were merged (W + B A is one matrix now), else to the bit.
    assert_close(got, want, rtol=0, atol=1e-5 if name.startswith("tied") else 0)
    if name.startswith("tied"):
        assert not torch.equal(got, want) and torch.equal(latents(source, merge=True), got)


def test_the_tool_samples_an_adapter(
    students: Path, exports: Path, teacher_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Adapters and their base split over two processes."""
    options = ("seed=3", "h=0.5", "launch.device=cpu", "launch.threads=1", f"dataset={tiny_data}")
    options, out = (*options, "launch.processes=2", "parallel.tp=2"), tmp_path / "samples"
    done = run_tool("sample", f"source={exports / 'tied-adapter'}", f"base={teacher_run}", f"out={out}", *options)
    assert done.returncode == 0, done.stdout
    assert_close(load_samples(out).latents_BCHW, latents(students / "tied"), rtol=0, atol=1e-4)


LINEARS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
PUBLISHED = {
    *(f"transformer_blocks.0.{layer}.lora_{part}.weight" for layer in LINEARS for part in "AB"),
    *(f"transformer_blocks.1.{layer}.lora_{part}.weight" for layer in LINEARS[:2] for part in "AB"),
    *(f"time_text_embed.timestep_embedder.linear_{i}.lora_{part}.weight" for i in (1, 2) for part in "AB"),
    *(f"norm_out.linear.{kind}" for kind in ("weight", "bias")),
}
GM_HEAD = {f"proj_out_{name}.{kind}" for name in ("means", "logweights", "logstds.1", "logstds.3") for kind in ("weight", "bias")}  # fmt: skip


def test_an_adapter_folder_is_the_published_layout(students: Path, exports: Path) -> None:
    folder = exports / "tied-adapter"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "piflow_dist.json",
    }  # fmt: skip
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == PUBLISHED | GM_HEAD
        assert json.loads(file.metadata()["policy_config"]) == {"type": "GMFlow"}
    assert json.loads((folder / "config.json").read_text()) == {
        "_class_name": "GMQwenImageTransformer2DModel", "num_gaussians": 3, "constant_logstd": None, "logstd_inner_dim": 16,
        "gm_num_logstd_layers": 2, "logweights_channels": 4, "in_channels": 64, "out_channels": 64, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    averages, written = read_weights(newest(students / "tied")), load_file(folder / "diffusion_pytorch_model.safetensors")
    for name, value in averages.items():
        scale = 2 if "lora_B" in name else 1  # readers take alpha = rank
        assert torch.equal(written[name.removeprefix("head.")], scale * value), name
    assert str(students) not in (folder / "piflow_dist.json").read_text()  # a folder to give away knows no paths


def test_a_dx_adapter_folder_says_where_its_nodes_are(exports: Path) -> None:
    folder = exports / "tied-dx-adapter"
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == PUBLISHED | {"proj_out.weight", "proj_out.bias"}
        policy = json.loads(file.metadata()["policy_config"])
    assert policy == {"type": "DX", "segment_size": 1 / 3.5, "shift": 2.0}
    written = json.loads((folder / "config.json").read_text())
    assert (written["_class_name"], written["patch_size"], written["out_channels"]) == ("DXQwenImageTransformer2DModel", 1, 192)


@torch.no_grad()
@pytest.mark.parametrize(("name", "groups"), [("teacher", 1), ("tied-dx", 3), ("full-dx", 3)])
def test_diffusers_loads_merged_transformers(exports: Path, name: str, groups: int) -> None:
    """A teacher is its own QwenImageTransformer2DModel; a DX student the same class with N times the outputs."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import QwenImageTransformer2DModel

    from piflow_dist.models.adapters import open_student, student_config, teacher_config
    from piflow_dist.models.heads import pack, unpack

    folder = exports / f"{name}-merged"
    assert len(list(folder.glob("*.safetensors"))) > 2
    theirs, said = QwenImageTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    config = teacher_config(folder, "x") if name == "teacher" else student_config(open_student(folder), None, "x")
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BLD = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 3, 64, generator=generator)
    sigma_B, mask_BL = torch.tensor([0.2, 0.9]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    want = theirs(
        hidden_states=pack(x_BCHW), encoder_hidden_states=text_BLD, encoder_hidden_states_mask=mask_BL,
        timestep=sigma_B, img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    got = load_model(folder, config)(x_BCHW, sigma_B, text_BLD, mask_BL)
    got = got["out"] if groups > 1 else got[:, None]
    assert_close(got, unpack(want, (4, 6), groups), rtol=1e-4, atol=1e-5)


def test_adapters_are_merged_in_fp32_and_cast_once(students: Path, teacher_run: Path, tmp_path: Path) -> None:
    export(ExportConfig(source=str(students / "tied"), out=str(tmp_path / "bf16"), format="merged"))
    written, trained = DiffusersWeights(tmp_path / "bf16"), read_weights(newest(students / "tied"))
    base = read_weights(newest(teacher_run))
    name = "transformer_blocks.0.img_mlp.net.2"
    want = base[f"{name}.weight"] + 2 * trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"]
    assert written.view(f"{name}.weight")[:].dtype == torch.bfloat16
    assert (written.view(f"{name}.weight")[:] != want.bfloat16()).float().mean() < 0.01  # ties of another summation order
    assert torch.equal(written.view("img_in.weight")[:], base["img_in.weight"].bfloat16())
    assert all((written.view(name)[:] == 0).all() for name in unread_parameters(2))  # nobody reads or trained them


def test_what_cannot_be_exported_is_refused(students: Path, exports: Path, teacher_run: Path, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            export(ExportConfig(**{"source": str(students / "full-dx"), "out": str(tmp_path / "out"), **options}))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    assert "mode=full" in refused() and "format=merged" in refused()
    assert "nothing is overwritten" in refused(out=str(exports / "tied-adapter"))
    assert "max_shard_size=tall" in refused(max_shard_size="tall")
    assert "is not the teacher" in refused(source=str(students / "tied"), format="merged", base=str(exports / "teacher-merged"))
    assert "base=PATH" in refused(source=str(students / "tied"), format="merged", base="/nowhere")
    assert "mode=full" in refused(source=str(teacher_run))


def test_the_tool_says_what_it_wrote(students: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from conftest import load_tool

    load_tool("export").run_export([f"source={students / 'tied'}", f"out={tmp_path / 'out'}", "ema=false", "dtype=bf16"])
    said = capsys.readouterr().out
    assert "26 tensors" in said and "raw weights" in said and f"step {STEPS}" in said
    written, raw = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), read_weights(newest(students / "tied"), False)  # fmt: skip
    assert torch.equal(written["norm_out.linear.weight"], raw["norm_out.linear.weight"].bfloat16())


def test_a_full_disk_leaves_nothing_behind(students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("piflow_dist.checkpoint.streaming.TensorFile.write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(ExportConfig(source=str(students / "tied"), out=str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match="No space left"):
        reshard(newest(students / "tied"), tmp_path / "run", 2, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset": None}, ("dataset=DIR",)),
        ({"base": None}, ("base=PATH",)),
        ({"base": "another"}, ("is not the transformer", "likeness")),
        ({"dataset": "/nowhere"}, ("dataset=/nowhere",)),
    ],
)
def test_an_adapter_that_cannot_be_sampled_is_refused(
    exports: Path, teacher_run: Path, tiny_data: Path, tmp_path: Path, changed: dict, words: tuple[str, ...]
) -> None:
    if changed.get("base") == "another":
        from conftest import write_diffusers_teacher

        changed = {"base": str(write_diffusers_teacher(tmp_path / "another"))}
    options = {"base": str(teacher_run), "dataset": str(tiny_data), **changed}
    with pytest.raises(ConfigError) as error:
        build_request(SampleConfig(source=str(exports / "tied-adapter"), out="nowhere", **options))
    assert all(word in str(error.value) for word in words), error.value


# Starting from an export or a checkpoint: init_from.

STARTS = {
    "tied from adapter": ("tied", "tied-adapter", ("lora.alpha=4",)),
    "tied from checkpoint": ("tied", "tied", ()),
    "tied from raw weights": ("tied", "tied", ("init_ema=false",)),
    "full from merged": ("full-dx", "full-dx-merged", ()),
    "full from checkpoint": ("full-dx", "full-dx", ()),
}


@dataclasses.dataclass
class Started:
    courses: dict[str, Course]
    lineage: dict[str, Any]
    resumed: dict[str, Any]


def start_config(name: str, students: Path, exports: Path, data: Path, teacher: Path, run_dir: Path, *more: str) -> Config:
    student, source, options = STARTS[name]
    folder = exports / source if (exports / source).exists() else students / source
    return make_config((*student_options(student), f"init_from={folder}", *options, *more), data, teacher, run_dir)


def start_rank(
    rank: int, tp: int, names: tuple[str, ...], students: Path, exports: Path, data: Path, teacher: Path, out: Path
) -> Started:
    """Start students and look at their weights before the first step; the last one goes on, is saved and resumed."""
    from piflow_dist import train

    topology = topology_of(rank, 2, tp)
    parallel = ("launch.processes=2", f"parallel.tp={tp}", f"train.micro_batch_size={tp}")
    started = Started({}, {}, {})
    for name in names:
        config = start_config(name, students, exports, data, teacher, out / name, *parallel)
        run = train.build_run(config, topology)
        started.courses[name] = Course()
        keep_weights(started.courses[name], run)
        started.lineage[name] = run.started_from
        assert run.state.step == 0 and not run.model.optimizer_state()
    train.train_step(run)
    run.state.step += 1
    train.save(run)
    # Its source may be gone when it goes on.
    config.init_from = str(out / "gone")
    again = train.build_run(config, topology)
    train.resume(again)
    started.resumed = again.started_from
    return started


@pytest.fixture(scope="module")
def started(
    students: Path, exports: Path, tiny_data: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[Started]]:
    """By tensor-parallel size, on two processes."""
    names = {2: tuple(STARTS), 1: ("full from merged", "tied from adapter")}
    folders = (students, exports, tiny_data, teacher_run)
    return {
        tp: run_ranks(start_rank, 2, tp, chosen, *folders, tmp_path_factory.mktemp(f"started_{tp}"), time_limit=420)
        for tp, chosen in names.items()
    }


@pytest.mark.parametrize(
    ("tp", "name"), [*((2, name) for name in STARTS), (1, "full from merged"), (1, "tied from adapter")]
)
@pytest.mark.parametrize("kind", ["shards", "ema"])
def test_a_student_starts_with_the_weights_of_another(
    started: dict[int, list[Started]], students: Path, tp: int, name: str, kind: str
) -> None:
    found = joined([rank.courses[name] for rank in started[tp]], tp, kind)
    want = read_weights(newest(students / STARTS[name][0]), ema="raw" not in name)
    assert found.keys() == want.keys()
    for key, value in want.items():
        scale = 2 if "lora.alpha=4" in STARTS[name][2] and "lora_B" in key else 1  # alpha / rank was 2 and is 1
        assert torch.equal(found[key], scale * value), key


def test_lineage_is_written_down_and_outlives_its_source(started: dict[int, list[Started]], students: Path) -> None:
    lineage = started[2][0].lineage
    source = newest(students / "tied")
    assert lineage["tied from raw weights"]["weights"] == "raw" and lineage["tied from checkpoint"]["weights"] == "ema"
    assert lineage["tied from checkpoint"]["source"] == str(source)
    assert lineage["tied from checkpoint"]["step"] == STEPS
    assert started[2][0].resumed == lineage["full from checkpoint"]
    assert started[2][1].lineage == lineage


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tied from adapter", ("policy.num_components=4",), ("policy.num_components is 3 there and 4 here",)),
        ("tied from checkpoint", ("policy.type=dx",), ("policy.type is gmflow there and dx here",)),
        ("tied from adapter", ("lora.rank=8",), ("lora.rank is 4 there and 8 here",)),
        ("tied from adapter", (r"lora.targets=['transformer_blocks\.\d+\.img_mlp\.net\.2']",), ("unknown", "txt_mlp")),
        ("tied from checkpoint", ("mode=full",), ("a checkpoint of mode=tied", "mode=full", "format=merged")),
        ("full from merged", ("mode=tied",), ("a merged transformer", "mode=tied")),
        ("full from checkpoint", ("schedule.shift=3.2",), ("schedule.shift is 2.0 there and 3.2 here",)),
        ("tied from adapter", ("init_from=/nowhere",), ("init_from=/nowhere does not exist",)),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_the_start(
    students: Path, exports: Path, tiny_data: Path, teacher_run: Path, tmp_path: Path,
    name: str, options: tuple[str, ...], words: tuple[str, ...],
) -> None:  # fmt: skip
    config = start_config(name, students, exports, tiny_data, teacher_run, tmp_path / "run", *options)
    with pytest.raises(ConfigError) as error:
        check_run(config)
    assert all(word in str(error.value) for word in words), error.value


def test_adapters_of_another_teacher_are_refused(
    students: Path, exports: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from conftest import write_diffusers_teacher

    teacher = write_diffusers_teacher(tmp_path / "another")
    for name in ("tied from adapter", "tied from checkpoint"):
        config = start_config(name, students, exports, tiny_data, teacher, tmp_path / "run")
        with pytest.raises(ConfigError, match="Give that one"):
            check_run(config)


# Checkpoints rewritten for another world.


def resave_rank(rank: int, students: Path, data: Path, teacher: Path, out: Path) -> None:
    """What a tensor-parallel world writes after resuming: of the original, and of one rewritten for another world."""
    from piflow_dist import train

    topology = topology_of(rank, 2, 2)
    for name, source in {"tied": students / "tied", "full-dx": students / "full-dx", "again": out / "for_4"}.items():
        folder = out / f"resaved_{name}"
        if rank == 0:
            shutil.copytree(source, folder)
        torch.distributed.barrier()
        options = (*student_options("tied" if name == "again" else name), "launch.processes=2", "parallel.tp=2")
        run = train.build_run(make_config((*options, "train.micro_batch_size=4"), data, teacher, folder), topology)
        train.resume(run)
        assert run.state.step == STEPS
        train.save(run)


def test_rewritten_files_are_those_of_the_other_world(
    students: Path, tiny_data: Path, teacher_run: Path, tmp_path: Path
) -> None:
    reshard(newest(students / "tied"), tmp_path / "for_4", dp=2, tp=2)
    run_ranks(resave_rank, 2, students, tiny_data, teacher_run, tmp_path, time_limit=420)
    for name, source in {"tied": students / "tied", "full-dx": students / "full-dx", "again": tmp_path / "for_4"}.items():
        made, want = reshard(newest(source), tmp_path / f"made_{name}", dp=1, tp=2), newest(tmp_path / f"resaved_{name}")
        for rank in range(2):
            assert_same_file(made, want, f"rank_{rank:05d}.safetensors")
        states = [read_json(folder / "state.json") for folder in (made, want)]
        for state in states:
            state["config"]["run_dir"] = state["config"]["train"]["micro_batch_size"] = state["parent"] = None
        assert states[0] == states[1]
    back = reshard(newest(tmp_path / "for_4"), tmp_path / "back", dp=1, tp=1)
    assert_same_file(back, newest(students / "tied"), "rank_00000.safetensors")


def assert_same_file(made: Path, want: Path, file: str) -> None:
    found, wanted = load_file(made / file), load_file(want / file)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, (file, name)


@pytest.mark.parametrize(
    ("dp", "tp", "words"), [(3, 1, "train.batch_size=4"), (1, 4, "attention heads"), (0, 1, "dp=0")]
)
def test_worlds_that_cannot_train_are_refused(students: Path, tmp_path: Path, dp: int, tp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reshard(newest(students / "tied"), tmp_path / "run", dp, tp)
    assert list(tmp_path.iterdir()) == []


def newest(run: Path) -> Path:
    found, _ = newest_complete(run / "checkpoints")
    return found


# tools/checkpoint.py


@pytest.fixture
def tool(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """tool("ls", run): exit code and all that was printed."""
    from conftest import load_tool

    from piflow_dist.cli import run_tool as run_in_this_process

    monkeypatch.setenv("COLUMNS", "200")
    module = load_tool("checkpoint")

    def tool(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            run_in_this_process(module.checkpoint, [str(argument) for argument in arguments], module.__doc__)
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return tool


@pytest.fixture
def three(teacher_run: Path, tmp_path: Path) -> Path:
    """A run folder with three checkpoints: steps 24, 32 and 40."""
    return shutil.copytree(teacher_run, tmp_path / "three")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_ls_and_verify_tell_the_whole_from_the_damaged(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    folder = three / "checkpoints"
    rewrite_state(folder / "step_00000040", lambda state: state.update(metrics={"loss": 0.25}))
    code, said = tool("ls", three)
    assert code == 0 and said.count("whole") == 3 and "0.2500" in said and "dp=2 tp=1" in said
    flip_a_bit(folder / "step_00000040" / "rank_00001.safetensors")
    (folder / "step_00000032" / "rank_00000.safetensors").write_bytes(b"cut")
    (folder / ".step_00000048.tmp").mkdir()
    code, said = tool("ls", three)
    assert code == 0 and said.count("whole") == 2 and "has 3 bytes" in said and ".step_00000048.tmp" in said
    code, said = tool("verify", three)
    assert code == 1 and "rank_00001.safetensors is damaged" in said and "2 of 3 checkpoints are damaged" in said
    assert tool("verify", folder / "step_00000024")[0] == 0


def test_show_and_diff(tool: Callable[..., tuple[int, str]], three: Path, students: Path) -> None:
    code, said = tool("show", students / "tied")
    assert code == 0 and "3 of 5" in said and "lora" in said and "fingerprint" in said and "26 tensors" in said
    older, newer = three / "checkpoints" / "step_00000032", three / "checkpoints" / "step_00000040"
    rewrite_state(newer, lambda state: state["config"]["optim"].update(lr=0.125))
    code, said = tool("diff", older, newer, "all=true")
    a, b = read_weights(older, ema=False), read_weights(newer, ema=False)
    name = "img_in.weight"
    line = next(line for line in said.splitlines() if name in line)
    assert f"{((b[name] - a[name]).norm() / a[name].norm()).item():.3e}" in line
    assert "0.125" in said and "optim.lr" in said and code == 0
    code, said = tool("diff", older, older)
    assert code == 0 and "0 of 71 common parameters differ" in said
    code, said = tool("diff", students / "tied", students / "full-dx")
    assert code == 0 and "only in A: " in said and "head.proj_out_means.weight" in said and "policy.type" in said


def test_rm_keeps_the_only_good_checkpoint(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    folder = three / "checkpoints"
    assert tool("rm", three, "yes=true")[0] == 2  # which?
    code, said = tool("rm", three, "step=40")
    assert code == 2 and "yes=true" in said and (folder / "step_00000040").exists()
    assert tool("rm", three, "step=40", "yes=true")[0] == 0
    assert {path.name for path in folder.iterdir()} == {"step_00000024", "step_00000032", "latest"}
    assert (folder / "latest").read_text().strip() == "step_00000032"
    flip_a_bit(folder / "step_00000024" / "rank_00000.safetensors")
    code, said = tool("rm", folder / "step_00000032", "yes=true")
    assert code == 2 and "only good checkpoint" in said and (folder / "step_00000032").exists()
    assert tool("rm", folder / "step_00000024", "yes=true")[0] == 0  # damaged ones may go
    with pytest.raises(ConfigError, match="only good checkpoint"):
        remove(str(three), None, True)


def test_requests_that_make_no_sense(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    assert tool()[0] == 2 and tool("list", three)[0] == 2
    code, said = tool("diff", three)
    assert code == 2 and "A B" in said
    assert "does not exist" in tool("ls", "/nowhere")[1] and "'spread'" in tool("reshard", three, "x", "spread=2")[1]
