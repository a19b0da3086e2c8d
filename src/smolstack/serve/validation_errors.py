"""What is said of a body or an address that no route takes: where it is, and what is near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from smolstack.serve import schemas
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.parsing import TooDeepError, line_and_column
from smolstack.serve.request_fields import ALIASES, HARMLESS, NEUTRAL, nearest


def add_handlers(app: FastAPI) -> None:
    """Say in one sentence what is wrong with a request that reached no route."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the branches of a union, the one that came furthest is the one that was meant: the
        # deepest, and not one that met another type from the first.
        first = max(
            error.errors(),
            key=lambda each: (len(each["loc"]), not str(each["type"]).endswith("_type")),
        )
        if first["type"] == "json_invalid":
            return RefusedError(400, _no_json(first, error.body)).response()
        param = ".".join(_place(first["loc"][1:], error.body)) or None
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            return RefusedError(400, _unknown(name, param, first), param=param).response()
        where = f"{param}: " if param else ""
        return RefusedError(400, f"{where}{first['msg']}"[:500], param=param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if isinstance(error.__cause__, TooDeepError):
            place = error.__cause__.place
            detail = f"the body is no JSON that can be read: it is nested too deeply at {place}"
        asked = f"{request.method} {request.url.path[:100]}"
        if error.status_code == 404:
            detail = f"there is no route {asked}; there are {_routes(app)}"
        elif error.status_code == 405:
            allowed = Headers(error.headers or {}).get("allow", "another method")
            detail = f"{asked} is not answered, expected {allowed}"
        return RefusedError(error.status_code, detail, headers=error.headers or {}).response()


def _no_json(found: Mapping[str, Any], body: Any) -> str:
    """Where a body is no JSON, and why."""
    why = found.get("ctx", {}).get("error", "it cannot be read")
    place = found["loc"][-1]
    if not isinstance(body, str) or not isinstance(place, int):
        return f"the body is no JSON: {why}"
    return f"the body is no JSON: {why} at {line_and_column(body, place)}"


def _place(steps: Sequence[Any], body: Any) -> list[str]:
    """The way to a value in the body; names of a union's branches are no part of it."""
    found: list[str] = []
    value = body
    for number, step in enumerate(steps):
        listed = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if listed or (isinstance(value, Mapping) and step in value):
            value = value[step]
        elif not isinstance(value, Mapping) or number < len(steps) - 1:
            continue
        found.append(str(step))
    return found


def _unknown(name: str, param: str | None, found: Mapping[str, Any]) -> str:
    """A field that would change the answer in a way that is not known here."""
    if name in NEUTRAL and param == name:
        return f"{name} is not supported (found {found['input']!r:.60}); leave it out"
    known = {*NEUTRAL, *HARMLESS, *ALIASES, *_fields()}
    return f"{param or name}: no such field{nearest(name, known)}"


def _fields() -> set[str]:
    models = (schemas.ChatRequest, schemas.PlanRequest, schemas.ChatMessage, schemas.ImageURL,
              schemas.TextPart, schemas.ImagePart, schemas.VideoURL,
              schemas.VideoPart, schemas.FileData, schemas.FilePart,
              schemas.ResponseFormat, schemas.JsonSchema,
              schemas.StreamOptions, schemas.Tool, schemas.Function, schemas.NamedTool,
              schemas.NamedFunction, schemas.ToolCall, schemas.CalledFunction)  # fmt: skip
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def _routes(app: FastAPI) -> str:
    paths = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    }
    return ", ".join(sorted(paths))
