"""What stands beside the checkpoints: config, code, environment and data."""

import json
import subprocess
from pathlib import Path

from dexportrait_jax import code_version
from dexportrait_jax import config as configs
from dexportrait_jax.run_directory import write_description

ROOT = Path(__file__).resolve().parents[1]


def test_description(tmp_path, capsys):
    config = configs.load_config("configs/autoencoder.py:tiny", [])
    write_description(tmp_path, config, {"train-0": "a", "train-1": "b"})
    write_description(tmp_path, config, {"train-0": "a", "train-1": "b"})
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == "autoencoder"
    assert json.loads((tmp_path / "data.json").read_text()) == {"train-0": "a", "train-1": "b"}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["code_sha256"] == code_version.code_sha256()
    assert {"jax", "commit", "devices", "platform", "processes"} <= environment.keys()

    write_description(tmp_path, config, {"train-0": "a", "train-1": "other"})
    said = capsys.readouterr().err
    assert "warning: the data are not those" in said and "(1 shards differ, train-1 first)" in said


def test_commit_is_gits():
    asked = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:  # a copy without its history
        assert code_version.commit() == ""
    else:
        assert code_version.commit().removesuffix("+") == done.stdout.strip()


def test_code_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(code_version, "_ROOT", tmp_path)
    file = tmp_path / "configs" / "a.py"
    file.parent.mkdir()
    found = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        file.write_text(text)
        code_version.code_sha256.cache_clear()
        found.append(code_version.code_sha256())
    code_version.code_sha256.cache_clear()
    assert found[0] == found[2] != found[1]
