"""The cache of decoded data: what is read is whole, whoever was killed and however full the disk is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ablab.data.cache import CacheEntry, EntryWriter, content_key, default_folder, get_or_create, load_entry

KEY = content_key("a data set")
LIMIT = 600  # seconds: only a hang takes as long


def make(writer: EntryWriter) -> None:
    """A small data set."""
    writer.array("images", (50, 3, 4), "uint8")[:] = np.arange(600).reshape(50, 3, 4) % 251
    writer.array("targets", (50,), "int64")[:] = np.arange(50) % 7
    writer.facts["class_names"] = ["cat", "犬"]


def counted(calls: Path, seconds: float = 0) -> Callable[[EntryWriter], None]:
    """The same, which leaves a line for each time that it is made."""

    def make_counted(writer: EntryWriter) -> None:
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        make(writer)

    return make_counted


def expected() -> dict[str, Tensor]:
    images = (torch.arange(600) % 251).to(torch.uint8)
    return {"images": images.view(50, 3, 4), "targets": torch.arange(50) % 7}


def assert_whole(stored: CacheEntry) -> None:
    assert stored.tensors.keys() == expected().keys()
    for name, tensor in expected().items():
        assert torch.equal(stored.tensors[name], tensor)
        assert stored.tensors[name].dtype == tensor.dtype
    assert stored.facts == {"class_names": ["cat", "犬"]}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# what runs in processes of its own ----------------------------------------------------------------------------------


def ask(folder: Path, me: str) -> None:
    """Say that this process is ready, wait for the word, ask for the entry and save what it got."""
    (folder / f"{me}.ready").touch()
    wait_for(folder / "go")
    stored = get_or_create(KEY, counted(folder / "calls", seconds=0.3), folder / "cache")
    torch.save({**stored.tensors, "facts": stored.facts, "digest": stored.digest}, folder / f"{me}.pt")


def stop_half_way(folder: Path) -> None:
    def half(writer: EntryWriter) -> None:
        writer.array("images", (50, 3, 4), "uint8")[:25] = 1
        (folder / "half").touch()
        time.sleep(LIMIT)

    get_or_create(KEY, half, folder / "cache")


def be_killed_anywhere(folder: Path) -> None:
    """Be killed at the first thing that is done to a file, then at the second, and so on, each time afresh."""
    damaged = folder / "damaged"
    get_or_create(KEY, make, damaged)
    (damaged / KEY / "images.npy").write_bytes(b"damaged")
    step = finished = 0
    while not finished:
        step += 1
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(damaged, cache)
        if not (child := os.fork()):
            seen = 0

            def hook(event: str, arguments: Any, last: int = step) -> None:
                nonlocal seen
                if event.split(".")[0] in ("open", "os", "shutil", "mmap") and str(KEY) in f"{arguments}":
                    seen += 1
                    if seen == last:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            get_or_create(KEY, make, cache)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        if (left := load_entry(cache / KEY)) is not None:
            assert_whole(left)
        assert_whole(get_or_create(KEY, make, cache))
        assert names(cache) == {KEY, f"{KEY}.lock"}
    print(step)


def fill_the_disk(folder: Path) -> None:
    """Make an entry that is too large, and then one that is not."""
    refusal = ""
    try:
        get_or_create(content_key("large"), lambda writer: writer.array("images", (3, 2**20), "uint8").fill(1), folder)
    except ValueError as error:
        refusal = str(error)
    print(refusal)
    assert names(folder) == {f"{content_key('large')}.lock"}
    assert_whole(get_or_create(KEY, make, folder))


def fill_the_disk_of_a_mac(folder: Path) -> None:
    del os.posix_fallocate
    fill_the_disk(folder)


def exceed_a_quota(folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    fill_the_disk(folder)


def read_a_read_only_disk(folder: Path) -> None:
    digest = get_or_create(KEY, make, folder).digest
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    stored = get_or_create(KEY, make, folder)
    assert_whole(stored)
    assert stored.digest == digest
    try:
        get_or_create(content_key("another"), make, folder)
    except ValueError as error:
        print(error)


def start(task: Callable[..., None], folder: Path, *more: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A process that runs one of the functions above."""
    words = [*prefix, sys.executable, __file__, task.__name__, str(folder), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def printed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    return output


def wait_for(path: Path) -> None:
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path.name} after {LIMIT} s"
        time.sleep(0.01)


@pytest.fixture
def own_disk(tmp_path: Path) -> tuple[str, ...]:
    """Words before a command that give it a disk of 1 MiB in tmp_path, which is gone when it ends."""
    mount = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    words = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a small disk, which this machine does not let its users mount")
    return words


# tests ---------------------------------------------------------------------------------------------------------------


