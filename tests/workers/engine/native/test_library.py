"""Compiling and loading the C sources: once for each machine, and a clear word when it is not possible."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers.engine.errors import NoNativeStep
from workers.engine.native import library

ROOT = Path(__file__).parents[4]
FLAGS = ("-shared", "-fPIC")


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time: all functions that are asked for, doing nothing."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    real = "".join(path.read_text() for path in library.SOURCES.glob("*.c"))
    names = sorted(set(re.findall(r"\btr_\w+(?=\()", real)))
    (folder / "all.c").write_text("".join(f"int {name}(void) {{ return 42; }}\n" for name in names))
    (folder / "some.h").write_text("/* nothing */\n")
    monkeypatch.setattr(library, "SOURCES", folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "of" / "kernels"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def compiler_in(folder: Path, script: str, name: str = "cc") -> None:
    """Put a compiler there that answers ``--version`` and else does what ``script`` says."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nPATH={Path(shutil.which("ls") or "").parent}:/usr/bin:/bin\n'
                    f'[ "$1" = --version ] && echo cc 1.0 && exit\n{script}\n')  # fmt: skip
    path.chmod(0o755)


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_the_library_is_compiled_once(cache: Path) -> None:
    assert library.load(cache, FLAGS).tr_step(None, None) == 42
    (target,) = libraries(cache)
    compiled = target.stat().st_mtime_ns
    assert library.load(cache, FLAGS).tr_step(None, None) == 42
    assert libraries(cache) == [target]
    assert target.stat().st_mtime_ns == compiled


def test_other_flags_sources_and_headers_give_other_libraries(cache: Path, sources: Path) -> None:
    library.load(cache, FLAGS)
    library.load(cache, (*FLAGS, "-O1"))
    assert len(libraries(cache)) == 2
    (sources / "some.h").write_text("/* something */\n")
    library.load(cache, FLAGS)
    assert len(libraries(cache)) == 3
    (sources / "all.c").write_text((sources / "all.c").read_text().replace("42", "43"))
    assert library.load(cache, FLAGS).tr_step(None, None) == 43
    assert len(libraries(cache)) == 4


def test_another_compiler_or_processor_gives_another_library(
    cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = "/usr/bin/cc"
    if not Path(real).exists():
        pytest.skip("no compiler there")
    compiler_in(programs, f'exec {real} "$@"')
    library.load(cache, FLAGS)
    compiler_in(programs, f'exec {real} "$@" # of another day', "gcc")
    (programs / "cc").unlink()
    library.load(cache, FLAGS)
    assert len(libraries(cache)) == 2
    monkeypatch.setattr(library, "_processor", lambda: "another one")
    library.load(cache, FLAGS)
    assert len(libraries(cache)) == 3


def test_a_machine_without_a_compiler_says_so(cache: Path, programs: Path) -> None:
    with pytest.raises(NoNativeStep, match=r"no C compiler \(cc, gcc, clang\) is installed"):
        library.load(cache)
    assert not cache.exists()


def test_a_compiler_that_fails_is_quoted(cache: Path, sources: Path) -> None:
    (sources / "broken.c").write_text("int broken(void) { return nothing_like_that; }\n")
    with pytest.raises(NoNativeStep, match=r"cc failed: .*nothing_like_that") as error:
        library.load(cache, FLAGS)
    assert "\n" not in str(error.value)
    assert not libraries(cache), "what it left behind could be taken for a library"


def test_a_compiler_that_does_not_know_a_flag_is_quoted(cache: Path) -> None:
    with pytest.raises(NoNativeStep, match=r"cc failed: .*no-such-processor"):
        library.load(cache, (*FLAGS, "-march=no-such-processor"))


def test_a_compiler_that_takes_too_long_is_given_up(
    cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_in(programs, "exec cat <>/dev/zero >/dev/null")
    monkeypatch.setattr(library, "COMPILE_TIMEOUT_S", 0.2)
    with pytest.raises(NoNativeStep, match="timed out"):
        library.load(cache, FLAGS)


def test_a_compiler_that_cannot_be_run_is_no_compiler(cache: Path, programs: Path) -> None:
    (programs / "cc").write_bytes(b"\x7fELF of another machine")
    (programs / "cc").chmod(0o755)
    with pytest.raises(NoNativeStep):
        library.load(cache, FLAGS)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoNativeStep, match=r"cannot compile into .*file"):
        library.load(tmp_path / "file" / "cache", FLAGS)


def test_a_library_that_cannot_be_loaded_when_it_is_new_either_is_named(cache: Path, programs: Path) -> None:
    compiler_in(programs, 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"')
    with pytest.raises(NoNativeStep, match=r"native-\w+.so cannot be loaded"):
        library.load(cache, FLAGS)


def test_two_processes_may_compile_at_once(cache: Path, programs: Path, sources: Path, tmp_path: Path) -> None:
    """Each compiler waits until both have begun."""
    begun = tmp_path / "begun"
    begun.mkdir()
    compiler_in(
        programs,
        f"touch {begun}/$$\n"
        f"tries=0; while [ $(ls {begun} | wc -l) -lt 2 ] && [ $tries -lt 2000 ]; do tries=$((tries + 1)); done\n"
        '/usr/bin/cc "$@"',
    )
    program = (
        "import sys; from pathlib import Path; from workers.engine.native import library; "
        "library.SOURCES = Path(sys.argv[1]); "
        "print(library.load(Path(sys.argv[2]), tuple(sys.argv[3:])).tr_step(None, None))"
    )
    command = [sys.executable, "-c", program, str(sources), str(cache), *FLAGS]
    children = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out.strip()) == (0, "42"), err
    assert len(list(begun.iterdir())) == 2
    assert len(libraries(cache)) == 1


def test_structures_are_as_large_as_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides describe them by hand."""
    names = ("Lora", "Matrix", "Layer", "Model", "Batch")
    monkeypatch.undo()
    code = '#include "tailrace.h"\n' + "".join(f"int size_{n}(void) {{ return sizeof({n}); }}\n" for n in names)
    (tmp_path / "sizes.c").write_text(code)
    command = ["cc", *FLAGS, f"-I{library.SOURCES}", str(tmp_path / "sizes.c"), "-o", str(tmp_path / "sizes.so")]
    subprocess.run(command, check=True)
    sizes = ctypes.CDLL(str(tmp_path / "sizes.so"))
    for name in names:
        assert ctypes.sizeof(getattr(library, name)) == getattr(sizes, f"size_{name}")(), name


@pytest.mark.parametrize("content", [b"", b"\x7fELF and nothing more", None])
def test_a_damaged_library_is_made_anew(cache: Path, sources: Path, content: bytes | None) -> None:
    library.load(cache, FLAGS)
    (target,) = libraries(cache)
    if content is None:
        # One that can be loaded, but has not the functions.
        (sources.parent / "other.c").write_text("int other(void) { return 1; }")
        subprocess.run(["cc", *FLAGS, str(sources.parent / "other.c"), "-o", str(target)], check=True)
    else:
        target.unlink()
        target.write_bytes(content)
    assert library.load(cache, FLAGS).tr_step(None, None) == 42
    assert libraries(cache) == [target]
