"""``kvferry doctor``: whether this machine can do its work, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.connect import CA, EdgeCert, EdgeKey, InClear, TokenFile
from kvferry.cli.console import print_json
from kvferry.errors import KVFerryError

OK, WARN, FAIL = "ok", "warn", "fail"
FAILED = 1
"""Exit code where something will not work."""
LEAST_FREE = 1024**3
SOON_DAYS = 30
"""A certificate that ends so soon is told of."""
SKEW_SECONDS = 5.0
SHIPPED = ("testbed/cloud", "testbed/edge")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``status`` is ``ok``, ``warn`` (it works, but look at it) or ``fail``."""

    check: str
    status: str
    detail: str


def doctor(
    cloud: Annotated[str | None, typer.Option(help="host:port of a cloud that this machine should reach.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that should be here; repeatable.")] = None,
    certificate: Annotated[
        list[Path] | None, typer.Option(help="A PEM file whose dates to look at; repeatable.")
    ] = None,
    disk: Annotated[
        list[Path] | None, typer.Option(help="A folder that should have room; repeatable. Else here and $TMPDIR.")
    ] = None,
    ca: CA = None,
    cert: EdgeCert = None,
    key: EdgeKey = None,
    token_file: TokenFile = None,
    insecure: InClear = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at versions, extras, devices, models, disk, clock, and at a cloud and certificates if they are named."""
    found = [*versions(), *extras(), *compute(), *models(model or SHIPPED), *profiles()]
    found += [*space(disk or [Path.cwd(), Path(tempfile.gettempdir())]), *clock()]
    for path in [*(certificate or []), *([cert] if cert else [])]:
        found += dates(path)
    if cloud is not None:
        found += reach(cloud, ca, cert, key, token_file, insecure)
    worst = FAIL if any(x.status == FAIL for x in found) else OK
    if json:
        print_json({"status": worst, "findings": [asdict(finding) for finding in found]})
    else:
        for finding in found:
            print(f"{finding.status:<5} {finding.check:<12} {finding.detail}")
    if worst == FAIL:
        raise typer.Exit(FAILED)


def versions() -> Iterator[Finding]:
    """Python, and every package that kvferry cannot do without, against what it asks for."""
    from packaging.requirements import Requirement

    yield Finding("python", OK, f"{platform.python_version()} on {platform.platform()}")
    for text in metadata.requires("kvferry") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding(wanted.name, FAIL, f"is not installed; run: pip install '{wanted.name}{wanted.specifier}'")
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        more = "" if fits else f", but {wanted.specifier} is needed; run: pip install -U '{wanted.name}'"
        yield Finding(wanted.name, OK if fits else FAIL, version + more)


def extras() -> Iterator[Finding]:
    """Which of kvferry's extras are installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("kvferry") or []]
    names = [x for x in metadata.metadata("kvferry").get_all("Provides-Extra") or [] if x not in ("dev", "docs")]
    here: list[str] = []
    away: list[str] = []
    for extra in names:
        of = [x for x in wanted if x.marker is not None and x.marker.evaluate({"extra": extra})]
        of = [x for x in of if not x.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        (here if all(_installed(x.name) for x in of) else away).append(extra)
    yield Finding("extras", OK, f"installed: {', '.join(here) or 'none'}; not: {', '.join(away) or 'none'}")


def compute() -> Iterator[Finding]:
    """Cores, threads and accelerators, as PyTorch sees them."""
    from kvferry.lazy import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = f"; more than there are cores, set OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("threads", WARN if many else OK, f"{threads} on {cores} cores{many}")
    kinds = [f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count())]
    kinds += ["mps"] if torch.backends.mps.is_available() else []
    yield Finding("devices", OK, ", ".join(["cpu", *kinds]))


def models(names: Any) -> Iterator[Finding]:
    """Whether models are here."""
    from kvferry.checkpoint import find_checkpoint

    for name in names:
        try:
            place = find_checkpoint(name)
        except KVFerryError as error:
            yield Finding("model", FAIL, str(error))
        else:
            far = "a name on the Hub: it is downloaded when it is first loaded"
            yield Finding("model", OK if place else WARN, f"{name}: {place.resolve() if place else far}")


def profiles() -> Iterator[Finding]:
    """The folders that KVFERRY_PROFILES names, and what is in them."""
    from kvferry.codecs.profile_store import FOLDERS, SUFFIX
    from kvferry.codecs.profile_store import add as read

    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            yield Finding("profiles", FAIL, f"{FOLDERS} names {folder}, which is no folder; make it, or unset it")
            continue
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        try:
            made = [read(path)[0] for path in files]
        except KVFerryError as error:
            yield Finding("profiles", FAIL, str(error))
        else:
            said = ", ".join(f"{x.kind} for {x.fingerprint[:12]}" for x in made) or f"no *{SUFFIX}"
            yield Finding("profiles", OK if made else WARN, f"{folder}: {said}")


def space(folders: list[Path]) -> Iterator[Finding]:
    """Free bytes where files go."""
    for folder in dict.fromkeys(folders):
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding("disk", FAIL, f"{folder}: {error.strerror}; make the folder, or name another")
            continue
        little = free < LEAST_FREE
        yield Finding("disk", WARN if little else OK, f"{folder}: {free / 1e9:,.1f} GB free" + "; make room" * little)


def clock() -> Iterator[Finding]:
    """The clock of this machine: certificates and tokens end by it. It is at least as late as this file."""
    now, made = time.time(), Path(__file__).stat().st_mtime
    wrong = now < made - SKEW_SECONDS
    said = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    yield Finding("clock", FAIL if wrong else OK, said + "; before kvferry was installed: set the clock" * wrong)


def dates(path: Path) -> Iterator[Finding]:
    """When the certificate in a PEM file ends."""
    try:
        told: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
        begins, ends = (ssl.cert_time_to_seconds(told[key]) for key in ("notBefore", "notAfter"))
    except (OSError, ssl.SSLError, ValueError, KeyError) as error:
        yield Finding("certificate", FAIL, f"{path} cannot be read as one ({error}); name a PEM file")
        return
    now = time.time()
    days = (ends - now) / 86_400
    said = f"{path}: until {datetime.fromtimestamp(ends, UTC):%Y-%m-%d} ({days:,.0f} days)"
    if now < begins:
        yield Finding("certificate", FAIL, f"{path}: not valid before {told['notBefore']}; is the clock right?")
    elif days <= 0:
        yield Finding("certificate", FAIL, f"{said}; it has ended, make a new one (`kvferry keys`)")
    else:
        yield Finding("certificate", WARN if days < SOON_DAYS else OK, said)


def reach(
    cloud: str, ca: str | None, cert: Path | None, key: Path | None, token_file: Path | None, insecure: bool
) -> Iterator[Finding]:
    """Whether a cloud answers, what it serves, and whether its clock agrees with this one."""
    from kvferry import __version__
    from kvferry.edge import Edge
    from kvferry.security import Credentials

    try:
        credentials = Credentials.found(ca, cert, key, token_file, insecure)
        with Edge(None, cloud, deadline=10, credentials=credentials) as edge:
            told = edge.describe()
            began, before = time.perf_counter(), time.time()
            told = edge.describe()
            took = time.perf_counter() - began
    except KVFerryError as error:
        yield Finding("cloud", FAIL, str(error))
        return
    yield Finding(
        "cloud",
        OK,
        f"{cloud}: {told['model']} ({told['fingerprint'][:12]}), round trip {1000 * took:.1f} ms, "
        f"a question would wait {told['queue_seconds']:.1f} s",
    )
    same = told["kvferry_version"] == __version__
    other = "" if same else f"; here {__version__}: the same version on both ends is what is tested"
    yield Finding("cloud version", OK if same else WARN, told["kvferry_version"] + other)
    if told["unix_seconds"]:
        skew = told["unix_seconds"] - (before + took / 2)
        far = abs(skew) > SKEW_SECONDS + took / 2
        yield Finding("cloud clock", WARN if far else OK, f"{skew:+.1f} s from this one" + "; set one of them" * far)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
