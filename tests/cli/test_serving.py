# SPDX-License-Identifier: Apache-2.0
"""`ospec serve`, `load` and `chat` as processes: they begin, answer, end and go on."""

import http.server
import io
import json
import signal
import socketserver
import subprocess
import threading

import pytest
from server_process import OSPEC, server, write_model
from test_cli import run_here

from ospec_jax.cli.arguments import Decoding
from ospec_jax.cli.serving import by_load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


class NoHttp(socketserver.StreamRequestHandler):
    """Answers whatever is said with something that is no HTTP."""

    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"220 mail\r\n")


def run(*args, stdin=""):
    return subprocess.run(
        [*OSPEC, *map(str, args)], input=stdin, capture_output=True, text=True
    )


def test_a_server_is_loaded_ends_at_a_signal_and_says_what_it_did(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Count to {i}.", "domain": "counting"} for i in range(6)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    figures = tmp_path / "figures.json"
    with server(folder, "--batch-size", 1, draft="none") as (process, address, lines):
        flags = ["--url", address, "--prompts", prompts, "--clients", "3"]
        done = run("load", *flags, "--json", figures, "--max-new-tokens", "8")
        assert done.returncode == 0, done.stderr
        # No key is asked for on loopback; a wrong file is refused before anything.
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    found = json.loads(figures.read_text())
    assert (found["completed"], found["failed"]) == (6, 0)
    assert 0 < found["total_output_tokens"] <= 48
    assert found["median_ttft_ms"] > 0
    assert f"6 answers, {found['total_output_tokens']} tokens" in lines[-1]


def test_what_cannot_be_served_is_said_in_a_line(folder, tmp_path, capsys):
    """By a process of its own; the other messages are had without one."""
    common = ["serve", "--target", folder, "--draft", "ngram"]
    done = run(*common, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "key" in done.stderr
    assert "Traceback" not in done.stderr
    for flags, message in (
        (["--api-key-file", tmp_path / "keys"], "keys"),
        (["--port", "70000"], "port is 70000"),
        (["--max-waiting", "0"], "max_waiting is 0"),
        (["--promote", "manual"], "give --admin-key-file"),
        (["--promote", "manual", "--learn", "off"], "nothing learns"),
    ):
        assert run_here(*common, *flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "controller"),
    [
        ({}, "load"),
        ({"batch_size": 1}, None),
        ({"draft": "none"}, None),
        ({"draft": "longer:ngram,shipped"}, None),
        ({"num_speculative_tokens": 3}, None),
        ({"controller": "fixed"}, "fixed"),
        ({"tree": "static:2,1"}, None),
    ],
)
def test_a_server_drafts_as_its_load_says_unless_it_is_told(flags, controller):
    decoding = Decoding(**({"batch_size": 8} | flags))
    assert by_load(decoding).controller == controller


def test_a_load_without_a_server_says_so(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hi."}))
    nobody = "http://127.0.0.1:9"
    assert run_here("load", "--url", nobody, "--prompts", prompts) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"no server answers at {nobody}" in told


def test_a_load_of_what_is_no_such_server_says_so(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hi."}))

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<p>Hello.</p>")

    with (
        http.server.HTTPServer(("127.0.0.1", 0), Pages) as pages,
        socketserver.TCPServer(("127.0.0.1", 0), NoHttp) as other,
    ):
        for one in (pages, other):
            threading.Thread(target=one.serve_forever, daemon=True).start()
        places = [f"http://127.0.0.1:{one.server_address[1]}" for one in (pages, other)]
        for url in ("foo", "ftp://x", *places):
            assert run_here("load", "--url", url, "--prompts", prompts) == 2
            told = " ".join(capsys.readouterr().err.split())
            assert f"no server answers at {url}" in told
        for one in (pages, other):
            one.shutdown()


def test_a_chat_remembers_what_was_said(folder, monkeypatch, capsys):
    """The first by a process of its own, with a terminal's input and output."""
    flags = ["--target", folder, "--draft", "none", "--max-new-tokens", "6"]
    done = run("chat", *flags, stdin="Hi.\nAnd?\n\n")
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stderr.splitlines() if "a pass" in line)
    assert first
    assert second
    monkeypatch.setattr("sys.stdin", io.StringIO("And?\n"))
    assert run_here("chat", *flags) == 0
    alone = capsys.readouterr().out
    # Behind the first turn the second one is answered otherwise.
    assert done.stdout.splitlines()[1:] != alone.splitlines()
