"""Who can reach the metrics."""

from __future__ import annotations

import socket
import urllib.request

import pytest
import typer.main

from audit import metrics
from audit.cli import app
from audit.config import CrawlSettings, RunSettings
from audit.errors import ConfigError


def own_address() -> str:
    """An address of this machine that is not loopback's; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has loopback alone")
        found = str(probe.getsockname()[0])
    if found.startswith("127."):
        pytest.skip("this machine has loopback alone")
    return found


def read(address: str, port: int) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    content: bytes = opener.open(f"http://{address}:{port}/metrics", timeout=5).read()
    return content


def test_only_this_machine_reaches_the_metrics() -> None:
    port = metrics.serve(0)
    assert b"lora_audit_audits_total" in read("127.0.0.1", port)
    with pytest.raises(OSError, match="refused"):
        read(own_address(), port)


def test_another_address_is_asked_for() -> None:
    address = own_address()
    assert b"lora_audit_audits_total" in read(address, metrics.serve(0, "0.0.0.0"))
    with pytest.raises(ConfigError, match=r"port 0 of 192\.0\.2\.1: .*choose another"):
        metrics.serve(0, "192.0.2.1")


def test_every_command_with_a_port_has_an_address_of_this_machine_by_default() -> None:
    assert RunSettings().metrics_address == CrawlSettings().metrics_address == "127.0.0.1"
    command = typer.main.get_command(app)
    found = 0
    for one in (*command.commands.values(), *command.commands["crawl"].commands.values()):
        options = {flag: option for option in one.params for flag in option.opts}
        if "--metrics-port" in options:
            found += 1
            assert options["--metrics-address"].default is None  # the setting's
    assert found == 4
