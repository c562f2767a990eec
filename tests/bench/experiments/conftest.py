import pytest

from bench.experiments import report
from tests.bench.experiments.tiny_plan import command, use


@pytest.fixture
def tiny(monkeypatch):
    use(monkeypatch)


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """The folder of all four runs with two seeds."""
    folder = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        assert command(folder) == 0
    return folder


@pytest.fixture
def text_alone(monkeypatch):
    """Reports without pictures, which take most of their time."""
    monkeypatch.setattr(report, "_save", lambda *arguments: False)
