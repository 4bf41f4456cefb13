"""FLUX and DiT through the trainer: any world trains like one process, resumes another's checkpoint, exports and samples.

A random FLUX, guidance-distilled as FLUX.1-dev is (flow matching cannot teach one), is distilled with adapters and in full. A tiny
DiT learns class labels by flow matching, and its student is distilled from it, as on ImageNet.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, run_tool
from images import sample_here
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_tensor_parallel import assert_same_training, joined
from test_zero import ADAMW, CLIPPED, COMMON, SAVED_AT, SGD, Course, train_steps
from torch import Tensor
from torch.testing import assert_close

from data_pipeline import class_labels
from data_pipeline.synthetic import write_random_set
from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.config import Config, load_config
from piflow_dist.models.adapters import open_student, student_config
from piflow_dist.models.pretrained import load_model
from piflow_dist.sampling.settings import SampleConfig, build_request

PROMPTS = ("a red square", "a blue disc", "one green ring")  # of one length: FLUX's prompts have no mask
CLASSES = tuple(f"class {i}" for i in range(10))
WORLDS = {"one": (1, 1), "dp2 x tp2": (4, 2)}
"""(processes, of these in a tensor-parallel group). The first one saves what the other resumes."""
FLUX = ("model=flux_tiny", "distill.guidance.scale=3.5")
# The published layers, and attention, modulation and embeddings, which may have adapters too.
FLUX_TARGETS = (
    r"lora.targets=['transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)','single_transformer_blocks\.\d+\.proj_(mlp|out)',"
    r"'time_text_embed\.timestep_embedder\.linear_[12]','(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_k_proj)',"
    r"'(single_)?transformer_blocks\.\d+\.norm1?\.linear','(x|context)_embedder']"
)
TIED = ("mode=tied", "lora.rank=4", "lora.alpha=8", "lora.dropout=0.1", FLUX_TARGETS, "parallel.recompute_every=1")
DIT = ("model=dit_tiny", "schedule.shift=1.0")
ONE_STEP = (
    "distill.nfe=1",
    "distill.window_substeps=0",
    "distill.guidance.scale=3.2",
    "distill.guidance.interval=[0,0.7]",
)
SCENARIOS = {
    "flux-tied": (*FLUX, *TIED, *ADAMW, *CLIPPED, "policy.type=dx", "policy.num_nodes=3", "distill.num_decay_iters=4"),
    "flux-full": (*FLUX, *SGD, "optim.lr=0.02", *CLIPPED, "objective=imitation_datafree", "parallel.recompute_every=2"),
    "dit-teacher": (*DIT, *SGD, "optim.lr=0.2", *CLIPPED, "objective=flow_matching", "data.caption_dropout=0.3"),
    "dit-student": (*DIT, *ONE_STEP, *ADAMW, *CLIPPED, "parallel.recompute_every=1"),
}


def make_config(name: str, folder: Path, run_dir: Path, *more: str) -> Config:
    teacher = folder / "one" / "dit-teacher" if name == "dit-student" else folder / "flux"
    common = [option for option in COMMON if not option.startswith("model=")]
    place = (f"data.root={folder / name.partition('-')[0]}_data", f"distill.teacher={teacher}", f"run_dir={run_dir}")
    return load_config([*common, *SCENARIOS[name], *place, *more])


def write_flux(folder: Path) -> None:
    """A random transformer of flux_tiny's shape as diffusers writes it, with norms that are not one."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FluxTransformer2DModel(
            num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(folder / "transformer", max_shard_size="200KB")


