"""The cache: the same arrays from files, whatever happens to processes and files."""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc import GeneratorSettings, Settings, fit, generate
from mlloss_cuda.xmc.data import (
    DataError,
    Dataset,
    cache,
    read_dataset,
    read_pair,
    reading,
    write_dataset,
)

SIZES = GeneratorSettings(train_rows=60, test_rows=10, num_features=50, num_labels=20)
ARRAYS = ("feature_ids", "feature_values", "feature_offsets", "label_ids", "label_offsets")
FILES = ("contents.json", *(f"{name}.npy" for name in ARRAYS))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small file, and what it holds."""
    path = tmp_path_factory.mktemp("source") / "train.txt"
    write_dataset(path, generate(SIZES)[0])
    return path, read_dataset(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def assert_same(one: Dataset, other: Dataset):
    for field in dataclasses.fields(Dataset):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def read_silently(path, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_dataset(path, cache=folder)


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.name != ".lock")


@contextlib.contextmanager
def no_parsing():
    def fail(*_):
        pytest.fail("the file was parsed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_text", fail)
        yield


def in_child(work):
    """Run it in a process of its own, and return how that ended: 0, 1 or minus a signal."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return process


def status_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# ---- What it does --------------------------------------------------------------------------------


def test_the_second_time_arrays_are_mapped(source, folder):
    path, wanted = source
    assert_same(read_silently(path, folder), wanted)
    with no_parsing():
        dataset = read_silently(path, folder)
    assert_same(dataset, wanted)
    for name in ARRAYS:
        array = getattr(dataset, name)
        assert type(array) is np.ndarray
        assert isinstance(array.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert len(entries(folder)) == 1
    assert {path.name for path in entries(folder)[0].iterdir()} == {*FILES, ".lock"}


def test_entries_belong_to_contents(source, folder, tmp_path):
    """Neither names nor times matter, and nothing else does."""
    path, wanted = source
    read_silently(path, folder)
    other = tmp_path / "other.txt"
    shutil.copy(path, other)
    with no_parsing():
        dataset = read_silently(other, str(folder))
    assert_same(dataset, dataclasses.replace(wanted, path=str(other)))

    content = path.read_bytes()
    changed = content.replace(b":1", b":2", 1)
    assert len(changed) == len(content)
    times = other.stat()
    other.write_bytes(changed)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_silently(other, folder).feature_values.sum() == wanted.feature_values.sum() + 1
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("content", ["0 5 3\n", "2 0 0\n \n \n", "1 1:1 3:2\n 2:1\n"])
def test_empty_arrays_and_files_without_header(tmp_path, folder, content):
    path = tmp_path / "data.txt"
    path.write_text(content)
    wanted = read_dataset(path)
    for _ in range(2):
        assert_same(read_silently(path, folder), wanted)


def test_pairs_of_headerless_files(tmp_path, folder):
    """Ids are shifted by what the other file needs, not by what the cache holds."""
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("1,2 1:1 4:2\n")
    for content in ("1 2:1\n", "0 0:1\n"):
        test.write_text(content)
        wanted = read_pair(train, test)
        for _ in range(2):
            for one, other in zip(read_pair(train, test, cache=folder), wanted, strict=True):
                assert_same(one, other)


def test_files_of_features_and_labels(tmp_path, folder):
    features, labels, dense = tmp_path / "x.txt", tmp_path / "y.txt.gz", tmp_path / "x.npy"
    features.write_text("2 3\n0:1 2:5\n\n")
    labels.write_bytes(gzip.compress(b"2 4\n3:1\n1:1 0:1\n"))
    np.save(dense, np.ones((2, 3)))
    wanted = read_dataset(features, labels)
    assert_same(read_dataset(features, labels, cache=folder), wanted)
    with no_parsing():
        assert_same(read_dataset(features, labels, cache=folder), wanted)
        # Dense features are mapped where they are.
        mapped = read_dataset(dense, labels, cache=folder)
    assert mapped.dense_features.tolist() == [[1, 1, 1]] * 2
    assert len(entries(folder)) == 2


def test_the_same_content_as_something_else(tmp_path, folder):
    """A file of features may be a file of labels too."""
    path = tmp_path / "both.txt"
    path.write_text("2 3\n0:1 2:5\n1:1\n")
    for _ in range(2):
        dataset = read_dataset(path, path, cache=folder)
        assert dataset.feature_values.tolist() == [1, 5, 1]
        assert dataset.label_ids.tolist() == [0, 2, 1]


def test_malformed_files_leave_nothing(tmp_path, folder):
    path = tmp_path / "data.txt"
    path.write_text("1 5 3\n0 0:x\n")
    for _ in range(2):
        with pytest.raises(DataError, match="line 2: expected a finite number"):
            read_dataset(path, cache=folder)
    assert not folder.exists()


def test_files_that_change_while_they_are_parsed(tmp_path, folder, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("0 0:1\n")
    read_text = reading.read_text

    def changing(*arguments):
        path.write_text("0 0:2\n")
        return read_text(*arguments)

    monkeypatch.setattr(reading, "read_text", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        read_dataset(path, cache=folder)
    assert not folder.exists()


def test_files_that_change_and_change_back(tmp_path, folder, monkeypatch):
    """What was parsed in between is not kept as what the file holds now."""
    path = tmp_path / "data.txt"
    path.write_text("0 0:1\n")
    read_text = reading.read_text

    def changing(*arguments):
        time.sleep(0.05)  # times of files are some milliseconds coarse
        path.write_text("0 0:2\n")
        dataset = read_text(*arguments)
        path.write_text("0 0:1\n")
        return dataset

    monkeypatch.setattr(reading, "read_text", changing)
    assert read_silently(path, folder).feature_values.tolist() == [2]
    monkeypatch.undo()
    assert read_silently(path, folder).feature_values.tolist() == [1]


def test_training_on_mapped_arrays(source, folder):
    """Nothing writes to them, and the bits are the same."""
    path, plain = source
    read_silently(path, folder)
    mapped = read_silently(path, folder)
    settings = Settings(epochs=2, hidden=8, batch_size=16)
    for features in ("tfidf", "standardize", "raw"):
        settings = dataclasses.replace(settings, features=features)
        options = {"evaluate_on": mapped, "progress": False}
        runs = [fit(data, settings, **options) for data in (plain, mapped)]
        assert runs[0].history[-1].loss == runs[1].history[-1].loss
        assert runs[0].history[-1].scores == runs[1].history[-1].scores
    assert_same(mapped.take(np.arange(60)), plain)
    write_dataset(folder / "again.txt", mapped)
    assert (folder / "again.txt").read_bytes() == path.read_bytes()


# ---- Processes that are killed, and others at the same time --------------------------------------


def kill_at(event):
    """From now on, this process kills itself at the given step of writing an entry."""
    left = [event]

    def step(function):
        def counted(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    def write_file(file, *parts):
        """As the original, in small pieces."""
        with open(file, "wb") as opened:
            for part in parts:
                for start in range(0, len(part), 1500):
                    step(opened.write)(part[start : start + 1500])
            step(opened.flush)()
            step(os.fsync)(opened.fileno())

    cache._write_file = write_file
    cache.sync_folder = step(cache.sync_folder)
    cache.tempfile.mkdtemp = step(cache.tempfile.mkdtemp)
    cache.fcntl.flock = step(cache.fcntl.flock)
    cache.Path.rename = step(cache.Path.rename)
    cache._load = step(cache._load)


def test_killed_at_every_step(source, tmp_path):
    """kill -9: the next process finds nothing or all of it, and clears up."""
    path, wanted = source
    kept = 0
    for event in range(1, 1000):
        folder = tmp_path / f"cache{event}"

        def work(event=event, folder=folder):
            kill_at(event)
            read_dataset(path, cache=folder)

        status = status_of(in_child(work))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        whole = [entry for entry in entries(folder) if not entry.name.startswith(".")]
        kept += len(whole)
        if whole:
            with no_parsing():
                assert_same(read_silently(path, folder), wanted)
        else:
            assert_same(read_silently(path, folder), wanted)
            assert len(entries(folder)) == 1
        shutil.rmtree(folder)
    assert event > 25
    assert kept >= 1  # at the last steps, the entry was there already


def test_killed_while_it_replaces_a_damaged_entry(source, tmp_path):
    path, wanted = source
    for event in range(1, 1000):
        folder = tmp_path / f"cache{event}"
        read_silently(path, folder)
        (entries(folder)[0] / "label_ids.npy").write_bytes(b"")

        def work(event=event, folder=folder):
            kill_at(event)
            read_dataset(path, cache=folder)

        status = status_of(in_child(work))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(read_dataset(path, cache=folder), wanted)
        assert_same(read_silently(path, folder), wanted)
        assert len(entries(folder)) == 1
        shutil.rmtree(folder)
        if status == 0:
            break
    assert event > 25


def test_killed_at_any_time(source, folder, tmp_path):
    path, wanted = source

    def work():
        for number in range(1000):
            for entry in folder.glob("dataset-*"):
                entry.rename(tmp_path / f"removed-{os.getpid()}-{number}")
            read_dataset(path, cache=folder)

    for seed in range(12):
        process = in_child(work)
        time.sleep(random.Random(seed).uniform(0.01, 0.06))
        os.kill(process, signal.SIGKILL)
        assert status_of(process) == -signal.SIGKILL
        assert_same(read_silently(path, folder), wanted)


@pytest.mark.parametrize("damage", [False, True])
def test_several_processes_at_once(source, folder, damage):
    path, wanted = source
    if damage:
        read_silently(path, folder)
        (entries(folder)[0] / "label_ids.npy").unlink()
    ready, go = os.pipe(), os.pipe()

    def work():
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if damage else "error")
            for _ in range(20):
                assert_same(read_dataset(path, cache=folder), wanted)

    processes = [in_child(work) for _ in range(4)]
    for _ in processes:
        os.read(ready[0], 1)
    os.write(go[1], b"g" * len(processes))
    assert [status_of(process) for process in processes] == [0] * 4
    for descriptor in (*ready, *go):
        os.close(descriptor)
    assert len(entries(folder)) == 1
    with no_parsing():
        assert_same(read_silently(path, folder), wanted)


def test_an_entry_that_is_being_written_is_no_leftover(source, folder, tmp_path):
    path, wanted = source
    other = tmp_path / "other.txt"
    other.write_text("0 1:1\n")
    written, go_on = os.pipe(), os.pipe()

    def work():
        sync_folder = cache.sync_folder

        def waiting(partial):
            if partial.name.endswith(".partial"):
                os.write(written[1], b"w")
                os.read(go_on[0], 1)
            sync_folder(partial)

        cache.sync_folder = waiting
        assert_same(read_silently(path, folder), wanted)

    process = in_child(work)
    os.read(written[0], 1)
    read_silently(other, folder)  # clears up
    os.write(go_on[1], b"g")
    assert status_of(process) == 0
    assert len(entries(folder)) == 2
    for descriptor in (*written, *go_on):
        os.close(descriptor)


def test_nothing_else_is_cleared_up(source, folder):
    others = [folder / name for name in (".mine.partial", "mine", ".dataset-1-00-x.partial")]
    for other in others:
        (other / "deeper").mkdir(parents=True)
    read_silently(source[0], folder)
    assert all((other / "deeper").is_dir() for other in others)


# ---- Damage --------------------------------------------------------------------------------------


def flip(position):
    def change(content):
        index = int(position * (len(content) - 1))
        return content[:index] + bytes([content[index] ^ 4]) + content[index + 1 :]

    return change


DAMAGES = {
    "flipped at the start": flip(0),
    "flipped in the header": flip(0.02),
    "flipped in the middle": flip(0.5),
    "flipped at the end": flip(1),
    "cut off": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\n ",
    "zeros": lambda content: bytes(len(content)),
    "removed": None,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_anew(source, folder, file, damage):
    path, wanted = source
    read_silently(path, folder)
    damaged = entries(folder)[0] / file
    if DAMAGES[damage] is None:
        damaged.unlink()
    else:
        damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    if (file, damage) == ("contents.json", "longer"):  # it says the same
        assert_same(read_silently(path, folder), wanted)
        return
    with pytest.warns(UserWarning, match=f"{file}: .*; the cache entry is made anew") as caught:
        assert_same(read_dataset(path, cache=folder), wanted)
    assert str(damaged) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    with no_parsing():
        assert_same(read_silently(path, folder), wanted)
    assert len(entries(folder)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored["contents"]["facts"].update(num_labels=7),
        lambda stored: stored["contents"]["arrays"]["label_ids"].update(bytes=1),
        lambda stored: stored["contents"]["arrays"].pop("label_ids"),
        lambda stored: stored.update(checksum="0"),
        lambda stored: stored.pop("checksum"),
        lambda stored: stored.pop("contents"),
    ],
)
def test_altered_contents(source, folder, change):
    path, wanted = source
    read_silently(path, folder)
    file = entries(folder)[0] / "contents.json"
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match=r"contents\.json"):
        assert_same(read_dataset(path, cache=folder), wanted)
    assert_same(read_silently(path, folder), wanted)


def test_what_is_mapped_stays_when_an_entry_is_made_anew(source, folder):
    path, wanted = source
    first = [read_silently(path, folder), read_silently(path, folder)][1]
    (entries(folder)[0] / "label_ids.npy").unlink()
    with pytest.warns(UserWarning, match="missing"):
        read_dataset(path, cache=folder)
    assert_same(first, wanted)


# ---- Folders that cannot be used -----------------------------------------------------------------


def test_folders_that_cannot_be_written(source):
    path, wanted = source
    for folder in ("/proc/mlloss_cuda", "/proc/self"):
        with pytest.warns(UserWarning, match=f"the cache {folder} cannot be used: ") as caught:
            assert_same(read_dataset(path, cache=folder), wanted)
        assert "going on without" in str(caught[0].message)


def test_a_file_as_a_folder(source, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="Not a directory, so no cache") as caught:
        read_dataset(source[0], cache=file)
    assert caught.value.filename == str(file)
    with pytest.warns(UserWarning, match="cannot be used: Not a directory"):
        read_dataset(source[0], cache=file / "below")


def test_a_disk_that_is_full(source, folder):
    path, wanted = source

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with pytest.warns(UserWarning, match="cannot be used: File too large"):
            assert_same(read_dataset(path, cache=folder), wanted)

    assert status_of(in_child(work)) == 0
    assert entries(folder) == []


def test_entries_that_cannot_be_read(source, folder, monkeypatch):
    path, wanted = source
    read_silently(path, folder)

    def failing(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_map_array", failing)
    with pytest.warns(UserWarning, match="Permission denied") as caught:
        assert_same(read_dataset(path, cache=folder), wanted)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        f"the cache entry {entries(folder)[0]} cannot be read: Permission denied; "
        f"reading {path} itself",
        f"the cache {folder} cannot be used: Permission denied; going on without",
    ]
    monkeypatch.undo()
    assert_same(read_silently(path, folder), wanted)
    assert len(entries(folder)) == 1


def test_folders_that_cannot_be_looked_into(source, folder, monkeypatch):
    path, wanted = source

    def failing(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(cache.Path, "exists", failing)
    monkeypatch.setattr(cache.Path, "mkdir", lambda self, **_: failing(self))
    with pytest.warns(UserWarning, match=f"{folder} cannot be used: Permission denied"):
        assert_same(read_dataset(path, cache=folder), wanted)


def test_entries_can_be_read_where_nothing_can_be_written(source, folder, monkeypatch):
    path, wanted = source
    read_silently(path, folder)

    def failing(*_, **__):
        raise OSError(30, "Read-only file system")

    for name in ("_partial_folder", "_locked", "_write_file", "sync_folder"):
        monkeypatch.setattr(cache, name, failing)
    assert_same(read_silently(path, folder), wanted)


def test_others_may_use_a_cache(source, folder):
    read_silently(source[0], folder)
    assert entries(folder)[0].stat().st_mode & 0o777 == 0o777 & ~cache.current_umask()
