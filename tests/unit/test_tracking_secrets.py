"""Nothing secret is logged: neither by what it looks like, nor by what its key is called, nor because a variable holds it."""

import logging
from pathlib import Path

import pytest

from piflow_dist.config import Config, DataConfig, TrackingConfig, save_config
from piflow_dist.launch.console import MaskingFormatter
from piflow_dist.tracking import describe
from piflow_dist.tracking.secrets import mask, masked
from piflow_dist.tracking.store import Store
from piflow_dist.tracking.tracker import Tracker, ui_command

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"https://ada:{SECRET}@host/path",
        f"origin  https://{SECRET}@host/repo.git (fetch)",
        f"s3://bucket/set?X-Amz-Signature={SECRET}&part=1",
        f"https://host/set?sig={SECRET}",
        f"password: {SECRET}",
        f"+api_key={SECRET}",
        f'{{"auth_token": "{SECRET}"}}',
        f"MLFLOW_TRACKING_PASSWORD='{SECRET} {SECRET}'",
        f"Authorization: Bearer {SECRET}",
        f"postgresql://ada:pa/{SECRET}@host/db",
        f"https://ada:p@{SECRET}@host",
        f"bearer_token: Bearer {SECRET}",
        f"db_pwd={SECRET}",
        f"AccountKey={SECRET}",
        f"STORE_KEY={SECRET}",
        f"passphrase: {SECRET}",
        f"mlflow --password {SECRET} --port 5000",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"hf_{SECRET}abcd",
        f"ghp_{SECRET}abcd",
    ],
)
def test_secrets_are_found_by_their_looks(text: str) -> None:
    assert SECRET not in mask(text, {}) and "***" in mask(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "kind: token_table",
        "prompts of up to 512 tokens: 34 are dropped",
        "tokens_per_second: 20.5",
        "sqlite:////runs/mlflow.db and http://127.0.0.1:5000",
        "uri: null",
        "api_key: null",
        "3 x 8 GPUs, key=value",
        "git@host.org:group/repo.git",
        "--use-token --port 5000",
        "cache_key = key(value)",
        "http://127.0.0.1:5000 by ada@host.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text, {}) == text


def test_values_of_variables_are_masked_wherever_they_stand() -> None:
    environment = {"SITE_TOKEN": SECRET, "HOME_DIR": "/home/ada", "SHORT_TOKEN": "abc"}
    assert mask(f"curl {SECRET} /home/ada abc", environment) == "curl *** /home/ada abc"


def test_settings_are_masked_by_the_names_of_their_keys() -> None:
    values = {
        "a": {"api_key": SECRET, "uri": f"http://u:{SECRET}@h"},
        "list": [f"x?token={SECRET}"],
        "secret": None,
        "n": 3,
    }
    assert masked(values) == {
        "a": {"api_key": "***", "uri": "http://***@h"},
        "list": ["x?token=***"],
        "secret": None,
        "n": 3,
    }


def test_no_secret_reaches_the_store_the_log_or_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the address of the data, of the store, in a variable, in the code's difference and remote, in a report."""
    run_dir = tmp_path / "runs" / f"password={SECRET}"
    run_dir.mkdir(parents=True)
    config = Config(
        run_dir=str(run_dir),
        objective="flow_matching",
        data=DataConfig(root=f"s3://ada:{SECRET}@bucket/set?token={SECRET}"),
        tracking=TrackingConfig(experiment=f"secret={SECRET}", sweep=f"token={SECRET}", log_every=1),
    )
    save_config(config, run_dir / "config.yaml")
    assert SECRET in (run_dir / "config.yaml").read_text()  # training needs it
    monkeypatch.setenv("SITE_PASSWORD", SECRET)
    monkeypatch.setattr(describe, "git", lambda *words: f"+login({SECRET!r})\nhttps://x:{SECRET}@host {words}\n")
    tracker = Tracker(config, 1, 1)
    tracker.log(1, {"loss": 1.0})
    (tmp_path / "report.html").write_text(f"<p>{SECRET}</p>")
    tracker.log_artifact(tmp_path / "report.html")
    for name in ("notes.toml", "long.txt"):
        (tmp_path / name).write_text(f"{SECRET}\n" + "long\n" * (2 << 20 if name == "long.txt" else 1))
        tracker.log_artifact(tmp_path / name)
    (tmp_path / "grid.png").write_bytes(bytes(range(256)))
    tracker.log_artifact(tmp_path / "grid.png")
    tracker.log_evaluation(f"with {SECRET}", {"fid": 1.0}, [tmp_path / "report.html"])
    assert tracker.flush(120)
    tracker.close("FINISHED")
    store = [path for path in run_dir.parent.rglob("*") if path.is_file() and run_dir not in path.parents]
    assert {"mlflow.db", "config.yaml", "report.html", "code.patch", "notes.toml", "long.txt"} <= {
        path.name for path in store
    }
    assert [path for path in store if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in (run_dir / "tracking" / "code.patch").read_text()

    config.tracking.uri = f"http://ada:{SECRET}@127.0.0.1:9"
    assert SECRET not in ui_command(config.tracking.uri)
    broken = Tracker(config, 2, 1)
    assert not broken.flush(120)
    assert "cannot be reached" in caplog.text and SECRET not in caplog.text.replace(str(run_dir), "")
    line = MaskingFormatter("%(message)s").format(logging.makeLogRecord({"msg": config.tracking.uri}))
    assert SECRET not in line
    with pytest.raises(Exception) as error:  # noqa: PT011  (whatever MLflow raises)
        Store(run_dir, config).sync()
    assert SECRET not in mask(str(error.value))