def test_an_entry_is_made_once_and_read_from_then_on(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    first, *others = (get_or_create(KEY, counted(calls), tmp_path / "cache") for _ in range(3))
    for stored in (first, *others):
        assert_whole(stored)
        assert stored.digest == first.digest
    assert len(calls.read_text().splitlines()) == 1


def test_of_four_processes_at_once_one_makes_the_entry_and_all_get_it(tmp_path: Path) -> None:
    processes = [start(ask, tmp_path, str(number)) for number in range(4)]
    for number in range(4):
        wait_for(tmp_path / f"{number}.ready")
    (tmp_path / "go").touch()
    for process in processes:
        printed(process)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    got = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(4)]
    for each in got:
        assert_whole(CacheEntry({name: each[name] for name in expected()}, each["facts"], each["digest"]))
        assert each["digest"] == got[0]["digest"]


def test_when_the_maker_is_killed_half_way_the_next_in_line_makes_it_whole(tmp_path: Path) -> None:
    maker = start(stop_half_way, tmp_path)
    wait_for(tmp_path / "half")
    (tmp_path / "go").touch()
    waiting = start(ask, tmp_path, "next")
    wait_for(tmp_path / "next.ready")
    assert names(tmp_path / "cache") == {f"{KEY}.part", f"{KEY}.lock"}
    time.sleep(0.2)
    assert waiting.poll() is None
    maker.kill()
    maker.communicate()
    printed(waiting)
    assert_whole(get_or_create(KEY, counted(tmp_path / "calls"), tmp_path / "cache"))
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert names(tmp_path / "cache") == {KEY, f"{KEY}.lock"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_kill_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    [*_, steps] = printed(start(be_killed_anywhere, tmp_path)).split()
    assert int(steps) > 15  # the kills were in the middle of it


def cut(entry: Path) -> None:
    file = entry / "images.npy"
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(entry: Path) -> None:
    with (entry / "images.npy").open("ab") as file:
        file.write(b"?")


def overwrite_header(entry: Path) -> None:
    file = entry / "images.npy"
    file.write_bytes(b"?" * file.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lengthen,
        overwrite_header,
        lambda entry: (entry / "targets.npy").unlink(),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text('{"digest": "12'),
        lambda entry: (entry / "entry.json").write_bytes(b"\xff\x00"),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "entry.json").write_text('{"bytes": {}}'),
    ],
    ids=["cut", "longer", "header", "no array", "no json", "cut json", "not text", "list", "no facts"],
)
def test_a_damaged_entry_is_named_and_made_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    digest = get_or_create(KEY, make, tmp_path).digest
    damage(tmp_path / KEY)
    with pytest.warns(UserWarning, match=f"{KEY}: this entry of the cache is damaged, and is made again"):
        again = get_or_create(KEY, make, tmp_path)
    assert_whole(again)
    assert again.digest == digest
    assert_whole(get_or_create(KEY, make, tmp_path))


@pytest.mark.parametrize("error", [FileNotFoundError("image.png"), ValueError("image.png"), KeyboardInterrupt()])
def test_what_goes_wrong_in_the_making_is_passed_on_and_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail(writer: EntryWriter) -> None:
        make(writer)
        raise error

    with pytest.raises(type(error)) as raised:
        get_or_create(KEY, fail, tmp_path)
    assert raised.value is error
    assert names(tmp_path) == {f"{KEY}.lock"}
    assert_whole(get_or_create(KEY, make, tmp_path))


@pytest.mark.parametrize("task", [fill_the_disk, fill_the_disk_of_a_mac])
def test_a_full_disk_is_refused_with_what_is_needed_and_leaves_nothing(
    task: Callable[[Path], None], own_disk: tuple[str, ...], tmp_path: Path
) -> None:
    assert printed(start(task, tmp_path, prefix=own_disk)) == (
        f"{tmp_path}: cannot write decoded data, which needs 3.0 MiB (No space left on device); "
        "free some space, or set ABLAB_CACHE to a folder on another disk\n"
    )


def test_a_limit_of_file_sizes_is_refused_like_a_full_disk(tmp_path: Path) -> None:
    assert printed(start(exceed_a_quota, tmp_path)) == (
        f"{tmp_path}: cannot write decoded data, which needs 3.0 MiB (File too large); "
        "free some space, or set ABLAB_CACHE to a folder on another disk\n"
    )


def test_what_is_on_a_read_only_disk_can_be_read(own_disk: tuple[str, ...], tmp_path: Path) -> None:
    assert printed(start(read_a_read_only_disk, tmp_path, prefix=own_disk)) == (
        f"{tmp_path}: cannot write decoded data (Read-only file system); "
        "set ABLAB_CACHE to a folder that can be written\n"
    )


@pytest.mark.parametrize("place", ["", "below"])
def test_a_folder_that_is_a_file_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file.*: cannot write decoded data .*; set ABLAB_CACHE to a folder that can"):
        get_or_create(KEY, make, tmp_path / "file" / place)


