"""The command as a user's shell starts it: speed, exit codes, streams."""

import os
import resource
import signal
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

import t2r
from t2r.cli import main as cli
from tests.tiny import tiny_t2r

COMMANDS = [
    "convert",
    "train",
    "merge",
    "export",
    "eval",
    "eval ppl",
    "eval layers",
    "generate",
    "inspect",
    "push",
    "env",
]
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "T2R_"))}
runner = CliRunner()


@pytest.fixture(autouse=True)
def process_settings(monkeypatch):
    """What the application sets for its process is taken back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def script(tmp_path):
    """What pip makes of the entry point."""
    path = tmp_path / "t2r"
    path.write_text("import sys\nfrom t2r.cli.main import main\nsys.exit(main())\n")
    return path


def start(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=BARE | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["-h"], ["eval", "ppl", "--help"], ["--version"]])
def test_help_answers_within_half_a_second(script, arguments):
    seconds = []
    for _ in range(3):
        begun = children_seconds()
        result = start(script, *arguments)
        seconds.append(children_seconds() - begun)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 0.5


def children_seconds():
    """Processor time of ended children: on an idle machine what a user waits, and no more on a busy one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_heavy(script):
    code = script.read_text().replace("sys.exit(main())", "") + (
        "try:\n    main()\nfinally:\n"
        "    sys.stderr.write(','.join({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    script.write_text(code)
    result = start(script, "-h")
    assert "Turn pretrained softmax Transformers into recurrent models" in " ".join(result.stdout.split())
    assert result.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(command, option):
    result = runner.invoke(cli.app, [*command.split(), option])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_version():
    assert runner.invoke(cli.app, ["--version"]).stdout == f"t2r {t2r.__version__}\n"


@pytest.mark.parametrize("arguments", ["nonsense", "convert", "eval ppl x", "convert x -o y --slots a"])
def test_usage_errors(arguments):
    result = runner.invoke(cli.app, arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_an_error_is_one_line_and_exit_code_2(script, tmp_path):
    result = start(script, "inspect", tmp_path / "none")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'none'}: no such folder\n"


def test_an_error_after_loading_is_one_line_too(script, tmp_path):
    tiny_t2r(tmp_path / "model")
    result = start(script, "generate", tmp_path / "model", "--prompt", " ")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: the prompt is empty\n")


def test_traceback_on_demand(script, tmp_path):
    result = start(script, "inspect", tmp_path / "none", T2R_TRACEBACK="1")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.fixture
def command(monkeypatch):
    """Runs the real application with one command more."""
    monkeypatch.setattr(cli.app, "registered_commands", [*cli.app.registered_commands])

    def run(function):
        cli.app.command("extra")(function)
        return runner.invoke(cli.app, ["extra"])

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("many\n  lines"), "error: many lines\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_errors_become_one_line(command, error, line):
    def fail():
        raise error

    result = command(fail)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", line)


def test_our_own_mistakes_are_not_hidden(command):
    def fail():
        raise AssertionError("ours")

    assert isinstance(command(fail).exception, AssertionError)


def test_a_command_s_own_exit_code_stays(command):
    def leave():
        raise typer.Exit(3)

    assert command(leave).exit_code == 3


def test_interruption_is_130(script):
    script.write_text(
        "import signal, time\nfrom t2r.cli.main import app, main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits it ignored
        "@app.command()\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\nmain()\n"
    )
    environment = BARE | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_warnings_are_one_line_on_stderr(script):
    script.write_text(
        "import warnings\nfrom t2r.cli.main import app, main\n"
        "@app.command()\ndef warn():\n    warnings.warn('no effect: sinks')\nmain()\n"
    )
    result = start(script, "warn")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "warning: no effect: sinks\n")
