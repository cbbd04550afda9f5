"""Folders and files that several processes write at once, and that processes leave which die."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from lora_jax import _folders
from lora_jax._folders import CheckpointError, complete_file, complete_folder, undisturbed

FILES = ("first", "second", "third")

# A process that writes versions of one folder, one after another. It does not import JAX.
WRITER = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("folders", sys.argv[1])
folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folders)
if sys.argv[4] == "two steps":
    folders._is_exchanged = lambda *names: False
for number in range(int(sys.argv[5])):
    with folders.complete_folder(pathlib.Path(sys.argv[2]), overwrite=True) as folder:
        for name in ("first", "second", "third"):
            (folder / name).write_text(f"{sys.argv[3]} {number}")
            time.sleep(0.0005)
"""


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "saved"


@contextlib.contextmanager
def writer(destination, name, steps="one step", count=10**6):
    arguments = [_folders.__file__, str(destination), name, steps, str(count)]
    process = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def write(destination, text, *, overwrite=True):
    with complete_folder(destination, overwrite=overwrite) as folder:
        for name in FILES:
            (folder / name).write_text(text)


def version(folder):
    """Returns what all files of a folder say; they must say the same."""

    def read():
        with _folders.as_checkpoint_error("can't be read"):
            return [(folder / name).read_text() for name in FILES]

    texts = undisturbed(folder, read)
    assert texts == texts[:1] * len(FILES)
    return texts[0]


def await_version(folder, name):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(CheckpointError):
            if version(folder).startswith(name):
                return
        time.sleep(0.01)
    raise AssertionError(f"{name} has written nothing")


def test_several_writers_and_a_reader(destination):
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writer(destination, name, count=60)) for name in ("one", "two")
        ]
        write(destination, "three 0")
        seen = {version(destination) for _ in range(20)}
        while any(process.poll() is None for process in writers):
            seen.add(version(destination))
        assert [(each.returncode, each.stderr.read()) for each in writers] == [(0, b"")] * 2
    assert len(seen) > 2
    # The last to finish wrote its last version last.
    assert version(destination) in {"one 59", "two 59"}
    assert list(destination.parent.iterdir()) == [destination]


