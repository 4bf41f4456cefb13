"""Configuration: every shipped experiment loads, and what cannot run is refused with value, reason and option."""

from pathlib import Path

import pytest

from piflow_dist.config import (
    CONFIG_DIR,
    Config,
    ConfigError,
    changed_keys,
    load_config,
    read_config,
    save_config,
)
from piflow_dist.help import explain_keys, list_choices
from piflow_dist.sampling.settings import SampleConfig

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
TEACHER = ("objective=flow_matching", "run_dir=run", "data.root=data")
STUDENT = ("objective=imitation", "run_dir=run", "data.root=data", "distill.teacher=teacher")


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(list(overrides))
    return str(error.value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads(name: str) -> None:
    config = load_config([f"experiment={name}"])
    assert isinstance(config, Config)
    assert config.run_dir and config.data.root


@pytest.mark.parametrize("name", ["qwen_gmm", "qwen_gmm_datafree", "qwen_dx", "qwen_dx_poly"])
def test_the_published_recipe(name: str) -> None:
    """Figures of pi-Flow (arXiv 2510.14974) for Qwen-Image."""
    config = load_config([f"experiment={name}"])
    lora, optim, distill = config.lora, config.optim, config.distill
    assert (config.mode, lora.rank, lora.alpha, lora.dropout) == ("tied", 256, 256, 0.05)
    assert (optim.type, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 1e-4, [0.9, 0.95], 0)
    assert (optim.warmup_steps, optim.clip, optim.clip_from_step) == (100, 50, 100)
    assert (config.ema.gamma, config.ema.start_step, config.train.steps, config.train.batch_size) == (7, 100, 9000, 256)
    assert (distill.nfe, distill.final_step_size_scale, distill.total_substeps, distill.window_substeps) == (
        4,
        0.5,
        128,
        3,
    )
    assert (distill.num_intermediate_states, distill.loss_scale, distill.guidance.scale) == (2, 30, 4)
    assert (config.schedule.shift, config.policy.num_components, config.policy.num_nodes) == (3.2, 8, 10)


@pytest.mark.parametrize("group", ["model", "policy", "optim"])
def test_every_group_file_loads(group: str) -> None:
    for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
        baseline = ["objective=meanflow"] if path.stem == "mean" else []
        assert isinstance(load_config([*STUDENT, f"{group}={path.stem}", *baseline]), Config)


def test_there_are_experiments() -> None:
    assert {"demo_teacher", "demo_gmm", "demo_dx", "demo_datafree", "qwen_gmm"} <= set(EXPERIMENTS)


def test_the_published_model_is_the_default() -> None:
    model = load_config(list(TEACHER)).model
    assert (model.num_layers, model.width, model.joint_attention_dim) == (60, 3072, 3584)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distill.nfes=4", ("nfes", "num_intermediate_states")),  # the keys that exist there are listed
        ("optimm.lr=1", ("optimm", "optim")),
        ("experiment=demo_gm", ("demo_gm", "demo_gmm", "demo_dx")),
        ("model=qwen", ("qwen", "qwen_image_tiny")),
        ("train.steps=many", ("train.steps", "many")),
        ("train.steps=1.5", ("train.steps", "1.5")),
        ("distill.guidance.interval=3", ("distill.guidance.interval",)),
    ],
)
def test_unknown_keys_groups_and_types(override: str, said: tuple[str, ...]) -> None:
    message = refused(*STUDENT, override)
    assert all(word in message for word in said), message
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("experiment", "others"), [("demo_meanflow", (1, 2, 8)), ("demo_gmm", (8,)), ("demo_shortcut", ())]
)
def test_evaluation_during_training_takes_the_numbers_of_evaluations_that_sampling_takes(
    experiment: str, others: tuple[int, ...]
) -> None:
    for nfe in (1, 2, 4, 8):
        override = f"evaluation.nfe={nfe}"
        if nfe in (4, *others):
            assert load_config([f"experiment={experiment}", override]).evaluation.nfe == nfe
        else:
            assert f"{override}: a student of distill.nfe=4" in refused(f"experiment={experiment}", override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective=distil", "imitation_datafree"),
        ("policy.type=gm", "gmflow"),
        ("policy.mode=cubic", "polynomial"),
        ("policy.num_nodes=1", "2 or more"),
        ("policy.num_components=0", "greater than zero"),
        ("optim.type=adam", "adamw"),
        ("optim.decay=step", "cosine"),
        ("optim.lr=0", "greater than zero"),
        ("optim.lr=nan", "greater than zero"),
        ("optim.warmup_steps=-1", "negative"),
        ("optim.betas=[0.9]", "two numbers"),
        ("train.dtype=fp16", "bf16"),
        ("train.steps=0", "greater than zero"),
        ("train.seed=-1", "negative"),
        ("train.micro_batch_size=0", "greater than zero"),
        ("train.micro_batch_size=-2", "greater than zero"),
        ("train.micro_batch_size=7", "does not divide"),
        ("train.batch_size=63 launch.processes=2", "multiple of 2"),
        ("launch.processes=0", "greater than zero"),
        ("launch.device=gpu", "cuda"),
        ("launch.threads=0", "greater than zero"),
        ("launch.port=70000", "0 for a free one"),
        ("checkpoint.keep=0", "greater than zero"),
        ("checkpoint.best_mode=best", "Choose one of: min, max"),
        ("checkpoint.resume=-3", "Use true, false, a step or a checkpoint folder"),
        ("launch.start=fork launch.device=cuda", "launch.device=cpu"),
        ("checkpoint.every=-1", "must not be negative"),
        ("tracking.log_every=0", "greater than zero"),
        ("ema.gamma=0", "greater than zero"),
        ("schedule.shift=0", "greater than zero"),
        ("data.caption_dropout=1", "[0, 1)"),
        ("distill.nfe=0", "greater than zero"),
        ("distill.final_step_size_scale=1.5", "(0, 1]"),
        ("distill.component_dropout=1", "[0, 1)"),
        ("distill.num_decay_iters=-1", "negative"),
        ("distill.guidance.scale=0.5", "Use 1 for none"),
        ("distill.guidance.interval=[0.8,0.2]", "inside [0, 1]"),
        ("distill.guidance.interval=[0.1,0.2,0.3]", "two numbers"),
        ("distill.guidance.orthogonal=2", "[0, 1]"),
        ("evaluation.guidance_interval=[0.8,0.2]", "inside [0, 1]"),
        ("evaluation.nfe=0", "greater than zero"),
        ("model.num_layers=0", "greater than zero"),
        ("model.axes_dims_rope=[16,56,54]", "attention_head_dim=128"),
        ("model.axes_dims_rope=[17,55,56]", "even"),
    ],
)
def test_values_that_cannot_work(override: str, said: str) -> None:
    message = refused(*(*STUDENT, *override.split(" ")))
    key, _, value = override.split(" ")[0].partition("=")
    assert said in message and key in message, message
    if not value.startswith("["):
        assert value in message, message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("distill.teacher=null",), "Set distill.teacher"),
        (("data.caption_dropout=0.1",), "data.caption_dropout=0"),
        (("objective=meanflow",), "policy.type=gmflow is another kind of output. Set policy=mean."),
        (("policy=mean",), "objective=meanflow or shortcut_regression"),
        (
            ("objective=meanflow", "policy=mean", "distill.meanflow.velocity=data"),
            "distill.guidance.scale=1, or distill.meanflow.velocity=teacher",
        ),
        (("distill.meanflow.instant_share=1",), "no mean velocity would be learnt"),
        (("distill.meanflow.weight_power=2",), "must lie in [0, 1]"),
        (("distill.meanflow.velocity=student",), "teacher, data"),
        (("distill.teacher_substeps=0",), "greater than zero"),
        (("distill.nfe=30", "distill.window_substeps=3"), "smaller window"),
        (("optim.type=muon", "optim.clip=1"), "optim.clip=0"),
        (("parallel.tp=16", "launch.processes=16"), "parallel.tp=16 does not divide the model's 24 attention heads"),
        (
            ("parallel.tp=4", "launch.processes=6"),
            "launch.processes=6 are not whole tensor-parallel groups of parallel.tp=4",
        ),
        (("parallel.tp=2", "launch.processes=2", "optim=muon"), "which parallel.tp=2 splits"),
        (("optim=muon", "parallel.offload_optimizer=true"), "optim.type=adamw"),
        (("objective=flow_matching", "mode=tied"), "Set mode=full"),
        (("lora.targets=[]",), "lora.targets is empty"),
        (("lora.rank=0",), "lora.rank=0"),
    ],
)
def test_combinations_that_cannot_work(overrides: tuple[str, ...], said: str) -> None:
    assert said in refused(*STUDENT, *overrides)


