# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command as a process: its names, its imports, its exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

HEAVY = {
    "argparse",
    "asyncio",
    "concurrent.futures",
    "dataclasses",
    "hypothesis",
    "importlib.metadata",
    "json",
    "logging",
    "pathlib",
    "random",
    "subprocess",
    "tempfile",
    "typing",
    "threading",
    "uuid",
}


def run(*argv: str, cwd: Path, **more: object) -> subprocess.CompletedProcess[str]:
    """Run our command as a process."""
    command = [sys.executable, "-m", "qcowlib", *argv]
    root = Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": str(root), **dict(more.get("env", {}))}  # type: ignore[call-overload]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def imported(*argv: str, cwd: Path) -> set[str]:
    """Return the modules that a run of the command imports."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-I", "-X", "importtime", "-c", f"import sys; sys.path.insert(0, {str(root)!r})"]
    command[-1] += "; from qcowlib.cli.main import main; sys.exit(main(sys.argv[1:], 'qcow'))"
    done = subprocess.run([*command, *argv], cwd=cwd, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_info_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    modules = imported("info", "disk", cwd=tmp_path)
    assert "qcowlib.cli.cmd_info" in modules
    assert not modules & HEAVY
    assert not any(name.startswith("qcowlib.cli.cmd_") for name in modules - {"qcowlib.cli.cmd_info"})


def test_qcow2_info_imports_nothing_heavy(tmp_path: Path) -> None:
    assert run("create", "-f", "qcow2", "disk", "1M", cwd=tmp_path).returncode == 0
    assert not imported("info", "disk", cwd=tmp_path) & HEAVY


def test_name_comes_from_the_link_that_was_called(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    script = tmp_path / "script"
    lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(root)!r})"]
    lines += ["from qcowlib.cli.main import entry", "sys.exit(entry())"]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    name = "-".join(("qemu", "img"))
    link = tmp_path / name
    link.symlink_to(script)
    done = subprocess.run([str(link), "info", "nofile"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "qemu-img: Could not open 'nofile': Could not open 'nofile': No such file or directory\n"


def test_environment_gives_the_name(tmp_path: Path) -> None:
    done = run("bogus", cwd=tmp_path, env={"QEMU_IMG_NAME": "-".join(("qemu", "img"))})
    expected = "qemu-img: Command not found: bogus\nTry 'qemu-img --help' for more information\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qcowlib", "--help"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode != -signal.SIGPIPE


def test_full_output_is_an_error(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "qcowlib", "--help"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_interrupt_ends_with_130(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    assert run("create", "-f", "qcow2", "disk", "1M", cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "qcowlib", "bench", "-c", "2000000000", "-t", "unsafe", "disk"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    tasks = Path(f"/proc/{process.pid}/task")
    while len(list(tasks.iterdir())) < 2:  # until its threads run
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, b"")
