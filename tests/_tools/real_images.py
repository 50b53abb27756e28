"""Real images: a Debian by mmdebstrap, and more layers on it by buildah."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
from _tools.docker_registry import DockerRegistry, require

MANY_FILES: Final = "adwaita-icon-theme"
"""A package of some six thousand small files."""

STEPS: Final = [
    # Each step makes a layer: a shell runs it in the root of the image. Some steps are usual in
    # images …
    "chroot . dpkg --force-depends --purge tzdata && rm -rf usr/share/doc usr/share/man",
    "mkdir -p srv/app && cp -a etc srv/app/ && ln -s app/etc srv/current && rm -r srv/app/etc/apt",
    "chown -R 1000:1000 srv/app && chmod -R go-rwx srv/app/etc && setcap cap_net_raw+ep bin/tar",
    # … some make links to files of lower layers, …
    "ln usr/bin/perl usr/local/bin/perl && ln bin/ls bin/list && touch -d @1000000000 bin/list",
    "rm usr/local/bin/perl && ln -f bin/cat bin/ls && echo changed >> etc/issue",
    # … some move directories, or remove them and make them again, …
    "mv usr/share/perl5 opt/perl5 && ln -s ../../opt/perl5 usr/share/perl5",
    "rm -r srv/app/etc && mkdir -m 2711 srv/app/etc && echo new > srv/app/etc/new",
    "rm usr/share/perl5 && mkdir usr/share/perl5 && mv opt/perl5/Debconf usr/share/perl5/",
    # … some change a file to another type, …
    "rm -r media && echo file > media && rm etc/issue && mkdir etc/issue && touch etc/issue/in",
    "rm media && mkfifo media && rm -r etc/issue && ln -s /nowhere etc/issue && mknod dev/x b 8 1",
    # … and some make rare names, times and attributes.
    "printf x > \"opt/$(printf 'not utf-8 \\377')\" && truncate -s 5M opt/sparse"
    " && touch -d @1.5 opt/sparse && touch -h -d @1 etc/issue",
    "chmod 1777 opt && chown 70000:2147483648 opt/sparse && chmod 4755 usr/bin/tar",
]


@attrs.frozen
class RealImage:
    """An image in the registry.

    Attributes:
        reference: The image's reference in the registry.
        layout: The same image with gzip layers in an OCI layout: a directory, a colon and a tag.
            umoci reads no other compression.
    """

    reference: str
    layout: str


@attrs.frozen
class Buildah:
    """A buildah with a storage of its own. It keeps each image under a name."""

    directory: Path

    def run(self, *args: str) -> str:
        command = [require("buildah"), "--root", str(self.directory / "storage")]
        command += ["--runroot", str(self.directory / "run"), "--storage-driver", "overlay"]
        done = subprocess.run([*command, *args], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    @contextmanager
    def layer(self, base: str, name: str) -> Iterator[Path]:
        """Make the image ``name`` from ``base`` and the changes of the block in the directory."""
        container = self.run("from", "--pull-never", base)
        yield Path(self.run("mount", container))
        self.run("umount", container)
        self.run("commit", "--quiet", "--rm", container, name)

    def push(self, name: str, registry: DockerRegistry, *, compression: str) -> RealImage:
        """Copy an image to the registry with this compression, and to an OCI layout."""
        reference = f"{registry.host}/real/{name}:1"
        layout = f"{self.directory / 'layout'}:{name}"
        options = ["--quiet", "--format", "oci", "--compression-format", compression]
        self.run("push", *options, "--tls-verify=false", name, f"docker://{reference}")
        self.run("push", "--quiet", "--format", "oci", name, f"oci:{layout}")
        return RealImage(reference, layout)

    def close(self) -> None:
        """Unmount the storage."""
        try:
            self.run("rm", "--all")
        finally:
            subprocess.run(["umount", "--quiet", self.directory / "storage" / "overlay"])


@contextmanager
def open_buildah(directory: Path) -> Iterator[Buildah]:
    """Open a buildah with all its data in ``directory``."""
    buildah = Buildah(directory)
    try:
        yield buildah
    finally:
        buildah.close()


def make_debian(buildah: Buildah) -> str:
    """Make a Debian with mmdebstrap, from this machine's package source."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    command += ["Created-By: Packages", f"Codename: {release}", "Component: main"]
    mirror = _output(*command).splitlines()[0]
    proxy = _output("apt-config", "shell", "http_proxy", "Acquire::http::Proxy")
    with buildah.layer("scratch", "debian") as root:
        arguments = [require("mmdebstrap"), "--quiet", "--mode=root", "--variant=minbase"]
        arguments += [release, str(root), mirror]
        _run(["sh", "-c", f'{proxy} export http_proxy; exec "$@"', "sh", *arguments])
    return "debian"


def make_many_files(buildah: Buildah, base: str) -> str:
    """Make an image with thousands of small files in one layer."""
    with buildah.layer(base, "many") as root:
        downloads = buildah.directory / "packages"
        downloads.mkdir()
        _run(["apt-get", "download", "--quiet", "--quiet", MANY_FILES], cwd=downloads)
        [package] = downloads.iterdir()
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    return "many"


def make_links(buildah: Buildah, base: str) -> str:
    """Make an image with whiteouts and links in many layers."""
    for number, step in enumerate(STEPS):
        name = f"links-{number}"
        with buildah.layer(base, name) as root:
            _run(["sh", "-e", "-c", step], cwd=root)
        base = name
    return base


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    """Run a command, and fail with its output if it fails."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-4000:]}")
