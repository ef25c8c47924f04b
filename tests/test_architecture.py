"""The import rules of docs/architecture.md: text in app/, tokens in workers/, and heavy libraries where they belong."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from config.sources import ROOT

OURS = ("app", "config", "workers")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each module of ``package``, which may be one module itself."""
    place = ROOT / package.replace(".", "/")
    for path in sorted(place.rglob("*.py")) or [place.with_suffix(".py")]:
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path, *, at_top_only: bool = False) -> set[str]:
    """Return the dotted names of all that a file imports, also inside functions; no relative imports are used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in _top_level(tree) if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from workers import wire" imports workers.wire.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        yield from [node] if not isinstance(node, ast.If | ast.Try) else ast.walk(node)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def breaches(package: str, allowed: tuple[str, ...], among: tuple[str, ...] = OURS) -> list[str]:
    """Return the imports of ``package`` from ``among`` that are not within ``allowed``."""
    return [
        f"{module} imports {name}"
        for module, path in modules(package)
        for name in sorted(imports(path))
        if within(name, *among) and not within(name, *allowed)
    ]


def test_app_knows_of_the_workers_only_what_crosses_the_border():
    assert breaches("app", ("app", "config", "workers.messages", "workers.wire")) == []


# What each part of the HTTP side knows of the others: only those below it.
BELOW = {
    "app.bell": (),
    "app.ids": (),
    "app.timings": (),
    "app.metrics": ("app.pool_stream", "app.text", "app.timings"),
    "app.store": (),
    "app.text": ("app.ids", "app.pool_client"),
    "app.pool_stream": ("app.bell", "app.text.errors", "app.text.offload", "app.timings"),
    "app.pool_client": ("app.pool_stream", "app.text.errors", "app.text.offload", "app.timings"),
    "app.errors": ("app.text.errors",),
    "app.door": ("app.errors", "app.ids"),
    "app.api": (
        "app.door",
        "app.errors",
        "app.ids",
        "app.metrics",
        "app.pool_client",
        "app.pool_stream",
        "app.store",
        "app.text",
    ),
}


@pytest.mark.parametrize("part", BELOW)
def test_the_parts_of_the_http_side_know_only_what_is_below_them(part):
    assert breaches(part, (part, *BELOW[part]), among=("app",)) == []


def test_every_part_of_the_http_side_has_its_place():
    parts = {f"app.{path.stem}" for path in (ROOT / "app").iterdir() if not path.name.startswith("_")}
    assert parts == BELOW.keys()


def test_workers_do_not_know_app():
    assert breaches("workers", ("workers", "config")) == []


def test_the_engine_knows_messages_its_configuration_and_the_log_only():
    allowed = ("workers.engine", "workers.messages", "workers.config", "config.logs", "config.template_sandbox")
    assert breaches("workers.engine", allowed) == []


def test_config_knows_nobody():
    assert breaches("config", ("config",)) == []


@pytest.mark.parametrize("package", ["app", "config", "workers.pool", "workers.__main__", "workers.entry"])
def test_no_heavy_library_outside_the_engine(package):
    if package in ("workers.__main__", "workers.entry"):
        names = imports(ROOT / f"{package.replace('.', '/')}.py", at_top_only=True)
        assert not [name for name in names if within(name, *HEAVY)]
    else:
        assert breaches(package, (), HEAVY) == []


def test_no_gevent_outside_the_http_workers():
    # gunicorn's worker class lives in config, because the arbiter imports it and must not import the application.
    of_the_http_side = ("config.http_worker ", "workers.pool.keeper imports gunicorn")
    found = breaches("workers", (), ("gevent", "flask", "gunicorn")) + breaches("config", (), ("gevent", "flask"))
    assert [line for line in found if not line.startswith(of_the_http_side)] == []


@pytest.mark.parametrize("start", ["import app; app.create_app", "import config.checks", "import workers.__main__"])
def test_these_processes_load_no_torch(start):
    script = f"import sys; {start}; print([name for name in {HEAVY} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (shown.returncode, shown.stdout.strip()) == (0, "[]"), shown.stderr


def test_the_pool_loads_no_gevent():
    script = "import sys, workers.__main__; print('gevent' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.strip() == "False"


def test_only_the_configuration_reads_our_environment_variables():
    quoted = re.compile(r"""["']TAILRACE_""")
    readers = [
        module
        for package in ("app", "workers")
        for module, path in modules(package)
        if quoted.search(path.read_text(encoding="utf-8"))
    ]
    assert readers == []


# What says to people, or to files, when something was. How long something takes is never measured by the date, which
# may jump.
TELLS_THE_DATE = {
    "app.api.responses.output",
    "app.api.service",
    "app.api.status.data",
    "app.door.keys",
    "app.store.records",
    "app.store.store",
    "config.template_sandbox",
    "workers.engine.card",
}


def test_nothing_that_waits_looks_at_the_date():
    date = re.compile(r"\btime\.(time|time_ns)\b|\bdatetime\.(now|utcnow|today)\b|from time import")
    lookers = {
        module for package in OURS for module, path in modules(package) if date.search(path.read_text(encoding="utf-8"))
    }
    assert lookers == TELLS_THE_DATE


def test_everything_imported_is_required_by_name():
    """A package that is there only because another one brought it may be gone with the next version."""
    declared = _required("requirements.txt") | _required("requirements-gpu.txt")
    for package in OURS:
        for module, path in modules(package):
            for name in imports(path):
                _assert_declared(name, declared, module)
    declared |= _required("requirements-dev.txt") | _required("requirements-fuzz.txt")
    for module, path in modules("tests"):
        for name in imports(path):
            if module.endswith("_client") and within(module, "tests.e2e.clients"):
                _assert_a_client(name, module)
            else:
                _assert_declared(name, declared, module)


def _required(file: str) -> set[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {_plain(line.partition("==")[0]) for line in lines if "==" in line}


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _assert_a_client(name: str, module: str) -> None:
    """These scripts run in an environment of their own, which is not at hand here."""
    top = _plain(name.partition(".")[0])
    known = any(each == top or each.startswith(top + "-") for each in _required("requirements-clients.txt"))
    assert known or top in sys.stdlib_module_names, f"{module} imports {name}, which no requirements file names"


def _assert_declared(name: str, declared: set[str], module: str) -> None:
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in (*OURS, "tests", "benchmarks", "gunicorn_conf", "flash_attn"):
        return
    # What is not installed here (atheris) is looked for by its own name.
    distributions = {_plain(each) for each in _distributions().get(top, [top])}
    assert distributions & declared, f"{module} imports {name}, which no requirements file names"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")