def test_missing_values_are_named() -> None:
    message = refused("objective=flow_matching")
    assert "data.root" in message and "run_dir" in message and "experiment=NAME" in message


def test_what_is_possible_stays_possible() -> None:
    assert load_config([*TEACHER, "data.caption_dropout=0.1"]).distill.teacher is None
    assert load_config([*STUDENT, "distill.nfe=1"]).distill.nfe == 1
    assert load_config([*STUDENT, "train.micro_batch_size=16"]).train.accumulation(2) == (2, 16)
    assert load_config([*STUDENT]).train.accumulation(2) == (1, 32)
    for tp in (1, 2, 4, 8):
        assert load_config([*STUDENT, f"parallel.tp={tp}", "launch.processes=8"]).parallel.tp == tp


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_saved_configuration_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config([f"experiment={name}", "optim.lr=3e-5", "train.micro_batch_size=4"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_saved_sampling_request_is_read_back_equal(tmp_path: Path) -> None:
    config = load_config(["source=a", "out=b", "nfe=4", "temperature=0.3"], SampleConfig, "sample")
    save_config(config, tmp_path / "settings.yaml")
    assert read_config(tmp_path / "settings.yaml", SampleConfig) == config


def test_changed_keys() -> None:
    old = load_config(list(STUDENT))
    new = load_config([*STUDENT, "distill.guidance.scale=3.0", "train.steps=7", "distill.teacher=other"])
    assert changed_keys(old, old) == {}
    assert changed_keys(old, new) == {
        "distill.guidance.scale": (4.0, 3.0),
        "distill.teacher": ("teacher", "other"),
        "train.steps": (1000, 7),
    }


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("optim.betas=[2,3]", r"optim.betas=\[2.0, 3.0\] must be two numbers in \[0, 1\)"),
        ("optim.momentum=5", "optim.momentum=5.0"),
        ("distill.loss_scale=inf", "distill.loss_scale=inf must be a number greater than zero"),
        ("policy.mode=polynomial", "policy.mode=polynomial is of DX policies.*Set policy.type=dx"),
    ],
)
def test_values_that_would_train_nothing(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(["experiment=demo_gmm", option])


def test_help_lists_every_key_with_its_meaning() -> None:
    said = explain_keys(Config)
    assert "  distill.guidance.scale=4.0\n" in said and "  run_dir=(needed)\n" in said
    assert "  checkpoint.every=500\n      Steps between checkpoints" in said
    assert "  experiment=demo_datafree|" in list_choices(Config)


def test_the_published_values_of_flux_and_imagenet() -> None:
    """LakonLab's configurations of FLUX.1-dev and of ImageNet students of REPA."""
    for name in ("flux_gmm", "flux_dx", "flux_gmm_datafree"):
        config = load_config([f"experiment={name}"])
        distill = config.distill
        assert (config.model.num_layers, config.model.num_single_layers, config.model.guidance_embeds) == (19, 38, True)
        assert (distill.num_intermediate_states, distill.num_decay_iters, distill.guidance.scale) == (4, 2000, 3.5)
        assert (config.mode, config.lora.rank, config.lora.dropout, config.train.steps) == ("tied", 256, 0.05, 3000)
        assert config.policy.type == ("dx" if name == "flux_dx" else "gmflow")
    for nfe, scale, steps in ((1, 3.2, 140_000), (2, 2.8, 24_000)):
        config = load_config([f"experiment=imagenet_gmm_{nfe}nfe"])
        distill, optim = config.distill, config.optim
        assert (distill.nfe, distill.guidance.scale, list(distill.guidance.interval)) == (nfe, scale, [0, 0.7])
        assert (distill.window_substeps, distill.component_dropout, distill.loss_scale) == (0, 0.05, 3)
        assert (config.mode, config.policy.num_components, config.schedule.shift) == ("full", 32, 1)
        assert (optim.lr, config.train.batch_size, config.train.steps) == (5e-5, 4096, steps)
        assert config.train.accumulation(8) == (1, 512)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=flux_tiny", "model.num_single_layers=0"), "model.num_single_layers=0"),
        (("model=flux_tiny", "model.pooled_projection_dim=65"), "model.joint_attention_dim=64"),
        (("model=flux_tiny", "model.axes_dims_rope=[4,6,8]"), "sums to 18"),
        (("model=dit_tiny", "model.axes_dims_rope=[4,6,6]"), "model.axes_dims_rope=[]"),
        (("model=dit_tiny", "model.guidance_embeds=true"), "model.guidance_embeds=true"),
        (("model=dit_tiny", "model.time_scale=0"), "model.time_scale=0"),
        (("model.architecture=unet",), "Choose one of: qwen_image, flux, dit"),
    ],
)
def test_shapes_that_an_architecture_cannot_have(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([*STUDENT, *overrides])
    assert message in str(error.value)
