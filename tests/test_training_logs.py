"""Logs of a run: what a kill leaves, and what a resumption drops."""

import json

from clp_jax.training.logs import LOG_FILE, Logs


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG_FILE).read_text().splitlines()]


def test_resumption_drops_what_was_logged_after_the_save(tmp_path):
    logs = Logs(tmp_path, start=0, wandb_project=None, config={})
    for step in range(5):
        logs.write(step, {"loss": 1.0 / (step + 1)})
    logs.close()
    with (tmp_path / LOG_FILE).open("a") as stream:
        stream.write('{"step": 5, "lo')  # killed here
    logs = Logs(tmp_path, start=3, wandb_project=None, config={})
    assert steps(tmp_path) == [0, 1, 2]
    logs.write(3, {"loss": 0.5})
    logs.close()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_damaged_line_is_left_out_alone(tmp_path):
    whole = [json.dumps({"step": step, "loss": 1.0}) for step in range(3)]
    content = "\n".join([whole[0], "[]", whole[1], '{"step": "x"}', whole[2], '{"step": 2, "lo']).encode()
    (tmp_path / LOG_FILE).write_bytes(content.replace(b"[]", bytes(8) + b"\xff\xfe"))
    Logs(tmp_path, start=2, wandb_project=None, config={}).close()
    assert (tmp_path / LOG_FILE).read_text().splitlines() == whole[:2]


def test_remote_run_has_the_same_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.training.logs.is_remote", lambda _: True)
    logs = Logs(tmp_path, start=0, wandb_project=None, config={})
    for step in range(3):
        logs.write(step, {"loss": 1.0})
    logs.close()
    assert steps(tmp_path) == [0, 1, 2]
    assert not (tmp_path / "tensorboard").exists()
