"""Runs the conformance kit on a small plugin, whole or with one mistake, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from bittern.testing.site import Site

SOURCES = Path(__file__).parent / "plover"
_numbers = itertools.count()


class Outcomes:
    """Collects what became of every test of a nested run."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}
        self.messages: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or outcome != "passed":
            self.by_test[name] = outcome
            self.messages[name] = str(report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.by_test["collection"] = "failed"
            self.messages["collection"] = str(report.longrepr)

    def failed(self) -> set[str]:
        """Return the names of the standard tests that failed, without their cases."""
        failed = [n for n, outcome in self.by_test.items() if outcome == "failed"]
        return {name.rpartition("::")[2].partition("[")[0] for name in failed}


Run = Callable[..., Outcomes]


@pytest.fixture
def run_kit(tmp_path: Path) -> Iterator[Run]:
    """Runs ``plover/conformance.py`` with replacements in the sources, on a fresh plugin.

    Every run gets a package of its own name: classes, codecs and probes are cached by name.
    """
    sites: list[Site] = []

    def run(
        *arguments: str,
        changes: Mapping[str, tuple[str, str]] | None = None,
        tests: str | None = None,
        requires: tuple[str, ...] = (),
    ) -> Outcomes:
        name = f"plover{next(_numbers)}"
        left = dict(changes or {})
        texts = {}
        for file in sorted(SOURCES.glob("*.txt")):
            text = file.read_text(encoding="utf-8")
            if file.stem in left:
                old, new = left.pop(file.stem)
                assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file.name}"
                text = text.replace(old, new)
            texts[file.stem] = text.replace("plover", name)
        assert not left, f"there is no {', '.join(left)}"
        site = Site()
        sites.append(site)
        site.add_package(name, {"__init__.py": texts["framework"], "layers.py": texts["layers"]})
        rest = {f"{n}.py": texts[n] for n in ("hooks", "quantized", "rest")}
        site.add_package(f"bittern_{name}", rest)
        site.add_distribution(name, "1.0", top_level=name)
        site.add_distribution(
            f"bittern-{name}",
            "1.0",
            requires=[
                "bittern>=0.1",
                f'{name}>=1; extra == "target"',
                *requires_of(requires, name),
            ],
            entry_points={name: f"bittern_{name}.hooks"},
            group="bittern.plugins",
        )
        file = tmp_path / f"test_{name}.py"
        source = texts["conformance"] if tests is None else tests.replace("plover", name)
        file.write_text(source, encoding="utf-8")
        outcomes = Outcomes()
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminal", "-s"]
        options += ["-c", "/dev/null", "--rootdir", str(tmp_path), "--import-mode=importlib"]
        options += ["--basetemp", str(tmp_path / f"base-{name}")]
        pytest.main([*options, str(file), *arguments], plugins=[outcomes])
        return outcomes

    yield run
    for site in sites:
        site.close()


def requires_of(requires: tuple[str, ...], name: str) -> list[str]:
    return [text.replace("plover", name) for text in requires]
