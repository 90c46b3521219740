"""What the tests share: nodes that serve, clients that check each answer strictly, and the figures that are printed at the end."""
import openai
import pytest

import nodes

figures = []


@pytest.fixture
def figure():
    """Notes a measured figure, for the lines after the tests."""
    return lambda what: figures.append(what)


@pytest.fixture(scope="session")
def tiny():
    with nodes.serving_with("tiny") as serving:
        yield serving


@pytest.fixture(scope="session")
def long():
    with nodes.serving_with("long", args=nodes.ROOMY) as serving:
        yield serving


def strict(serving, kind=openai.OpenAI, **more):
    options = {"api_key": "none", "max_retries": 0, "timeout": 120, "_strict_response_validation": True, **more}
    return kind(base_url=f"{serving.url}/v1", **options)


def lenient(client):
    """The same without validation, for streamed completions: the package wants a finish_reason in every chunk, where OpenAI itself sends null."""
    return client.copy(_extra_kwargs={"_strict_response_validation": False})


@pytest.fixture
def client(tiny):
    with strict(tiny) as client:
        yield client


def check_error(answer, status, kind, codes):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert list(answer.json()) == ["error"] and set(error) == {"message", "type", "param", "code"}, error
    assert error["type"] == kind and error["code"] in codes, error
    assert isinstance(error["message"], str) and error["message"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for serving in nodes.running:
            report.sections.append((f"what the node in {serving.node.directory} said", serving.said()))
    return report


def pytest_terminal_summary(terminalreporter):
    for line in figures:
        terminalreporter.write_line(line)
