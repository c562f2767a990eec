import pytest

from tests.commands.command import TINY, run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run: dense, 3:4, 2:4."""
    folder = tmp_path_factory.mktemp("run") / "chain"
    code = run(
        *("train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--batch-size", 8),
        *("--steps", 6, "--save-every", 2, "--log-every", 1, "--run", folder),
    )
    assert code == 0
    return folder
