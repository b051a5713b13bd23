"""C code is compiled once per processor, and what is missing for it is reported in one line."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardstep.datasets import native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """C code of a function `answer`, and a separate cache folder."""
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def _kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("native-*/*"))


def test_it_is_compiled_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load(source).answer() == 42
    monkeypatch.setattr(native, "_compile", lambda *given: pytest.fail("compiled again"))
    assert native.load(source).answer() == 42
    assert [path.suffix for path in _kept(tmp_path)] == [".so"]


def test_another_source_header_command_or_processor_has_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load(source)
    monkeypatch.setenv("CC", "cc -DOTHER")
    native.load(source)
    monkeypatch.setattr(native, "_abilities", lambda: "flags: of another one")
    native.load(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert native.load(source).answer() == 43
    source.with_name("shared.h").write_text("int question;\n")
    native.load(source)
    assert len(_kept(tmp_path)) == 5


def test_many_may_compile_at_once(source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found: list[ctypes.CDLL] = list(pool.map(native.load, [source] * 8))
    assert [library.answer() for library in found] == [42] * 8
    assert len(_kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("compiler", "text", "told"),
    [
        ("no-such-compiler", "", "there is no no-such-compiler"),
        ("cc", "int answer(void) { return forty_two; }", "cc: .*answer.c.*forty_two"),
        ("cc -lno-such-library", "int answer(void) { return 42; }", "cc: .*cannot find -lno-such-library"),
        ("false", "", "false: it failed without a message"),
        ("cc 'open", "", "No closing quotation"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    compiler: str, text: str, told: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    source.write_text(text)
    with pytest.raises(native.NoCompilerError, match=told) as raised:
        native.load(source)
    assert "\n" not in str(raised.value)
    assert not _kept(tmp_path)


def test_an_empty_library_is_made_anew(source: Path, tmp_path: Path) -> None:
    native.load(source)
    (kept,) = _kept(tmp_path)
    kept.rename(tmp_path / "whole.so")  # the loader knows the other file
    kept.write_bytes(b"")
    assert native.load(source).answer() == 42


def test_a_cache_folder_that_cannot_be_written_is_reported(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(native.NoCompilerError, match="cache"):
        native.load(source)


def test_an_empty_choice_is_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    assert native.load(source).answer() == 42


def test_a_missing_home_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native, "cache_folder", homeless)
    with pytest.raises(native.NoCompilerError, match="home directory"):
        native.load(source)


def test_what_others_may_have_written_is_not_run(source: Path, tmp_path: Path) -> None:
    native.load(source)
    folder = tmp_path / "cache" / f"native-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(native.NoCompilerError, match="others may write there"):
        native.load(source)


def test_memory_of_a_thread_grows_to_what_is_asked_for() -> None:
    sizes = []

    def needs(size: int) -> int:
        def call(scratch: native.Scratch) -> int:
            sizes.append(scratch.size)
            scratch.used = size
            return native.DONE if size <= scratch.size else native.NEEDS_MEMORY

        return native.call_with_scratch(call)

    with ThreadPoolExecutor(1) as pool:  # a thread that has no memory yet
        assert list(pool.map(needs, [1000, 500, 2000])) == [native.DONE] * 3
    assert sizes == [0, 1000, 1000, 1000, 2000]
