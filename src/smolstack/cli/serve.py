"""``smolstack serve``: OpenAI's chat completions over HTTP, and a page to try it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolstack.cli import model_options, options, serve_address
from smolstack.cli.console import note
from smolstack.cli.model_loading import load_model
from smolstack.errors import GenerationError

EXAMPLES = """
**Examples**

`smolstack serve`

`smolstack serve --model HuggingFaceTB/SmolVLM-256M-Instruct --port 9000`

`SMOLSTACK_API_KEY=secret smolstack serve --host 0.0.0.0 --deadline 60`

`smolstack serve --ssl-certfile cert.pem --ssl-keyfile key.pem --allow-origin https://example.org`

Then open http://127.0.0.1:8000, or point any OpenAI client at http://127.0.0.1:8000/v1.
"""
_LIMITS, _WORK, _REMOTE = "Limits", "How much is done at a time", "Remote images"
_ACCESS = "Access"


def serve(
    *,
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    image_cache: options.ImageCacheFolder = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Listen on this Unix socket instead of a port."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in /v1/models. Default: its folder.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="An API key that clients must send; repeatable. Other users can see "
            f"command line arguments; set {serve_address.KEY} instead to hide it.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An additional accepted host name in requests; *: any. Repeatable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Allow requests from pages of this origin (CORS), e.g. https://example.org; "
            "*: any. Repeatable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Serve over TLS with this certificate.", rich_help_panel=_ACCESS
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The certificate's private key. Default: in the certificate's file.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum request body, in bytes.", rich_help_panel=_LIMITS)
    ] = 32 * 2**20,
    max_body_bytes_in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum bytes of all request bodies together, until the requests end. "
            "Default: 256 MiB, or twice the largest body.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of connections. Default: 512, or as open files allow.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    header_seconds: Annotated[
        float,
        typer.Option(help="Timeout for a request's headers, in seconds.", rich_help_panel=_LIMITS),
    ] = 10.0,
    body_seconds: Annotated[
        float,
        typer.Option(help="Timeout for a request's body, in seconds.", rich_help_panel=_LIMITS),
    ] = 60.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum image size, in pixels.", rich_help_panel=_LIMITS)
    ] = 40_000_000,
    max_decode_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Memory limit for decoding images, all images together, in bytes.",
            rich_help_panel=_LIMITS,
        ),
    ] = 2**30,
    max_images: Annotated[
        int, typer.Option(min=1, help="Maximum images per request.", rich_help_panel=_LIMITS)
    ] = 16,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum prompt tokens, including visual tokens. Default: the model's context.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum answer tokens, whatever the request asks for.",
            rich_help_panel=_LIMITS,
        ),
    ] = 2048,
    max_grammar_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum characters of a request's schema, grammar, regex and choices together.",
            rich_help_panel=_LIMITS,
        ),
    ] = 64 * 2**10,
    special_tokens_in_text: Annotated[
        bool,
        typer.Option(
            "--special-tokens-in-text",
            help="Convert the text of special tokens in messages to these tokens, as in "
            "transformers; authors of the text can then forge turns.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    max_answers: Annotated[
        int, typer.Option(min=1, help="Maximum answers per request (n).", rich_help_panel=_LIMITS)
    ] = 8,
    deadline: Annotated[
        float,
        typer.Option(
            help="Time limit of a request in seconds, including waiting.", rich_help_panel=_LIMITS
        ),
    ] = 300.0,
    drain: Annotated[
        float,
        typer.Option(
            help="Seconds that running requests get after SIGTERM.", rich_help_panel=_LIMITS
        ),
    ] = 30.0,
    running: Annotated[
        int, typer.Option(min=1, help="Maximum number of running answers.", rich_help_panel=_WORK)
    ] = 16,
    queued: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum number of waiting answers; more get status 429.",
            rich_help_panel=_WORK,
        ),
    ] = 64,
    tiles: Annotated[
        int, typer.Option(min=1, help="Tiles per vision micro-batch.", rich_help_panel=_WORK)
    ] = 4,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens per prefill chunk.", rich_help_panel=_WORK)
    ] = 512,
    image_cache_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Size of the image cache, in bytes.",
            rich_help_panel=_WORK,
        ),
    ] = 128 * 2**20,
    prefix_cache_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Size of the prefix cache, in bytes.",
            rich_help_panel=_WORK,
        ),
    ] = 256 * 2**20,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory limit of all KV caches, in bytes. Default: half of the free memory.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool,
        typer.Option(
            "--allow-remote-images",
            help="Download images from public addresses; private ones are always refused.",
            rich_help_panel=_REMOTE,
        ),
    ] = False,
    max_remote_bytes: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum size of a downloaded image, in bytes.", rich_help_panel=_REMOTE
        ),
    ] = 16 * 2**20,
    remote_seconds: Annotated[
        float, typer.Option(help="Timeout of a download, in seconds.", rich_help_panel=_REMOTE)
    ] = 10.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log every request on stderr.")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients and browsers, many requests at once.

    The environment variable SMOLSTACK_API_KEY is the key that clients must send.
    """
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as missing:
        raise GenerationError(
            f"smolstack serve needs {missing.name}: pip install 'smolstack[serve]'"
        ) from None
    from smolstack.generation.scheduler import SchedulerLimits
    from smolstack.serve.running import run
    from smolstack.serve.settings import ServerSettings

    certificate = serve_address.certificate(ssl_certfile, ssl_keyfile)
    keys = serve_address.keys(api_key or [])
    settings = ServerSettings(
        name=name or (Path(model).name if model else "smolstack-reader"),
        api_keys=keys,
        hosts=serve_address.hosts(host, uds, keys, allowed_hosts or []),
        origins=tuple(allow_origin or ()),
        body_bytes=max_body_bytes,
        bodies_bytes=max_body_bytes_in_flight or max(256 * 2**20, 2 * max_body_bytes),
        body_seconds=body_seconds,
        connections=max_connections,
        header_seconds=header_seconds,
        image_pixels=max_pixels,
        decode_bytes=max_decode_bytes,
        images=max_images,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        grammar_bytes=max_grammar_bytes,
        special_tokens_in_text=special_tokens_in_text,
        answers=max_answers,
        deadline=deadline,
        drain=drain,
        allow_remote_images=allow_remote_images,
        remote_bytes=max_remote_bytes,
        remote_seconds=remote_seconds,
        image_cache_bytes=image_cache_bytes,
        scheduler=SchedulerLimits(
            running=running,
            queued=queued,
            tiles=tiles,
            prefill_tokens=prefill_tokens,
            prefix_bytes=prefix_cache_bytes,
            kv_cache_bytes=kv_cache_bytes,
        ),
    )
    listener = serve_address.listen(host, port) if uds is None else serve_address.listen_at(uds)
    with listener:
        vlm = load_model(
            model,
            revision,
            dtype,
            device,
            threads,
            base=base,
            mmproj=mmproj,
            images=image_cache,
        )
        scheme = "http" if certificate is None else "https"
        shown = f"[{host}]" if ":" in host else host
        place = f"{scheme}://{shown}:{listener.getsockname()[1]}" if uds is None else f"unix:{uds}"
        note(f"Serving {settings.name} at {place} (Ctrl-C stops)")
        level = "info" if verbose else "warning"
        try:
            run(vlm, settings, listener, log_level=level, certificate=certificate)
        finally:
            if uds is not None:
                uds.unlink(missing_ok=True)