def test_two_writers_where_the_system_has_no_exchange(destination):
    """At moments nothing is at the destination; what is there is complete all the same."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer(destination, name, "two steps", 60)) for name in "ab"]
        while any(process.poll() is None for process in writers):
            with contextlib.suppress(CheckpointError):
                version(destination)
        assert [(each.returncode, each.stderr.read()) for each in writers] == [(0, b"")] * 2
    assert version(destination) in {"a 59", "b 59"}
    assert list(destination.parent.iterdir()) == [destination]


def test_killed_writers_leave_a_whole_version(destination):
    left = 0
    write(destination, "before 0")
    for number in range(8):
        with writer(destination, f"killed-{number}") as process:
            await_version(destination, f"killed-{number}")
            time.sleep(0.0007 * number)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert version(destination).startswith(f"killed-{number}")
        left += len(list(destination.parent.iterdir())) - 1
        if number == 5:
            write(destination, "after")
            assert list(destination.parent.iterdir()) == [destination]
    # The premise: some were killed while they wrote.
    assert left > 0


def test_what_is_being_written_is_not_taken_for_abandoned(destination):
    with complete_folder(destination, overwrite=True) as folder:
        (folder / FILES[0]).write_text("slow")
        write(destination, "fast")
        assert version(destination) == "fast"
        for name in FILES:
            (folder / name).write_text("slow")
    assert version(destination) == "slow"
    assert list(destination.parent.iterdir()) == [destination]


def test_a_folder_that_was_taken_for_abandoned_before_it_was_locked(destination, monkeypatch):
    lock, removed = _folders._lock, []

    def late(folder, **options):
        if not removed:
            removed.append(folder)
            folder.rmdir()
        return lock(folder, **options)

    monkeypatch.setattr(_folders, "_lock", late)
    write(destination, "text")
    assert version(destination) == "text"


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_another_process_put_there_in_the_meantime(destination, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(_folders, "_is_exchanged", lambda *names: False)
    with (
        pytest.raises(CheckpointError, match="taken by another process.*overwrite=True"),
        complete_folder(destination, overwrite=False),
    ):
        write(destination, "faster")
    assert version(destination) == "faster"
    with complete_folder(destination, overwrite=True) as folder:
        write(destination, "replaced")
        for name in FILES:
            (folder / name).write_text("last")
    assert version(destination) == "last"
    assert list(destination.parent.iterdir()) == [destination]


def test_folders_of_other_destinations_are_left_alone(destination):
    others = [
        destination.with_name(f".saved.v2.0123abcd{state}")
        for state in (".unfinished", ".previous")
    ]
    for other in others:
        other.mkdir()
    write(destination, "text")
    assert all(other.is_dir() for other in others)


def test_a_new_folder_is_as_readable_as_any(destination):
    write(destination, "text")
    plain = destination.with_name("plain")
    plain.mkdir()
    assert destination.stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_version_is_not_replaced_while_it_is_read(destination):
    write(destination, "old")
    replacement = threading.Thread(target=write, args=(destination, "new"))

    def read():
        texts = [(destination / FILES[0]).read_text()]
        replacement.start()
        replacement.join(0.2)
        assert replacement.is_alive()
        return [*texts, (destination / FILES[1]).read_text()]

    assert undisturbed(destination, read) == ["old", "old"]
    replacement.join(30)
    assert version(destination) == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_version_is_replaced_for_all_who_wait_to_read_it(destination, monkeypatch):
    """A reader that opened the previous version before it was replaced reads the next one."""
    write(destination, "old")
    texts, waits = [], threading.Event()

    def sleep(seconds):
        waits.set()
        time.sleep(seconds)

    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(_folders, "time", clock)
    with _folders._kept_in_place(destination, shared=False):
        reader = threading.Thread(target=lambda: texts.append(version(destination)))
        reader.start()
        assert waits.wait(30)
        previous = destination.rename(destination.with_name("previous"))
        write(destination, "new")
    reader.join(30)
    assert texts == ["new"]
    assert version(previous) == "old"


def test_a_version_that_is_replaced_all_the_same_is_read_again(destination, monkeypatch):
    """There are file systems without locks, and no save waits for ever."""
    monkeypatch.setattr(_folders, "_PATIENCE", 0)
    write(destination, "old")
    reads = []

    def read():
        reads.append((destination / FILES[0]).read_text())
        if len(reads) == 1:
            write(destination, "new")
        return reads[-1], (destination / FILES[1]).read_text()

    assert undisturbed(destination, read) == ("new", "new")
    assert reads == ["old", "new"]


class TestOneFile:
    def write(self, destination, text, *, overwrite=True, failure=None, meanwhile=lambda: None):
        with complete_file(destination, overwrite=overwrite) as file:
            file.write_text(text)
            meanwhile()
            if failure is not None:
                raise failure

    def test_it_is_there_when_it_is_complete(self, destination):
        with complete_file(destination, overwrite=False) as file:
            file.write_text("text")
            assert not destination.exists()
        assert destination.read_text() == "text"
        assert list(destination.parent.iterdir()) == [destination]
        plain = destination.with_name("plain")
        plain.write_text("text")
        assert destination.stat().st_mode == plain.stat().st_mode

    def test_its_parents_are_made(self, destination):
        self.write(destination / "parent" / "file", "text")
        assert (destination / "parent" / "file").read_text() == "text"

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    def test_what_was_there_stays_where_writing_fails(self, destination, failure):
        destination.write_text("before")
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            self.write(destination, "half", failure=failure)
        assert destination.read_text() == "before"
        assert list(destination.parent.iterdir()) == [destination]

    @pytest.mark.parametrize("links", [True, False])
    def test_what_another_process_put_there_in_the_meantime(self, destination, monkeypatch, links):
        if not links:

            def refuse(*names):
                raise OSError("no links here")

            monkeypatch.setattr(type(destination), "hardlink_to", refuse)

        def faster():
            self.write(destination, "faster", overwrite=False)

        with pytest.raises(CheckpointError, match="taken by another process.*overwrite=True"):
            self.write(destination, "slow", overwrite=False, meanwhile=faster)
        assert destination.read_text() == "faster"
        self.write(destination, "last")
        assert destination.read_text() == "last"
        assert list(destination.parent.iterdir()) == [destination]

    def test_what_a_killed_process_left_goes_with_the_next_one(self, destination):
        left = destination.with_name(f".{destination.name}.0123abcd.unfinished")
        left.mkdir()
        (left / destination.name).write_text("half")
        self.write(destination, "text")
        assert list(destination.parent.iterdir()) == [destination]
