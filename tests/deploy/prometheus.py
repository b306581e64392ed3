"""A real Prometheus for tests: it scrapes often, waits for no `for:`, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

START_S = QUERY_S = 30.0
Sample = tuple[Mapping[str, str], float]


class Prometheus:
    """Owns the process and its folder's content."""

    def __init__(self, folder: Path, rules: Sequence[Path]) -> None:
        self._folder, self._targets = folder, folder / "targets.json"
        self._url = f"127.0.0.1:{free_port()}"
        for file in rules:
            (folder / file.name).write_text(re.sub(r"\bfor: \w+$", "for: 0s", file.read_text(), flags=re.MULTILINE))
        scrape = {
            "job_name": "headwater",
            "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": "1s"}],
        }
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [file.name for file in rules],
            "scrape_configs": [scrape],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        arguments = [
            "prometheus",
            f"--config.file={self._folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._url}",
            "--log.level=warn",
        ]
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def watch(self, addresses: Sequence[str]) -> None:
        """Scrape these from now on, and no others."""
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps([{"targets": list(addresses)}]))
        new.rename(self._targets)

    def query(self, expression: str) -> list[Sample]:
        """The samples of now that are numbers."""
        result = self._get("query", query=expression)["result"]
        if isinstance(result[0] if result else {}, dict):
            samples = [(one["metric"], float(one["value"][1])) for one in result]
        else:
            samples = [({}, float(result[1]))]  # a scalar
        return [sample for sample in samples if math.isfinite(sample[1])]

    def fired(self, since: float) -> set[str]:
        """Alerts that have fired since then, by time.time()."""
        window_ms = max(round(1000 * (time.time() - since)), 1)
        found = self.query(f'count by (alertname) (count_over_time(ALERTS{{alertstate="firing"}}[{window_ms}ms]))')
        return {labels["alertname"] for labels, _ in found}

    def firing(self) -> set[str]:
        """Alerts that fire now."""
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}

    def annotations(self) -> list[str]:
        """Of all alerts that fire now."""
        return [text for alert in self._get("alerts")["alerts"] for text in alert["annotations"].values()]

    def unhealthy(self) -> list[str]:
        """Rules that could not be evaluated, and why."""
        groups = self._get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return [f"{rule['name']}: {rule.get('lastError', '')}" for rule in rules if rule["health"] == "err"]

    def _get(self, what: str, **arguments: str) -> Any:
        with urlopen(f"http://{self._url}/api/v1/{what}?{urlencode(arguments)}", timeout=QUERY_S) as reply:
            return json.load(reply)["data"]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urlopen(f"http://{self._url}/-/ready", timeout=1):
                    return
            except (URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self._folder / "log").read_text()) from None
                time.sleep(0.1)

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