def test_a_key_follows_the_content_of_files_and_not_their_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, content in zip(paths, (b"same", b"same", b"other"), strict=True):
        path.write_bytes(content)
    a, b, c = (content_key("images", 32, path) for path in paths)
    assert a == b != c
    assert len(a) == 32


def test_parts_of_a_key_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab")
    kinds: list[tuple[Any, ...]] = [("ab",), ("a", "b"), ("b", "a"), ("a'\n'b",), (b"ab",), (tmp_path / "file",)]
    kinds += [(), ("",), (1,), ("1",), (1, 2), (12,)]
    assert len({content_key(*parts) for parts in kinds}) == len(kinds)
    content_key("\udcff")  # as in a file's name that is not UTF-8


def array(name: str, values: Any, dtype: str) -> Callable[[EntryWriter], None]:
    def make_array(writer: EntryWriter) -> None:
        writer.array(name, np.shape(values), dtype)[...] = values

    return make_array


def fact(writer: EntryWriter) -> None:
    array("x", [1, 2], "uint8")(writer)
    writer.facts["a"] = 1


def test_a_digest_is_of_all_content_and_of_nothing_else(tmp_path: Path) -> None:
    contents = [
        array("x", [1, 2], "uint8"),
        array("x", [1, 3], "uint8"),
        array("x", [[1, 2]], "uint8"),
        array("x", [1, 2], "int8"),
        array("y", [1, 2], "uint8"),
        fact,
        lambda writer: None,
    ]
    digests = [get_or_create(content_key(i), made, tmp_path / "here") for i, made in enumerate(contents)]
    assert len({stored.digest for stored in digests}) == len(contents)
    assert get_or_create(KEY, contents[0], tmp_path / "there").digest == digests[0].digest


def test_an_entry_says_nothing_of_where_and_by_whom_it_was_made(tmp_path: Path) -> None:
    get_or_create(KEY, make, tmp_path / "here")
    get_or_create(KEY, make, tmp_path / "there")
    assert names(tmp_path / "here" / KEY) == {"images.npy", "targets.npy", "entry.json"}
    for name in names(tmp_path / "here" / KEY):
        content = (tmp_path / "here" / KEY / name).read_bytes()
        assert content == (tmp_path / "there" / KEY / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_tensors_are_the_files_and_writing_into_one_changes_only_this_processs_copy(tmp_path: Path) -> None:
    here, there = (get_or_create(KEY, make, tmp_path).tensors["images"] for _ in range(2))
    file = tmp_path / KEY / "images.npy"
    before = file.read_bytes()
    here[0] += 1
    assert file.read_bytes() == before
    assert torch.equal(there, expected()["images"])
    with file.open("r+b") as stream:  # nothing was copied: another byte in the file is one in the tensor
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    assert there[-1, -1, -1] == 255


def test_arrays_of_any_size_and_shape_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.arange(700_001, dtype=np.int32)

    def make_arrays(writer: EntryWriter) -> None:
        images = writer.array("large", large.shape, "int32")
        for begin in range(0, len(large), 50_000):
            images[begin : begin + 50_000] = large[begin : begin + 50_000]
        writer.array("empty", (0, 3), "float32")
        writer.array("single", (), "bool")[...] = True

    digests = set()
    for place in ("Linux", "macOS"):
        tensors = (stored := get_or_create(KEY, make_arrays, tmp_path / place)).tensors
        assert torch.equal(tensors["large"], torch.from_numpy(large))
        assert tensors["empty"].shape == (0, 3)
        assert tensors["single"].item() is True
        digests.add(stored.digest)
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert len(digests) == 1


def test_data_larger_than_memory_are_mapped(tmp_path: Path) -> None:
    setting = Path("/proc/sys/vm/overcommit_memory")
    if setting.exists() and setting.read_text().strip() == "2":
        pytest.skip("this machine sets memory aside for all that is mapped")
    get_or_create(KEY, make, tmp_path)
    record = tmp_path / KEY / "entry.json"
    sparse = np.lib.format.open_memmap(tmp_path / KEY / "images.npy", "w+", "uint8", (2**40,))
    sparse[-1] = 7
    entry = json.loads(record.read_text(encoding="utf-8"))
    entry["bytes"]["images"] = (tmp_path / KEY / "images.npy").stat().st_size
    record.write_text(json.dumps(entry), encoding="utf-8")
    assert get_or_create(KEY, make, tmp_path).tensors["images"][-1] == 7


def test_a_type_that_torch_does_not_have_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"can't convert np.ndarray of type numpy\.str_"):
        get_or_create(KEY, lambda writer: writer.array("names", (3,), "U5").fill("a"), tmp_path)


def test_the_folder_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("ABLAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder() == tmp_path / "home" / ".cache" / "ablab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "ablab"
    monkeypatch.setenv("ABLAB_CACHE", "~/own")
    assert default_folder() == tmp_path / "home" / "own"
    get_or_create(KEY, make)
    assert names(tmp_path / "home" / "own") == {KEY, f"{KEY}.lock"}


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
