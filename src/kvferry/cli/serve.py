"""``kvferry serve``."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvferry.checkpoint import known_as
from kvferry.cli.checks import metrics_address
from kvferry.cli.console import Device, Dtype, Model, NamedModel, Traces, model_of, print_json, waiting
from kvferry.cli.guarded import Cert, ClientCA, Insecure, Key, TokensFile, guarded
from kvferry.errors import InputError
from kvferry.telemetry import set_up_logs
from kvferry.telemetry.traces import set_up_traces


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


def serve(
    model: Model = "",
    named: NamedModel = "",
    device: Device = "",
    dtype: Dtype = "auto",
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7421",
    http: Annotated[
        str, typer.Option(help="host:port for OpenAI's clients (/v1/chat/completions) too; extra 'http'.")
    ] = "",
    cert: Cert = None,
    key: Key = None,
    client_ca: ClientCA = None,
    tokens: TokensFile = None,
    insecure: Insecure = False,
    translator: Annotated[
        list[Path] | None,
        typer.Option(help="Read the caches of a smaller model by this file (kvferry fit translator); may be repeated."),
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="A question may take this long.", min=0.1)] = 120.0,
    max_bytes: Annotated[int, typer.Option(help="A question may bring so many bytes.", min=1)] = 512 * 1024 * 1024,
    max_waiting: Annotated[int, typer.Option(help="So many questions may wait for the model.", min=0)] = 16,
    together: Annotated[int, typer.Option(help="So many questions the model works on at once.", min=1)] = 16,
    steady: Annotated[
        bool, typer.Option("--steady", help="On a CPU: answers that are the same to the bit whoever else asks.")
    ] = False,
    max_held_bytes: Annotated[
        int, typer.Option(help="So much is kept for further questions; 0 keeps nothing.", min=0)
    ] = 1024 * 1024 * 1024,
    max_session_bytes: Annotated[int, typer.Option(help="So much of it for one edge.", min=0)] = 256 * 1024 * 1024,
    session_seconds: Annotated[float, typer.Option(help="What is unused for so long is forgotten.", min=0)] = 600.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Any other limit, as NAME=VALUE; may be repeated (docs/operations.md lists them)."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Answer by replicas that Ray runs: local (this machine), auto or HOST:PORT (a cluster); extra 'ray'."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="How many, with --ray.", min=1)] = 2,
    replica_cpus: Annotated[float, typer.Option(help="Of each, by which Ray places them.", min=0)] = 1.0,
    store: Annotated[
        str | None,
        typer.Option(help="Keep it beyond this process too: a folder, or redis://host:port/0 (extra 'redis')."),
    ] = None,
    store_key: Annotated[
        Path | None, typer.Option(help="Seal what is stored with the key in this file (openssl rand -hex 32).")
    ] = None,
    max_stored_bytes: Annotated[int, typer.Option(help="So much lies in the folder.", min=1)] = 8 * 1024**3,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="host:port (or a port of this machine alone) where Prometheus reads metrics; extra 'metrics'."
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines for people, or one JSON object each with a line for every request.")
    ] = LogFormat.TEXT,
    traces: Traces = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log requests, and why some were refused.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Answer questions from caches, embeddings or pictures that edges send, until interrupted."""
    model = model_of(model, named, "testbed/cloud")
    from kvferry.cloud import Limits
    from kvferry.cloud import serve as run
    from kvferry.cloud.store import Backing, open_store

    keys = guarded(listen, cert, key, client_ca, tokens, insecure)
    set_up_logs(log_format, verbose)
    if traces:
        set_up_traces(traces, "kvferry-cloud")
    limits = Limits(
        request_bytes=max_bytes,
        request_seconds=max_seconds,
        waiting=max_waiting,
        together=together,
        held_bytes=max_held_bytes,
        session_bytes=max_session_bytes,
        session_seconds=session_seconds,
    ).but(limit or ())
    if store_key is not None and store is None:
        raise InputError("--store-key seals what --store keeps; name a store, or leave the key out")
    if ray is not None and store is not None and "://" not in store:
        raise InputError("replicas share a store, which a folder cannot be; use redis://host:port/0, or none")
    if ray is not None and translator:
        raise InputError("replicas find translators in the folders that KVFERRY_PROFILES names; leave --translator out")
    if ray is not None and (http or steady):
        raise InputError("--http and --steady are for one process with its own model; leave them out with --ray")
    opened = None if store is None else open_store(store, store_key, session_seconds, max_stored_bytes)
    counted, at = None, ""
    with contextlib.ExitStack() as stack:
        if metrics:
            from kvferry.cloud.metrics import Metrics

            counted = Metrics()
            at = stack.enter_context(counted.served(metrics_address(metrics)))
        if ray is not None:
            from kvferry.cloud.fleet.gateway import Fleet, as_ready_line, serve_fleet

            def up(address: str, pids: list[int]) -> None:
                line = f"listening on {address}, {len(pids)} replicas of {model}"
                print(as_ready_line(address, pids, known_as(model), at) if json else line, flush=True)

            fleet = Fleet(model, replicas, ray, device, dtype, replica_cpus, store or "", str(store_key or ""), limits)
            serve_fleet(fleet, listen, metrics=counted, on_ready=up, keys=keys, tokens=tokens, insecure=insecure)
            return
        with waiting(f"loading {model}", json):
            from kvferry.models import load

            vlm = load(model, device=device or None, dtype=dtype)
            for file in translator or ():
                from kvferry.modes.translators import add

                add(file, vlm)
            if steady:
                from kvferry.models.steady import steady as compute_steadily

                if not compute_steadily(vlm.model):
                    raise InputError("--steady is for a model in float32, bfloat16 or float16 on a CPU; leave it out")

        doors: list[str] = []

        def ready(address: str) -> None:
            if json:
                host, _, port = address.rpartition(":")
                print_json(
                    {
                        "address": address,
                        "host": host,
                        "port": int(port),
                        "model": known_as(vlm.name),
                        "fingerprint": vlm.fingerprint,
                        "metrics": at,
                        "http": doors[0] if doors else "",
                    }
                )
            else:
                counts = f", metrics on http://{at}/metrics" if at else ""
                counts += f", chat on http{'s' if keys else ''}://{doors[0]}/v1" if doors else ""
                print(f"listening on {address} with {vlm.name} ({vlm.fingerprint[:12]}){counts}", flush=True)

        backing = None if opened is None else Backing(*opened, vlm.fingerprint)
        run(
            vlm, listen, limits=limits, metrics=counted, on_ready=ready, keys=keys, tokens=tokens, insecure=insecure,
            backing=backing, http=http, on_http=doors.append,
        )  # fmt: skip
