"""Nothing of the environment gets into a run's folder, and no secret into its messages."""

import base64

import pytest

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QmFzZTY0SXNOb3RFbmNyeXB0aW9u",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYplanted1",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.planted-claims.c2lnbmF0dXJl",
    "SOMEBODYS_PASSWORD": "correct-horse-battery-staple-7141",
}
IN_ADDRESSES = {"of a git remote": "ghp_planted0Token1In2An3Address4", "of a server": "planted-pass-5162"}


def as_written(secret: str) -> list[bytes]:
    """A secret as it is, and what base64 makes of it wherever in a text it begins."""
    encoded = [secret.encode(), secret.encode()[::-1]]
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret.encode() + bytes(3))
        encoded.append(text[4 * (before > 0) : (before + len(secret)) // 3 * 4])
    return encoded


@pytest.mark.parametrize("mode", [pytest.param("offline", marks=pytest.mark.slow), "online"])
def test_no_file_of_a_run_holds_a_secret_of_the_environment(launch, tmp_path, mode):
    run = tmp_path / "run"
    command = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--steps", "4", "--batch-size", "8")
    environment = {
        **SECRETS,
        "WANDB_BASE_URL": f"http://user:{IN_ADDRESSES['of a server']}@127.0.0.1:9",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": f"https://{IN_ADDRESSES['of a git remote']}:x-oauth-basic@github.com/a/b",
    }
    done = launch(*command, "--wandb", mode, "--run-dir", run, environment=environment)
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    written["stdout"], written["stderr"] = done.stdout.encode(), done.stderr.encode()
    kinds = {str(path).rpartition(".")[2] for path in written}
    assert {"wandb", "json", "jsonl", "safetensors", "log"} <= kinds  # what might hold one is there
    found = [
        f"{name} in {path}"
        for name, secret in {**SECRETS, **IN_ADDRESSES}.items()
        for path, content in written.items()
        if any(text in content for text in as_written(secret))
    ]
    assert found == []