def train_rank(rank: int, world: str, folder: Path) -> dict[str, Course]:
    from datetime import timedelta

    from piflow_dist.parallel.topology import Topology

    size, tp = WORLDS[world]
    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    topology = Topology(rank, size, rank, torch.device("cpu"), tp)
    options = (f"launch.processes={size}", f"parallel.tp={tp}")
    trained = {}
    for name in SCENARIOS:
        config = make_config(name, folder, folder / world / name, *options)
        trained[name] = train_steps(config, topology, save=world == "one")
        if world != "one":
            again = make_config(name, folder, folder / "one" / name, *options)
            trained[f"{name} resumed"] = train_steps(again, topology, from_checkpoint=True)
    return trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    write_flux(folder / "flux")
    write_random_set(folder / "flux_data", prompts=PROMPTS)
    encoder = class_labels.ClassLabelEncoder(CLASSES)
    write_random_set(folder / "dit_data", prompts=CLASSES, channels=4, encoder=encoder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[dict[str, Course]]]:
    return {world: run_ranks(train_rank, size, world, folder, time_limit=900) for world, (size, _) in WORLDS.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_any_world_trains_like_one_process(outcomes: dict[str, list], name: str) -> None:
    assert_same_training([rank[name] for rank in outcomes["dp2 x tp2"]], 2, outcomes["one"][0][name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_resumes_what_one_process_saved(outcomes: dict[str, list], name: str) -> None:
    found, want = [rank[f"{name} resumed"] for rank in outcomes["dp2 x tp2"]], outcomes["one"][0][name]
    assert len(found[0].losses) == len(want.losses) - SAVED_AT
    for course in found:
        assert_close(course.losses, want.losses[SAVED_AT:], rtol=1e-5, atol=0)
    weights, wanted = joined(found, 2), joined([want], 1)
    assert all((weights[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)


def test_every_adapter_learns(outcomes: dict[str, list]) -> None:
    trained = joined([outcomes["one"][0]["flux-tied"]], 1)
    adapters = {name: value for name, value in trained.items() if "lora_B" in name}
    # Two double blocks of 4 + 5 + 1 layers, three single ones of 2 + 3 + 1, two of the time embedder, two embeddings.
    assert len(adapters) == 2 * 10 + 3 * 6 + 2 + 2
    assert all(value.abs().max() > 1e-4 for value in adapters.values())


def latents(source: Path, **options: Any) -> Tensor:
    request = build_request(SampleConfig(source=str(source), out="nowhere", seed=3, **options))
    return sample_here(request)[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("flux-tied", "adapter"), ("flux-tied", "merged"), ("flux-full", "merged"), ("dit-teacher", "merged"), ("dit-student", "merged")],
)  # fmt: skip
def test_exports_sample_their_checkpoints_images(
    outcomes: dict[str, list], folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    out, source = tmp_path / "out", folder / "one" / name
    export(ExportConfig(source=str(source), out=str(out), format=kind, dtype="fp32"))
    own: dict[str, Any] = {"steps": 3, "guidance": 2.0} if name == "dit-teacher" else {}
    base = {"base": str(folder / "flux")} if kind == "adapter" else {}
    got = latents(out, dataset=str(folder / f"{name.partition('-')[0]}_data"), **own, **base)
    # To rounding where adapters were merged (W + B A is one matrix now), else to the bit.
    assert_close(got, latents(source, **own), rtol=0, atol=1e-5 if (name, kind) == ("flux-tied", "merged") else 0)


def test_a_guidance_distilled_teacher_is_sampled_at_a_scale(folder: Path) -> None:
    options = {"dataset": str(folder / "flux_data"), "steps": 2}
    mild, strong = (latents(folder / "flux", guidance=scale, **options) for scale in (3.5, 7.0))
    assert (mild - strong).abs().max() > 1e-3


def test_an_adapter_of_flux_is_the_published_layout(outcomes: dict[str, list], folder: Path, tmp_path: Path) -> None:
    """diffusers' own class with N times the outputs, the base's weights and peft's adapters: the student's velocities."""
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers import FluxTransformer2DModel

    from piflow_dist.models.heads import pack, unpack

    export(ExportConfig(source=str(folder / "one" / "flux-tied"), out=str(tmp_path / "out")))
    file = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["policy_config"]) == {"type": "DX", "segment_size": 1 / 3.5, "shift": 1.0}
    config, tensors = json.loads((tmp_path / "out" / "config.json").read_text()), load_file(file)
    assert config.pop("_class_name") == "DXFluxTransformer2DModel"
    theirs = FluxTransformer2DModel(**config).eval()
    base = FluxTransformer2DModel.from_pretrained(folder / "flux" / "transformer").state_dict()
    own = {name: value for name, value in tensors.items() if "lora" not in name}
    assert set(own) == {f"{layer}.{kind}" for layer in ("proj_out", "norm_out.linear") for kind in ("weight", "bias")}
    theirs.load_state_dict(base | own)
    theirs.load_lora_adapter({name: value for name, value in tensors.items() if "lora" in name}, prefix=None)
    ours = load_model(
        tmp_path / "out", student_config(open_student(tmp_path / "out"), str(folder / "flux"), "x")
    ).eval()
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BLD = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 5, 64, generator=generator)
    sigma_B, guidance_B = torch.tensor([0.2, 0.9]), torch.tensor([3.5, 3.5])
    with torch.no_grad():
        got = ours(x_BCHW, sigma_B, text_BLD, None, guidance_B)["out"]
        want = theirs(
            hidden_states=pack(x_BCHW), encoder_hidden_states=text_BLD[:, 1:], pooled_projections=text_BLD[:, 0, :24],
            timestep=sigma_B, guidance=guidance_B, txt_ids=torch.zeros(4, 3), return_dict=False,
            img_ids=torch.tensor([(0, i, j) for i in range(2) for j in range(3)]).float(),
        )[0]  # fmt: skip
    assert_close(got, unpack(want, (4, 6), 3), rtol=1e-4, atol=1e-5)


def test_a_merged_dit_student_has_the_published_names(outcomes: dict[str, list], folder: Path, tmp_path: Path) -> None:
    export(ExportConfig(source=str(folder / "one" / "dit-student"), out=str(tmp_path / "out"), format="merged"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = ("GMDiTTransformer2DModelV2", 3, 4, 4, 10)
    keys = ("_class_name", "num_gaussians", "in_channels", "out_channels", "num_embeds_ada_norm")
    assert tuple(config[key] for key in keys) == wanted and "logweights_channels" not in config
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert tensors["pos_embed.proj.weight"].shape == (32, 4, 2, 2)
    linears = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
    layers = {f"transformer_blocks.{i}.{linear}" for i in range(2) for linear in linears} | {
        *("pos_embed.proj", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"),
        *("proj_out_1", "proj_out_means", "proj_out_logweights", "proj_out_logstds.1", "proj_out_logstds.3"),
    }
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(tensors) == names | {"emb.class_embedder.embedding_table.weight"}


def test_the_tools_train_and_sample(folder: Path, tmp_path: Path) -> None:
    """A FLUX student of two steps by tools/launch.py, and its images by tools/sample.py."""
    common = [option for option in TINY if not option.startswith("model=")]
    run, out = tmp_path / "run", tmp_path / "samples"
    done = run_tool(
        "launch", *common, *FLUX, "mode=tied", "lora.rank=2", FLUX_TARGETS, "policy.num_components=3", "train.steps=2",
        "train.batch_size=4", f"data.root={folder / 'flux_data'}", f"distill.teacher={folder / 'flux'}", f"run_dir={run}",
        "tracking.enabled=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert newest_complete(run / "checkpoints")[0].name == "step_00000002"
    done = run_tool("sample", f"source={run}", f"out={out}", "launch.device=cpu", "launch.threads=1")
    assert done.returncode == 0, done.stdout
    assert len(list((out / "images").glob("*.png"))) == len(PROMPTS)
