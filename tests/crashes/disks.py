"""Disks that lose power, fill up or break: ext4 on a file in memory, and small tmpfs.

All of this needs root, and the right to mount.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

SIZE = 64 << 20

# The kernel writes nothing back before a sync: the journal commits after ten minutes.
LAZY = "commit=600"


def mount(*arguments: object) -> None:
    """Run mount. Skip the test if mounting is forbidden."""
    command = ["mount", *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        pytest.skip(f"kernel: mounting is not allowed here: {done.stderr.strip()}")


def unmount(path: Path) -> None:
    """Unmount a file system as soon as killed processes no longer use it."""
    for _ in range(100):
        if subprocess.run(["umount", path], stderr=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(0.05)
    subprocess.run(["umount", "--lazy", path], check=True)
    raise AssertionError(f"{path} is still in use")


@attrs.frozen
class Disk:
    """A mounted ext4.

    Attributes:
        image: The file that contains its disk, with the bytes that survive a power cut.
        path: Its mount point.
        device: Its loop device, such as ``loop0``.
    """

    image: Path
    path: Path
    device: str

    def copy(self, target: Path) -> None:
        """Copy the disk as it is, without bytes that have not been written back yet.

        If something is written meanwhile, it is copied once more: the copy could have a part of the
        later bytes, and lack earlier ones.
        """
        while True:
            before = self._written()
            _copy_sparse(self.image, target)
            if self._written() == before and before[1] == "0":
                return

    def _written(self) -> tuple[str, str]:
        fields = Path(f"/sys/block/{self.device}/stat").read_text().split()
        return fields[4], fields[8]  # completed writes, and requests under way

    def shut_down(self) -> None:
        """Shut the file system down at once, as if the disk were gone."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            # EXT4_IOC_SHUTDOWN, with EXT4_GOING_FLAGS_NOLOGFLUSH.
            fcntl.ioctl(descriptor, 0x8004587D, ctypes.c_uint32(2))
        finally:
            os.close(descriptor)

    def break_down(self) -> None:
        """Have ext4 find an error in itself: it is mounted with ``errors=remount-ro``."""
        Path(f"/sys/fs/ext4/{self.device}/trigger_fs_error").write_text("1")


def make_ext4(image: Path, *, size: int = SIZE) -> None:
    """Make an ext4 in a sparse file."""
    with open(image, "wb") as file:
        file.truncate(size)
    options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
    command = ["mkfs.ext4", "-q", "-F", "-E", options, "-J", "size=4", "-N", "4096", image]
    subprocess.run(command, check=True)


def make_thin_ext4(image: Path, *, size: int) -> None:
    """Make an ext4 that is larger than the free space of its image's file system.

    Its own tables and its journal have their space. The space for files is taken at write-back.
    """
    make_ext4(image, size=size)
    with open(image, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    told = subprocess.run(["dumpe2fs", image], check=True, capture_output=True, text=True).stdout
    block = int(re.search(r"^Block size: +(\d+)$", told, re.M)[1])
    for ranges in re.findall(r"^  Free blocks: (.+)$", told, re.M):
        for free in ranges.split(", "):
            first, last = free.split("-")[0], free.split("-")[-1]
            length = int(last) + 1 - int(first)
            where = ["--offset", str(int(first) * block), "--length", str(length * block)]
            subprocess.run(["fallocate", "--punch-hole", *where, image], check=True)


def fill(path: Path) -> None:
    """Write to a file until no space is left."""
    with open(path, "wb", buffering=0) as file:
        for size in (64 * 1024, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@contextmanager
def mounted_ext4(image: Path, path: Path, options: str = LAZY) -> Iterator[Disk]:
    """Mount an image, new or as a power cut left it."""
    path.mkdir(exist_ok=True)
    mount("-o", f"loop,{options}", image, path)
    try:
        yield Disk(image, path, _device(path))
    finally:
        unmount(path)


@contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", options, "none", path)
    try:
        yield
    finally:
        unmount(path)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def _device(path: Path) -> str:
    number = os.stat(path).st_dev
    return os.path.basename(
        os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    )


def _copy_sparse(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        position = 0
        while True:
            try:
                position = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            end = os.lseek(old.fileno(), position, os.SEEK_HOLE)
            os.lseek(old.fileno(), position, os.SEEK_SET)
            new.seek(position)
            while position < end:
                data = os.read(old.fileno(), min(1 << 20, end - position))
                new.write(data)
                position += len(data)
